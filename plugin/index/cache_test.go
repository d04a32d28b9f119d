package index

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

func openCache(t *testing.T, size int64) *Cache {
	t.Helper()
	c, err := OpenCache(filepath.Join(t.TempDir(), "cache"), size)
	require.NoError(t, err)
	return c
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
			require.Nil(t, cache.get(t.Context(), img.Layers[0], opts), "byte %d", i)
		}
	}
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

func TestCacheEvicts(t *testing.T) {
	img := testImage(t, 4)
	opts, err := layer.Options{}.Normalize()
	require.NoError(t, err)
	_, indexes := runCounted(t, img, Options{})
	one, err := encodeCached(indexes[0])
	require.NoError(t, err)
	cache := openCache(t, int64(len(one))*5/2)
	day := time.Now().Add(-24 * time.Hour)
	for i := range 3 {
		require.NoError(t, cache.put(indexes[i], img.Layers[i], opts))
		require.NoError(t, os.Chtimes(cache.path(img.Layers[i], opts), day, day.Add(time.Duration(i)*time.Minute)))
		if i == 1 { // the first one is used again
			require.NotNil(t, cache.get(t.Context(), img.Layers[0], opts))
		}
	}
	stale, fresh := filepath.Join(cache.dir, partial+"stale"), filepath.Join(cache.dir, partial+"fresh")
	require.NoError(t, os.WriteFile(stale, nil, 0o600))
	require.NoError(t, os.Chtimes(stale, day, day))
	require.NoError(t, os.WriteFile(fresh, nil, 0o600))
	require.NoError(t, cache.put(indexes[3], img.Layers[3], opts))
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
