// Package contents shows the files of a .clip archive, of whatever kind, without containerd.
//
// An archive with layer indexes is shown as the image's root is: merged from
// the indexes, its files read in spans and verified. All others are shown as
// upstream CLIP shows them, with CLIP's own storage code: archives of images
// that CLIP itself indexed, and those of its first version, which hold their
// data or have it in S3.
//
// The snapshotter does not use this package: it has its own way to an image's
// archive, cache and roots.
package contents

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/beam-cloud/clip/pkg/common"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive"
)

// Kind says what an archive is.
type Kind string

// Kinds of archives.
const (
	KindIndexed Kind = "indexed" // ours: an image, with layer indexes
	KindOCI     Kind = "oci"     // CLIP's: an image, without
	KindS3      Kind = "s3"      // CLIP's: data in a bucket
	KindData    Kind = "data"    // CLIP's: data in the archive
)

// Fetcher reads registries. snapshotter/remote's Client is one.
type Fetcher interface {
	// Open returns the bytes [off, off+n) of a blob from one of the
	// repositories that sources name.
	Open(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error)
}

// Options configures Open.
type Options struct {
	// Fetch reads the layers of archives with layer indexes, and nothing else.
	Fetch Fetcher
	// CacheDir is where a mount keeps what it fetches, and CLIP's code the
	// layers that it reads, whole. Empty means a temporary directory that Close
	// removes.
	CacheDir string
}

// File is one name in an archive.
type File struct {
	Path   string // absolute and clean
	Mode   uint32 // type and permissions as in stat(2)
	UID    uint32
	GID    uint32
	Size   int64
	Time   time.Time
	Target string // of a symlink
	Rdev   uint64 // of a device
}

// reader copies the content of a regular file.
type reader func(ctx context.Context, w io.Writer, path string) error

// Archive is an open archive. Its methods must not be called concurrently.
type Archive struct {
	Kind Kind

	indexed  *archive.Archive // nil for other kinds
	upstream *archive.Upstream
	opts     Options
	path     string
	closers  []func() error

	files  []File // parents first, in the order of names; nil until load
	byPath map[string]int
	read   reader
}

// Open opens the archive at path. No registry or bucket is asked yet.
func Open(path string, opts Options) (_ *Archive, err error) {
	a := &Archive{path: path, opts: opts}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close())
		}
	}()
	if a.indexed, err = archive.OpenFile(path); err == nil {
		a.closers = append(a.closers, a.indexed.Close)
	} else if !errors.Is(err, archive.ErrNoSections) {
		return a, err
	}
	if a.upstream, err = archive.OpenUpstreamFile(path); err != nil {
		return a, err
	}
	a.closers = append(a.closers, a.upstream.Close)
	a.Kind = a.kind()
	return a, nil
}

func (a *Archive) kind() Kind {
	if a.indexed != nil {
		return KindIndexed
	}
	switch a.upstream.Storage().(type) {
	case common.OCIStorageInfo:
		return KindOCI
	case common.S3StorageInfo:
		return KindS3
	}
	return KindData
}

// load finds out which files there are.
func (a *Archive) load() (err error) {
	if a.files != nil {
		return nil
	}
	if a.indexed != nil {
		a.files, a.read, err = a.indexedFiles()
	} else {
		a.files, a.read, err = a.clipFiles()
	}
	if err != nil {
		return fmt.Errorf("archive %s: %w", a.path, err)
	}
	slices.SortFunc(a.files, func(x, y File) int { return comparePaths(x.Path, y.Path) })
	a.byPath = make(map[string]int, len(a.files))
	for i, f := range a.files {
		a.byPath[f.Path] = i
	}
	return nil
}

// comparePaths orders names as a walk meets them: what is in a directory comes
// right behind it, so "/" is lower than any other byte.
func comparePaths(a, b string) int {
	for i := range min(len(a), len(b)) {
		switch {
		case a[i] == b[i]:
		case a[i] == '/':
			return -1
		case b[i] == '/':
			return 1
		default:
			return cmp.Compare(a[i], b[i])
		}
	}
	return cmp.Compare(len(a), len(b))
}

func (a *Archive) lookup(path string) (File, bool) {
	i, ok := a.byPath[path]
	if !ok {
		return File{}, false
	}
	return a.files[i], true
}

// Close releases what the archive holds.
func (a *Archive) Close() error {
	var errs []error
	for i := len(a.closers) - 1; i >= 0; i-- {
		errs = append(errs, a.closers[i]())
	}
	a.closers = nil
	return errors.Join(errs...)
}

// cacheDir returns where CLIP's code may keep layers.
func (a *Archive) cacheDir() (string, error) {
	if a.opts.CacheDir != "" {
		return a.opts.CacheDir, os.MkdirAll(a.opts.CacheDir, 0o700)
	}
	dir, err := os.MkdirTemp("", "clipctl-cache-")
	if err != nil {
		return "", err
	}
	a.opts.CacheDir = dir
	a.closers = append(a.closers, func() error { return os.RemoveAll(dir) })
	return dir, nil
}

// List calls fn for the file at name and for all below it, parents first, in
// the order of names.
func (a *Archive) List(name string, fn func(File) error) error {
	at, err := a.Stat(name)
	if err != nil {
		return err
	}
	below := strings.TrimSuffix(at.Path, "/") + "/"
	for _, f := range a.files[a.byPath[at.Path]:] {
		if f.Path != at.Path && !strings.HasPrefix(f.Path, below) {
			break
		}
		if err := fn(f); err != nil {
			return err
		}
	}
	return nil
}

// Copy writes the content of the regular file at name to w, following links.
func (a *Archive) Copy(ctx context.Context, w io.Writer, name string) error {
	f, err := a.Stat(name)
	if err != nil {
		return err
	}
	if f.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%s is not a regular file: %w", f.Path, errdefs.ErrInvalidArgument)
	}
	if err := a.read(ctx, w, f.Path); err != nil {
		return fmt.Errorf("%s: %w", f.Path, err)
	}
	return nil
}

// maxLinks is how many symlinks one path may lead through, as in Linux.
const maxLinks = 40

// Stat returns the file at name, following links.
func (a *Archive) Stat(name string) (File, error) {
	if err := a.load(); err != nil {
		return File{}, err
	}
	todo := strings.Split(name, "/")
	at, links := "/", 0
	f, ok := a.lookup(at)
	for ok && len(todo) > 0 {
		next := path.Join(at, todo[0])
		todo = todo[1:]
		if f, ok = a.lookup(next); !ok {
			break
		}
		if f.Mode&unix.S_IFMT != unix.S_IFLNK {
			at = next
			continue
		}
		if links++; links > maxLinks {
			return File{}, fmt.Errorf("%s leads through too many links: %w", name, errdefs.ErrInvalidArgument)
		}
		if strings.HasPrefix(f.Target, "/") {
			at = "/"
		}
		todo = append(strings.Split(f.Target, "/"), todo...)
		f, ok = a.lookup(at)
	}
	if !ok {
		return File{}, fmt.Errorf("%s in %s: %w", name, a.path, errdefs.ErrNotFound)
	}
	return f, nil
}
