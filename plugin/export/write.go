package export

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// WriteOptions says what of an image to write, and how.
type WriteOptions struct {
	Platforms Selection
	Name      string // of the image in the layout; default its own
	// Copy has blobs copied, and checked against their digests, where they
	// could share their data with the source.
	Copy bool
}

// Written says what a layout was given.
type Written struct {
	Target ocispec.Descriptor // the image, as index.json lists it
	Blobs  int                // all that belong to it
	Bytes  int64              // in them
	Shared int                // blobs that share their data with the source
	Had    int                // blobs that were in the layout before
}

// layoutMarker is the content of the file oci-layout.
const layoutMarker = `{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`

// WriteLayout adds the image to the OCI layout in dir, which is made if it is
// not there. An image of the same name is replaced; others stay. Readers see
// the image whole or not at all, also after a power cut, and whole if that comes
// after WriteLayout has returned.
//
// A blob that is a file of the same file system is not copied but cloned, or
// linked where files cannot be cloned: it is then the source's own file, and
// must not be written to. Blobs are read-only files for that reason.
//
// Content that is missing is an error that names it (errdefs.ErrNotFound).
func WriteLayout(ctx context.Context, s *Source, dir string, o WriteOptions) (Written, error) {
	p, err := s.plan(ctx, o)
	if err != nil {
		return Written{}, err
	}
	if err := checkTarget(dir); err != nil {
		return Written{}, err
	}
	if err := makeDir(dir); err != nil {
		return Written{}, err
	}
	w := Written{Target: p.root, Blobs: len(p.blobs)}
	for _, desc := range p.blobs {
		if err := ctx.Err(); err != nil {
			return w, fmt.Errorf("exporting %s: %w", s.Name, err)
		}
		how, err := s.writeBlob(ctx, dir, p, desc, o.Copy)
		if err != nil {
			return w, fmt.Errorf("writing blob %s to %s: %w", desc.Digest, dir, err)
		}
		w.Bytes += desc.Size
		switch how {
		case shared:
			w.Shared++
		case had:
			w.Had++
		}
	}
	if err := syncBlobs(dir, p.blobs); err != nil {
		return w, err
	}
	return w, addToIndex(dir, p.root)
}

// syncBlobs has blobs and their names last. Whoever wrote those that are shared
// or were there may not have seen to it.
func syncBlobs(dir string, blobs []ocispec.Descriptor) error {
	paths := []string{filepath.Join(dir, ocispec.ImageBlobsDir)}
	for _, desc := range blobs {
		path := blobPath(dir, desc.Digest)
		if err := syncPath(path); err != nil {
			return err
		}
		if parent := filepath.Dir(path); !slices.Contains(paths, parent) {
			paths = append(paths, parent)
		}
	}
	for _, path := range paths {
		if err := syncPath(path); err != nil {
			return err
		}
	}
	return nil
}

// syncPath brings a file, or the names in a directory, to the disk.
func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// makeDir makes a directory, and those above it that are not there, and has
// their names last.
func makeDir(dir string) error {
	if st, err := os.Stat(dir); err == nil && st.IsDir() {
		return nil
	}
	parent := filepath.Dir(dir)
	if err := makeDir(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncPath(parent)
}

// checkTarget refuses a directory that is something else than a layout.
func checkTarget(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	marker, err := os.ReadFile(filepath.Join(dir, ocispec.ImageLayoutFile))
	if errors.Is(err, fs.ErrNotExist) && onlyBlobs(entries) {
		return nil // an export that was interrupted
	}
	if err != nil {
		return fmt.Errorf("%s has files in it and is not an OCI layout; name another directory: %w", dir, err)
	}
	if err := checkMarker(dir, marker); err != nil {
		return err
	}
	_, err = readIndex(dir)
	return err
}

// readIndex reads a layout's index.json. One that is not there yet is empty.
func readIndex(dir string) (ocispec.Index, error) {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	file := filepath.Join(dir, ocispec.ImageIndexFile)
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return index, nil
	}
	if err != nil {
		return index, err
	}
	if err := json.Unmarshal(raw, &index); err != nil {
		return index, fmt.Errorf("%s: %w", file, err)
	}
	return index, nil
}

// onlyBlobs says whether there is nothing but what an export leaves that ended
// before its end.
func onlyBlobs(entries []fs.DirEntry) bool {
	return !slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
		return e.Name() != ocispec.ImageBlobsDir && !isTemporary(e.Name())
	})
}

// addToIndex puts desc into a layout's index.json in place of what has its
// name. Several processes may do this at once.
func addToIndex(dir string, desc ocispec.Descriptor) error {
	unlock, err := lockDir(dir)
	if err != nil {
		return fmt.Errorf("locking %s: %w", dir, err)
	}
	defer unlock()
	index, err := readIndex(dir)
	if err != nil {
		return err
	}
	others := slices.DeleteFunc(index.Manifests, func(old ocispec.Descriptor) bool { return sameName(old, desc) })
	index.Manifests = append(others, distinct(desc, others))
	raw, err := json.Marshal(index)
	if err != nil {
		return err
	}
	// What the index names is on the disk before it is.
	for _, file := range []struct {
		name string
		b    []byte
	}{{ocispec.ImageLayoutFile, []byte(layoutMarker)}, {ocispec.ImageIndexFile, raw}} {
		if err := replaceFile(dir, file.name, file.b); err != nil {
			return err
		}
		if err := syncPath(dir); err != nil {
			return err
		}
	}
	return nil
}

// distinct is desc with its full name in place of its tag if one of the others
// has that: whoever asks for the tag gets the image that was there before.
func distinct(desc ocispec.Descriptor, others []ocispec.Descriptor) ocispec.Descriptor {
	tag := desc.Annotations[ocispec.AnnotationRefName]
	if tag != "" && slices.ContainsFunc(others, func(other ocispec.Descriptor) bool {
		return other.Annotations[ocispec.AnnotationRefName] == tag
	}) {
		full := desc.Annotations[images.AnnotationImageName]
		desc.Annotations = map[string]string{images.AnnotationImageName: full, ocispec.AnnotationRefName: full}
	}
	return desc
}

// sameName says whether two entries of an index.json name the same image.
func sameName(a, b ocispec.Descriptor) bool {
	for _, key := range []string{images.AnnotationImageName, ocispec.AnnotationRefName} {
		if x, y := a.Annotations[key], b.Annotations[key]; x != "" || y != "" {
			return x == y
		}
	}
	return a.Digest == b.Digest
}

// lockDir keeps other exports out of dir. It is no file of its own: a layout
// has none.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// replaceFile writes a small file in dir, unless it says the same already.
func replaceFile(dir, name string, b []byte) error {
	path := filepath.Join(dir, name)
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, b) {
		return nil
	}
	f, err := os.CreateTemp(dir, temporary)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// checkMarker checks the content of the file oci-layout.
func checkMarker(name string, marker []byte) error {
	var layout ocispec.ImageLayout
	if err := json.Unmarshal(marker, &layout); err != nil || layout.Version != ocispec.ImageLayoutVersion {
		return fmt.Errorf("%s: OCI layout version %q is not %s: %w", name, layout.Version, ocispec.ImageLayoutVersion, errdefs.ErrInvalidArgument)
	}
	return nil
}
