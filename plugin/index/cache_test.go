package index

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/imports"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

func openCache(t *testing.T, size int64) *Cache {
	t.Helper()
	c, err := OpenCache(filepath.Join(t.TempDir(), "cache"), size)
	require.NoError(t, err)
	return c
}

// pathOf is the file of the layer's index.
func (c *Cache) pathOf(t *testing.T, desc ocispec.Descriptor) string {
	t.Helper()
	opts, err := layer.Options{}.Normalize()
	require.NoError(t, err)
	return c.path(desc, opts)
}

// runCounted runs and returns which layers were read.
func runCounted(t *testing.T, img *testutil.Image, opts Options) (read []int, indexes []*layer.Index) {
	t.Helper()
	c := &counter{read: map[int]int64{}, done: map[int]Outcome{}}
	opts.Progress = c
	out, err := Run(t.Context(), img.Blobs, input(img), opts)
	require.NoError(t, err)
	for i, l := range out.Layers {
		indexes = append(indexes, l.Index)
		require.Equal(t, c.read[i] == 0, c.done[i].Cached)
		if !c.done[i].Cached {
			read = append(read, i)
		}
	}
	return read, indexes
}

func TestCacheIndexesALayerOnce(t *testing.T) {
	img, cache := testImage(t, 3), openCache(t, DefaultCacheSize)
	read, first := runCounted(t, img, Options{Cache: cache})
	require.Equal(t, []int{0, 1, 2}, read)
	read, again := runCounted(t, img, Options{Cache: cache})
	require.Empty(t, read)
	require.Equal(t, first, again)

	read, again = runCounted(t, img, Options{Cache: cache, Force: true})
	require.Equal(t, []int{0, 1, 2}, read)
	require.Equal(t, first, again)
	read, _ = runCounted(t, img, Options{Cache: cache, Layer: layer.Options{PointInterval: 4 << 20}})
	require.Equal(t, []int{0, 1, 2}, read, "seek points at other places are another index")

	// An image with one more layer.
	more := testImage(t, 4)
	read, again = runCounted(t, more, Options{Cache: cache})
	require.Equal(t, []int{3}, read)
	require.Equal(t, first, again[:3])

	// What is in the cache needs no blob.
	delete(img.Blobs, img.Layers[0].Digest)
	read, _ = runCounted(t, img, Options{Cache: cache})
	require.Empty(t, read)
}

func TestCacheDamage(t *testing.T) {
	img, cache := testImage(t, 1), openCache(t, DefaultCacheSize)
	_, first := runCounted(t, img, Options{Cache: cache})
	opts, err := layer.Options{}.Normalize()
	require.NoError(t, err)
	path := cache.path(img.Layers[0], opts)
	whole, err := os.ReadFile(path)
	require.NoError(t, err)
	for i := range whole {
		for _, b := range [][]byte{whole[:i], append(append(append([]byte{}, whole[:i]...), whole[i]^1), whole[i+1:]...)} {
			require.NoError(t, os.WriteFile(path, b, 0o600))
			if got := cache.get(t.Context(), img.Layers[0], opts); got != nil {
				require.Equal(t, first[0], got.Index(), "byte %d", i)
				require.GreaterOrEqual(t, i, len(whole)-64, "only the footer has bytes that say nothing")
			}
		}
	}
	require.NoError(t, os.WriteFile(path, whole[:len(whole)/2], 0o600))
	read, again := runCounted(t, img, Options{Cache: cache})
	require.Equal(t, []int{0}, read)
	require.Equal(t, first, again)
	read, _ = runCounted(t, img, Options{Cache: cache})
	require.Empty(t, read, "the damaged file was replaced")

	other := img.Layers[0]
	other.Size++
	require.Nil(t, cache.get(t.Context(), other, opts), "not this blob")
	opts.MaxEntries = 0
	require.Nil(t, cache.get(t.Context(), img.Layers[0], opts), "more entries than wanted")

	// A cache that cannot be written is none.
	require.NoError(t, os.RemoveAll(cache.dir))
	read, again = runCounted(t, img, Options{Cache: cache})
	require.Equal(t, []int{0}, read)
	require.Equal(t, first, again)
}

// TestCachedIndexesMakeTheSameArchive has all, some and none of the layers in the cache.
func TestCachedIndexesMakeTheSameArchive(t *testing.T) {
	img, fewer, cache := testImage(t, 5), testImage(t, 3), openCache(t, DefaultCacheSize)
	archived := func(opts Options) []byte {
		out, err := Run(t.Context(), img.Blobs, input(img), opts)
		require.NoError(t, err)
		var b bytes.Buffer
		_, err = archive.Write(&b, out)
		require.NoError(t, err)
		return b.Bytes()
	}
	want := archived(Options{})
	runCounted(t, fewer, Options{Cache: cache})
	require.True(t, bytes.Equal(want, archived(Options{Cache: cache})), "three of five layers are cached")
	require.True(t, bytes.Equal(want, archived(Options{Cache: cache})), "all are")
	require.True(t, bytes.Equal(want, archived(Options{Cache: cache, Force: true})))
}

// TestCacheVersion fails when what the cache keeps of an index is no longer
// what it was: then cacheVersion must change, or the archive of an image would
// depend on the program that filled the cache.
func TestCacheVersion(t *testing.T) {
	x := &layer.Index{
		Digest: digest.FromString("blob"), Size: 1 << 30, DiffID: digest.FromString("stream"), OutSize: 1 << 32,
		Compression: layer.Gzip, SpanSize: 16 << 20, Points: []layer.Point{{Window: []byte("window")}},
	}
	for i := range 256 {
		x.Spans = append(x.Spans, layer.Span{InEnd: inflate.In(i) << 20, Digest: sha256.Sum256([]byte{byte(i)})})
	}
	for i := range 5000 {
		x.Entries = append(x.Entries, layer.Entry{
			Name: fmt.Sprintf("usr/lib/package%d/file%d.so", i/50, i*i), Type: layer.TypeReg, Mode: 0o644,
			ModTime: int64(i * i), Size: int64(i * 1000), Off: inflate.Out(i) << 10,
		})
	}
	var sources []imports.Source
	for i := range 100 {
		src := fmt.Sprintf("import a%d as b, c.d\ntry:\n    from ..e import (f,\n        g%d)\nexcept E:\n    import h\n", i, i)
		sources = append(sources, imports.Source{Entry: i, Imports: new(imports.Scanner).Scan([]byte(src))})
	}
	x.Imports = imports.Append(nil, sources)
	for i := range 30 {
		x.Points = append(x.Points, layer.Point{Out: inflate.Out(i+1) << 20, In: inflate.In(i+1) << 10, Group: i/15 + 1, WindowSize: 100 * (i + 1)})
	}
	x.Windows = []byte("two groups")
	x.Groups = []layer.Group{{Len: 4, Digest: sha256.Sum256(x.Windows[:4])}, {Off: 4, Len: 6, Digest: sha256.Sum256(x.Windows[4:])}}
	e, err := new(archive.IndexEncoder).Encode(x)
	require.NoError(t, err)
	hash := sha256.New()
	require.NoError(t, e.Write(hash))
	require.Equal(t, "6 f71aacb6e62fa20aa1a55e28346e36092d10bdf0145445009e680f8bf852bc97", fmt.Sprintf("%s %x", cacheVersion, hash.Sum(nil)))
}

// TestCacheOfAnotherVersion finds what another program may have left.
func TestCacheOfAnotherVersion(t *testing.T) {
	img, cache := testImage(t, 1), openCache(t, DefaultCacheSize)
	_, first := runCounted(t, img, Options{Cache: cache})
	path := cache.pathOf(t, img.Layers[0])
	other := strings.TrimSuffix(path, ".v"+cacheVersion) + ".v1"
	require.NotEqual(t, path, other)
	require.NoError(t, os.Rename(path, other))
	read, again := runCounted(t, img, Options{Cache: cache})
	require.Equal(t, []int{0}, read)
	require.Equal(t, first, again)
	require.FileExists(t, other, "its program may still use it")
}

// A digest that is none is refused, and not looked for.
func TestCacheAndBadDigest(t *testing.T) {
	img, cache := testImage(t, 2), openCache(t, DefaultCacheSize)
	in := input(img)
	in.Layers = slices.Clone(img.Layers)
	in.Layers[1].Digest = "../../etc/passwd"
	_, err := Run(t.Context(), img.Blobs, in, Options{Cache: cache})
	require.ErrorContains(t, err, "layer 2 of 2: digest")
}

func TestCacheEvicts(t *testing.T) {
	img := testImage(t, 4)
	opts, err := layer.Options{}.Normalize()
	require.NoError(t, err)
	_, indexes := runCounted(t, img, Options{})
	encoded := make([]*archive.EncodedIndex, len(indexes))
	for i, x := range indexes {
		encoded[i], err = new(archive.IndexEncoder).Encode(x)
		require.NoError(t, err)
	}
	var one bytes.Buffer
	require.NoError(t, encoded[0].Write(&one))
	cache := openCache(t, int64(one.Len())*5/2)
	day := time.Now().Add(-24 * time.Hour)
	for i := range 3 {
		require.NoError(t, cache.put(encoded[i], img.Layers[i], opts))
		require.NoError(t, os.Chtimes(cache.path(img.Layers[i], opts), day, day.Add(time.Duration(i)*time.Minute)))
		if i == 1 { // the first one is used again
			require.NotNil(t, cache.get(t.Context(), img.Layers[0], opts))
		}
	}
	stale, fresh := filepath.Join(cache.dir, partial+"stale"), filepath.Join(cache.dir, partial+"fresh")
	require.NoError(t, os.WriteFile(stale, nil, 0o600))
	require.NoError(t, os.Chtimes(stale, day, day))
	require.NoError(t, os.WriteFile(fresh, nil, 0o600))
	require.NoError(t, cache.put(encoded[3], img.Layers[3], opts))
	for i, want := range []bool{true, false, false, true} {
		require.Equal(t, want, cache.get(t.Context(), img.Layers[i], opts) != nil, "layer %d", i)
	}
	require.NoFileExists(t, stale)
	require.FileExists(t, fresh, "its writer may be at work")
}

// TestCacheConcurrently has indexers write, read and evict the same files.
func TestCacheConcurrently(t *testing.T) {
	img := testImage(t, 4)
	_, want := runCounted(t, img, Options{})
	dir := filepath.Join(t.TempDir(), "cache")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for round := range 10 {
				cache, err := OpenCache(dir, 500) // less than all
				if err != nil {
					t.Error(err)
					return
				}
				out, err := Run(t.Context(), img.Blobs, input(img), Options{Cache: cache, Force: round%3 == 0})
				if err != nil {
					t.Error(err)
					return
				}
				for i, l := range out.Layers {
					if fmt.Sprint(l.Index) != fmt.Sprint(want[i]) {
						t.Errorf("layer %d differs", i)
					}
				}
			}
		})
	}
	wg.Wait()
}
