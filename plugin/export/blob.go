package export

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// placement says how a blob came into a layout.
type placement int

const (
	copied placement = iota
	shared           // cloned or linked
	had              // it was there
)

// temporary names files that are being written. They lie beside blobs/, where
// nobody takes them for content.
const temporary = ".export-*"

func isTemporary(name string) bool {
	return strings.HasPrefix(name, strings.TrimSuffix(temporary, "*"))
}

// writeBlob puts a blob of p into the layout in dir.
func (s *Source) writeBlob(ctx context.Context, dir string, p *plan, desc ocispec.Descriptor, forceCopy bool) (placement, error) {
	if err := desc.Digest.Validate(); err != nil {
		return 0, fmt.Errorf("digest %q: %w", desc.Digest, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	path := blobPath(dir, desc.Digest)
	if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Size() == desc.Size {
		return had, nil // blobs get their names when they are whole
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return 0, err
	}
	r, err := s.openBlob(ctx, p, desc)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	f, err := os.CreateTemp(dir, temporary)
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	how, err := fill(f, r, desc.Digest, forceCopy)
	if err = errors.Join(err, f.Close()); err != nil {
		return how, err
	}
	return how, os.Rename(f.Name(), path)
}

// blobPath is where a layout has a blob.
func blobPath(dir string, d digest.Digest) string {
	return filepath.Join(dir, ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// openBlob opens a blob of p.
func (s *Source) openBlob(ctx context.Context, p *plan, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if b, ok := p.documents[desc.Digest]; ok {
		return document{bytes.NewReader(b)}, nil
	}
	return s.Provider.ReaderAt(ctx, desc)
}

// document is a blob in memory.
type document struct{ *bytes.Reader }

func (document) Close() error { return nil }

// fill gives the new file f the content of r, whose digest is d: as a clone of
// r's file, else as another name of it, else as a copy. Of these only the copy
// has to be on the disk before it gets its name.
func fill(f *os.File, r content.ReaderAt, d digest.Digest, forceCopy bool) (placement, error) {
	if src := fileOf(r); src != nil && !forceCopy {
		if unix.IoctlFileClone(int(f.Fd()), int(src.Fd())) == nil {
			return shared, f.Chmod(0o444)
		}
		if link(src, f.Name()) == nil {
			return shared, nil
		}
	}
	verifier := d.Verifier()
	n, err := io.Copy(io.MultiWriter(f, verifier), io.NewSectionReader(r, 0, r.Size()))
	if err != nil {
		return copied, err
	}
	if n != r.Size() || !verifier.Verified() {
		return copied, fmt.Errorf("content of %s does not match its digest: %w", d, errdefs.ErrDataLoss)
	}
	return copied, errors.Join(f.Chmod(0o444), f.Sync())
}

// link gives src the name path, in place of the file of that name. The open
// file is linked: its name may be another's by now.
func link(src *os.File, path string) error {
	other := path + "-link"
	if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", src.Fd()), unix.AT_FDCWD, other, unix.AT_SYMLINK_FOLLOW); err != nil {
		return err
	}
	if err := os.Rename(other, path); err != nil {
		return errors.Join(err, os.Remove(other))
	}
	return nil
}

// fileOf returns the file that a blob is, or nil if it is none. Inside
// containerd the local store's readers tell it, outside of it ours do.
func fileOf(r content.ReaderAt) *os.File {
	if f, ok := r.(fileReaderAt); ok {
		return f.File
	}
	reader, ok := r.(interface{ Reader() io.Reader })
	if !ok {
		return nil
	}
	limited, ok := reader.Reader().(*io.LimitedReader)
	if !ok {
		return nil
	}
	f, ok := limited.R.(*os.File)
	if !ok {
		return nil
	}
	if st, err := f.Stat(); err != nil || st.Size() != limited.N {
		return nil
	}
	return f
}
