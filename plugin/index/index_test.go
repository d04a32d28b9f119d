package index

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

func testImage(t *testing.T, layers int) *testutil.Image {
	t.Helper()
	random := rand.NewChaCha8([32]byte{1})
	var tars [][]byte
	for i := range layers {
		data := make([]byte, (i*7%5+1)*100_000)
		_, _ = random.Read(data) // it never fails
		tars = append(tars, testutil.Tar(t, testutil.File{Name: fmt.Sprintf("file%d", i), Data: string(data)}))
	}
	return testutil.NewImage(t, tars...)
}

func input(img *testutil.Image) Image {
	return Image{
		StorageRef: "registry.example.com/app:1", Platform: img.Platform, Descriptor: img.Descriptor,
		Manifest: img.Manifest, Config: img.Config, Layers: img.Layers,
	}
}

func TestWorkersDoNotChangeTheArchive(t *testing.T) {
	img := testImage(t, 7)
	var first []byte
	for _, workers := range []int{1, 2, 7, 0} {
		out, err := Run(t.Context(), img.Blobs, input(img), Options{Workers: workers})
		require.NoError(t, err)
		var b bytes.Buffer
		_, err = archive.Write(&b, out)
		require.NoError(t, err)
		if first == nil {
			first = b.Bytes()
		}
		require.True(t, bytes.Equal(first, b.Bytes()), "%d workers", workers)
	}
}

// counter counts what it is told, per layer.
type counter struct {
	mu   sync.Mutex // guards the fields below
	read map[int]int64
	done map[int]Outcome
}

func (c *counter) Read(i int, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.read[i] += n
}

func (c *counter) Done(i int, how Outcome) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done[i] = how
}

func TestProgressAndNotLazyLayer(t *testing.T) {
	img := testImage(t, 3)
	// A frame whose window is 2^40 bytes is sound and cannot be read lazily.
	in := input(img)
	in.Layers = append([]ocispec.Descriptor(nil), img.Layers...)
	in.Layers[1] = img.Blobs.Add("application/vnd.oci.image.layer.v1.tar+zstd", []byte("\x28\xb5\x2f\xfd\x00\xf0\x01\x00\x00"))
	c := &counter{read: map[int]int64{}, done: map[int]Outcome{}}
	out, err := Run(t.Context(), img.Blobs, in, Options{Progress: c})
	require.NoError(t, err)
	require.Len(t, c.done, 3)
	for i, l := range out.Layers {
		if i == 1 {
			require.ErrorIs(t, c.done[i].NotLazy, layer.ErrUnsupported)
			require.Nil(t, l.Index)
			require.Equal(t, c.done[i].NotLazy.Error(), l.Reason)
			continue
		}
		require.NoError(t, c.done[i].NotLazy)
		require.Equal(t, img.DiffIDs[i], l.Index.DiffID)
		require.Empty(t, l.Reason)
		require.Equal(t, img.Layers[i].Size, c.read[i])
	}
}

// TestMediaTypes has layers of every kind that an image may say it has.
func TestMediaTypes(t *testing.T) {
	tarball := testutil.Tar(t, testutil.File{Name: "file", Data: strings.Repeat("data", 10_000)})
	enc, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	blobs := testutil.Blobs{}
	for mediaType, c := range map[string]struct {
		blob []byte
		want layer.Compression
	}{
		ocispec.MediaTypeImageLayer:            {tarball, layer.Uncompressed},
		images.MediaTypeDockerSchema2Layer:     {tarball, layer.Uncompressed},
		ocispec.MediaTypeImageLayerGzip:        {testutil.Gzip(t, tarball), layer.Gzip},
		images.MediaTypeDockerSchema2LayerGzip: {testutil.Gzip(t, tarball), layer.Gzip},
		ocispec.MediaTypeImageLayerZstd:        {enc.EncodeAll(tarball, nil), layer.Zstd},
		images.MediaTypeDockerSchema2LayerZstd: {enc.EncodeAll(tarball, nil), layer.Zstd},
	} {
		desc := blobs.Add(mediaType, c.blob)
		out, err := Run(t.Context(), blobs, Image{Layers: []ocispec.Descriptor{desc}}, Options{})
		require.NoError(t, err, mediaType)
		x := out.Layers[0].Index
		require.NotNil(t, x, mediaType)
		require.Equal(t, c.want, x.Compression, mediaType)
		require.Equal(t, digest.FromBytes(tarball), x.DiffID, mediaType)
		require.Len(t, x.Entries, 1, mediaType)
	}
}

func TestDamageEndsTheRun(t *testing.T) {
	img := testImage(t, 3)
	d := img.Layers[1].Digest
	whole := img.Blobs[d]
	altered := bytes.Clone(whole)
	altered[len(altered)/2] ^= 1
	for name, c := range map[string]struct {
		blob []byte
		is   error
	}{
		"altered":   {blob: altered},
		"truncated": {blob: whole[:len(whole)-100]},
		"empty":     {blob: nil},
		"longer":    {blob: append(bytes.Clone(whole), 0)},
	} {
		t.Run(name, func(t *testing.T) {
			img.Blobs[d] = c.blob
			_, err := Run(t.Context(), img.Blobs, input(img), Options{})
			require.ErrorContains(t, err, "layer 2 of 3")
			require.NotErrorIs(t, err, layer.ErrUnsupported)
		})
	}
	delete(img.Blobs, d)
	_, err := Run(t.Context(), img.Blobs, input(img), Options{})
	require.ErrorContains(t, err, "layer 2 of 3")
}

// canceller is a content store that cancels when it is read.
type canceller struct {
	testutil.Blobs
	cancel func()
	opened atomic.Int64
	closed atomic.Int64
}

type cancelReader struct {
	content.ReaderAt
	c *canceller
}

func (c *canceller) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	c.opened.Add(1)
	ra, err := c.Blobs.ReaderAt(ctx, desc)
	return cancelReader{ra, c}, err
}

func (r cancelReader) ReadAt(p []byte, off int64) (int, error) {
	r.c.cancel()
	return r.ReaderAt.ReadAt(p, off)
}

func (r cancelReader) Close() error {
	r.c.closed.Add(1)
	return r.ReaderAt.Close()
}

func TestCancel(t *testing.T) {
	img := testImage(t, 7)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("the user is gone")
	c := &canceller{Blobs: img.Blobs, cancel: func() { cancel(cause) }}
	_, err := Run(ctx, c, input(img), Options{Workers: 2})
	require.ErrorIs(t, err, cause)
	require.Equal(t, c.opened.Load(), c.closed.Load())
}

// crowd counts the layers that are open at the same time. Opening takes a while, for others to come.
type crowd struct {
	testutil.Blobs

	mu         sync.Mutex // guards the fields below
	open, most int
}

func (c *crowd) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	c.mu.Lock()
	c.open++
	c.most = max(c.most, c.open)
	c.mu.Unlock()
	time.Sleep(time.Second)
	ra, err := c.Blobs.ReaderAt(ctx, desc)
	return crowdReader{ra, c}, err
}

type crowdReader struct {
	content.ReaderAt
	c *crowd
}

func (r crowdReader) Close() error {
	r.c.mu.Lock()
	r.c.open--
	r.c.mu.Unlock()
	return r.ReaderAt.Close()
}

// TestWorkers has as many layers indexed side by side as there are workers, and no more.
func TestWorkers(t *testing.T) {
	img := testImage(t, 7)
	for _, workers := range []int{1, 3} {
		synctest.Test(t, func(t *testing.T) {
			c := &crowd{Blobs: img.Blobs}
			_, err := Run(t.Context(), c, input(img), Options{Workers: workers})
			require.NoError(t, err)
			require.Equal(t, workers, c.most)
			require.Zero(t, c.open)
		})
	}
}

func TestLargestFirst(t *testing.T) {
	layers := []ocispec.Descriptor{{Size: 1}, {Size: 9}, {Size: 5}, {Size: 9}}
	cached := func(sizes ...int64) func(ocispec.Descriptor) bool {
		return func(desc ocispec.Descriptor) bool { return slices.Contains(sizes, desc.Size) }
	}
	require.Equal(t, []int{1, 3, 2, 0}, largestFirst(layers, cached()))
	require.Equal(t, []int{2, 0, 1, 3}, largestFirst(layers, cached(9)), "what is cached comes last")
	require.Equal(t, []int{1, 3, 2, 0}, largestFirst(layers, cached(1, 5, 9)))
}

// TestMemory indexes a large layer and many layers on a machine with many
// processors: what that needs, beside the archive, depends on none of it.
func TestMemory(t *testing.T) {
	const most = 64 << 20
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(32))
	noise := make([]byte, 16<<10) // near enough for gzip to find it again
	_, _ = rand.NewChaCha8([32]byte{2}).Read(noise)
	tarOf := func(size int) []byte {
		return testutil.Tar(t, testutil.File{Name: "file", Data: strings.Repeat(string(noise), size/len(noise))})
	}
	enc, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	for _, c := range []struct{ layers, size int }{{1, 128 << 20}, {16, 8 << 20}} {
		blobs := func(data []byte) map[string][]byte {
			return map[string][]byte{ocispec.MediaTypeImageLayerGzip: testutil.Gzip(t, data), ocispec.MediaTypeImageLayerZstd: enc.EncodeAll(data, nil)}
		}(tarOf(c.size))
		for mediaType, blob := range blobs {
			t.Run(fmt.Sprintf("%d layers of %d MiB, %s", c.layers, c.size>>20, mediaType), func(t *testing.T) {
				blobs := testutil.Blobs{}
				img := Image{Layers: slices.Repeat([]ocispec.Descriptor{blobs.Add(mediaType, blob)}, c.layers)}
				peak := peakHeap(func() {
					_, err := Run(t.Context(), blobs, img, Options{})
					require.NoError(t, err)
				})
				t.Logf("%d MiB", peak>>20)
				require.Less(t, peak, int64(most))
			})
		}
	}
}

// peakHeap returns by how many bytes the heap grows while do runs, garbage
// included.
func peakHeap(do func()) int64 {
	samples := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	read := func() int64 {
		metrics.Read(samples)
		return int64(samples[0].Value.Uint64())
	}
	runtime.GC()
	before, peak := read(), int64(0)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			peak = max(peak, read()-before)
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	do()
	close(stop)
	<-stopped
	return peak
}
