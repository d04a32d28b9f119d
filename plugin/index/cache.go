package index

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Cache keeps layer indexes on disk, so that a layer is indexed once however
// many images have it. It is safe for concurrent use, by several processes too.
//
// Each index is a file named by the layer's digest and the options it was made
// with. It holds the index as archives do, in sections with digests, and they
// are what an archive gets. A file that is not whole counts as missing.
type Cache struct {
	dir string
	max int64
}

// DefaultCacheSize is what a cache may take on disk, in bytes: the indexes of a
// few hundred images.
const DefaultCacheSize = 1 << 30

// cacheVersion is part of the names of files. It changes when the encoding of
// an index, its compression or what Build puts into one does: an archive is the
// same whether its indexes come from the cache or not.
const cacheVersion = "6"

// partial is the prefix of files that are being written; staleAfter is when
// their writer must be dead.
const (
	partial    = ".new-"
	staleAfter = time.Hour
)

// OpenCache opens the cache in dir, which it creates if need be. The cache
// keeps below size bytes by removing what was not used for longest.
func OpenCache(dir string, size int64) (*Cache, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("layer-index cache: %w", err)
	}
	return &Cache{dir: dir, max: size}, nil
}

// path returns the file of the layer's index. opts are normalized.
func (c *Cache) path(desc ocispec.Descriptor, opts layer.Options) string {
	name := fmt.Sprintf("%s-%s-%d-%d.v%s", desc.Digest.Algorithm(), desc.Digest.Encoded(), opts.SpanSize, opts.PointInterval, cacheVersion)
	return filepath.Join(c.dir, name)
}

// has says whether there is a file for the layer's index.
func (c *Cache) has(desc ocispec.Descriptor, opts layer.Options) bool {
	_, err := os.Stat(c.path(desc, opts))
	return err == nil
}

// get returns the index of the layer, or nil if it is not there.
func (c *Cache) get(ctx context.Context, desc ocispec.Descriptor, opts layer.Options) *archive.EncodedIndex {
	path := c.path(desc, opts)
	e, err := readCached(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("file", path).Warn("cached layer index is unusable; indexing the layer again")
		return nil
	}
	if x := e.Index(); x.Digest != desc.Digest || int64(x.Size) != desc.Size || len(x.Entries) > opts.MaxEntries {
		return nil
	}
	now := time.Now()
	if err := os.Chtimes(path, now, now); err != nil {
		log.G(ctx).WithError(err).Debug("cached layer index may be removed too early")
	}
	return e
}

func readCached(path string) (*archive.EncodedIndex, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return archive.ReadIndex(f, st.Size())
}

// put stores the index of a layer.
func (c *Cache) put(e *archive.EncodedIndex, desc ocispec.Descriptor, opts layer.Options) error {
	tmp, err := os.CreateTemp(c.dir, partial)
	if err != nil {
		return err
	}
	if err = errors.Join(e.Write(tmp), tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), c.path(desc, opts))
	}
	if err != nil {
		os.Remove(tmp.Name())
		return err
	}
	return c.evict()
}

// evict removes what was not used for longest until the rest fits, and what
// writers left behind.
func (c *Cache) evict() error {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	var total int64
	var files []fs.FileInfo
	for _, e := range entries {
		st, err := e.Info()
		if err != nil {
			continue // another process removed it
		}
		if strings.HasPrefix(st.Name(), partial) {
			if time.Since(st.ModTime()) > staleAfter {
				os.Remove(filepath.Join(c.dir, st.Name()))
			}
			continue
		}
		total += st.Size()
		files = append(files, st)
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int {
		return cmp.Or(a.ModTime().Compare(b.ModTime()), strings.Compare(a.Name(), b.Name()))
	})
	for _, st := range files {
		if total <= c.max {
			break
		}
		if err := os.Remove(filepath.Join(c.dir, st.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		total -= st.Size()
	}
	return nil
}
