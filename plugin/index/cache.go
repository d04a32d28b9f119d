package index

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Cache keeps layer indexes on disk, so that a layer is indexed once however
// many images have it. It is safe for concurrent use, by several processes too.
//
// Each index is a file named by the layer's digest and the options it was made
// with. It holds the SHA-256 of what follows: a zstd frame with the length of
// the span part (a varint), the span part and the entry part. A file that is
// not whole counts as missing.
type Cache struct {
	dir string
	max int64
}

// DefaultCacheSize is what a cache may take on disk, in bytes: the indexes of a
// few hundred images.
const DefaultCacheSize = 1 << 30

// cacheVersion is part of the names of files. It changes when the encoding of
// an index or what Build puts into one does.
const cacheVersion = "1"

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

// get returns the index of the layer, or nil if it is not there.
func (c *Cache) get(ctx context.Context, desc ocispec.Descriptor, opts layer.Options) *layer.Index {
	path := c.path(desc, opts)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var x *layer.Index
	if err == nil {
		x, err = decodeCached(b)
	}
	if err == nil && (x.Digest != desc.Digest || int64(x.Size) != desc.Size || len(x.Entries) > opts.MaxEntries) {
		return nil
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("file", path).Warn("cached layer index is unusable; indexing the layer again")
		return nil
	}
	now := time.Now()
	if err := os.Chtimes(path, now, now); err != nil {
		log.G(ctx).WithError(err).Debug("cached layer index may be removed too early")
	}
	return x
}

// put stores the index of a layer.
func (c *Cache) put(x *layer.Index, desc ocispec.Descriptor, opts layer.Options) (err error) {
	b, err := encodeCached(x)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(c.dir, partial)
	if err != nil {
		return err
	}
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Close()); err == nil {
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

func encodeCached(x *layer.Index) ([]byte, error) {
	spans := x.AppendSpans(nil)
	raw := binary.AppendUvarint(nil, uint64(len(spans)))
	raw = append(raw, spans...)
	raw = x.AppendEntries(raw)
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return nil, err
	}
	b := enc.EncodeAll(raw, make([]byte, sha256.Size))
	sum := sha256.Sum256(b[sha256.Size:])
	copy(b, sum[:])
	return b, nil
}

// errCached is wrapped when a file of the cache is not whole.
var errCached = errors.New("file is truncated or altered")

func decodeCached(b []byte) (*layer.Index, error) {
	if len(b) < sha256.Size {
		return nil, errCached
	}
	if sum := sha256.Sum256(b[sha256.Size:]); !bytes.Equal(sum[:], b[:sha256.Size]) {
		return nil, errCached
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	raw, err := dec.DecodeAll(b[sha256.Size:], nil)
	if err != nil {
		return nil, err
	}
	size, n := binary.Uvarint(raw)
	if n <= 0 || size > uint64(len(raw)-n) {
		return nil, errCached
	}
	x, err := layer.DecodeSpans(raw[n : n+int(size)])
	if err != nil {
		return nil, err
	}
	return x, x.DecodeEntries(raw[n+int(size):])
}
