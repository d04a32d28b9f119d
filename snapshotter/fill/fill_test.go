package fill

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/snapshotter/cache"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

// registry has one blob.
type registry struct {
	blob     []byte
	requests atomic.Int64
	away     atomic.Bool
}

func (r *registry) Open(_ context.Context, _ []string, _ digest.Digest, off, n int64) (io.ReadCloser, error) {
	r.requests.Add(1)
	if r.away.Load() {
		return nil, errors.New("away")
	}
	return io.NopCloser(bytes.NewReader(r.blob[off : off+n])), nil
}

// image is a layer of about size bytes that does not compress well.
func image(t testing.TB, size int) (*registry, *layer.Index) {
	t.Helper()
	content := make([]byte, size)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(content)
	for i := range content {
		content[i] &= 0x3f
	}
	var blob bytes.Buffer
	zw, err := gzip.NewWriterLevel(&blob, gzip.HuffmanOnly)
	require.NoError(t, err)
	tw := tar.NewWriter(zw)
	require.NoError(t, tw.WriteHeader(&tar.Header{Name: "file", Size: int64(size), Mode: 0o644}))
	_, err = tw.Write(content)
	require.NoError(t, err)
	require.NoError(t, tw.Close())
	require.NoError(t, zw.Close())
	x, err := layer.Build(t.Context(), bytes.NewReader(blob.Bytes()), ocispec.Descriptor{
		Digest: digest.FromBytes(blob.Bytes()), Size: int64(blob.Len()),
	}, layer.Options{})
	require.NoError(t, err)
	return &registry{blob: blob.Bytes()}, x
}

func open(t testing.TB, dir string, src cache.Fetcher, x *layer.Index, size cache.Limit) (*cache.Store, *cache.Layer) {
	t.Helper()
	s, err := cache.Open(t.Context(), cache.Options{Dir: dir, Fetch: src, MaxSize: size})
	require.NoError(t, err)
	require.NoError(t, s.Add("registry.example/repo:tag", x))
	l, err := s.Layer(x.DiffID)
	require.NoError(t, err)
	return s, l
}

// requireMetrics says how much there is to do, and the one phase in which a layer is.
func requireMetrics(t *testing.T, f *Filler, backlog int64, phase Phase) {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(f.Collectors()...)
	families, err := registry.Gather()
	require.NoError(t, err)
	layers := map[Phase]float64{}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			if family.GetName() == "clip_fill_backlog_bytes" {
				require.Equal(t, float64(backlog), m.GetGauge().GetValue())
			} else if n := m.GetGauge().GetValue(); n > 0 {
				layers[Phase(m.GetLabel()[0].GetValue())] = n
			}
		}
	}
	require.Len(t, families, 2)
	require.Equal(t, map[Phase]float64{phase: 1}, layers)
}

// TestFiller is on a link that takes no time, whatever else the machine does.
func TestFiller(t *testing.T) {
	src, x := image(t, 60<<20)
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s, l := open(t, dir, src, x, cache.Limit{})
		f := New(t.Context(), Options{Workers: 2})
		f.Add(l)
		time.Sleep(time.Minute)
		require.Equal(t, []State{{DiffID: x.DiffID, Done: l.Size(), Total: l.Size(), Phase: Done}}, f.State())
		requireMetrics(t, f, 0, Done)
		require.LessOrEqual(t, src.requests.Load(), int64(len(src.blob)/rangeSize+3), "few requests")
		require.Greater(t, src.requests.Load(), int64(len(src.blob)/rangeSize), "each of its size")
		f.Remove(x.DiffID)
		require.Empty(t, f.State())
		f.Close()
		require.NoError(t, s.Close())
	})
}

// TestWholeBlobsOnly has a registry that does not know ranges: it sends about one
// blob, whatever is asked for how often.
func TestWholeBlobsOnly(t *testing.T) {
	src, x := image(t, 32<<20)
	var sent atomic.Int64
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for part := range slices.Chunk(src.blob, 64<<10) {
			n, err := w.Write(part)
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	}))
	// What the kernel takes of answers that nobody reads is counted, too: let it be little.
	srv.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		assert.NoError(t, c.(*net.TCPConn).SetWriteBuffer(64<<10))
		return ctx
	}
	srv.Start()
	defer srv.Close()
	// A connection that is given up has the blob sent again.
	s, err := cache.Open(t.Context(), cache.Options{Dir: t.TempDir(), Fetch: remote.New(remote.Options{SilenceTimeout: time.Minute})})
	require.NoError(t, err)
	defer s.Close()
	require.NoError(t, s.Add(strings.TrimPrefix(srv.URL, "http://")+"/repo:tag", x))
	l, err := s.Layer(x.DiffID)
	require.NoError(t, err)
	f := New(t.Context(), Options{Workers: 4})
	defer f.Close()
	f.Add(l)
	require.Eventually(t, func() bool { return l.Fetched() == l.Size() }, 5*time.Minute, 10*time.Millisecond)
	require.Less(t, sent.Load(), int64(len(src.blob))*3/2)
}

func TestNobodyWorks(t *testing.T) {
	src, x := image(t, 1<<20)
	s, l := open(t, t.TempDir(), src, x, cache.Limit{})
	defer s.Close()
	f := New(t.Context(), Options{})
	f.Add(l)
	time.Sleep(50 * time.Millisecond)
	f.Close()
	require.Zero(t, src.requests.Load())
	requireMetrics(t, f, 0, Off)
}

// TestDelayAndFailures begins within the delay and twice the delay, and comes
// back after failures.
func TestDelayAndFailures(t *testing.T) {
	src, x := image(t, 2<<20)
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		src.away.Store(true)
		s, l := open(t, dir, src, x, cache.Limit{})
		f := New(t.Context(), Options{Workers: 1, Delay: time.Minute})
		f.Add(l)
		f.Add(l)
		require.Len(t, f.State(), 1)
		time.Sleep(time.Minute - time.Second)
		require.Zero(t, src.requests.Load())
		requireMetrics(t, f, l.Size(), Waiting)
		time.Sleep(time.Minute + time.Second)
		require.Positive(t, src.requests.Load())
		time.Sleep(time.Hour)
		require.Less(t, src.requests.Load(), int64(60), "it is not asked all the time")
		requireMetrics(t, f, l.Size(), Failing)
		src.away.Store(false)
		time.Sleep(2 * mostPause)
		require.Equal(t, l.Size(), l.Fetched())
		f.Close()
		require.NoError(t, s.Close())
	})
}

func TestRate(t *testing.T) {
	src, x := image(t, 4<<20)
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s, l := open(t, dir, src, x, cache.Limit{})
		f := New(t.Context(), Options{Workers: 3, Rate: 100 << 10})
		begin := time.Now()
		f.Add(l)
		for l.Fetched() < l.Size() {
			time.Sleep(time.Second)
		}
		want := time.Duration(len(src.blob)) * time.Second / (100 << 10)
		require.InDelta(t, want.Seconds(), time.Since(begin).Seconds(), 3)
		f.Close()
		require.NoError(t, s.Close())
	})
}

// TestFullCache pauses, and says so; then it asks the registry for nothing.
func TestFullCache(t *testing.T) {
	src, x := image(t, 8<<20)
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s, l := open(t, dir, src, x, cache.Limit{Size: 4 << 20})
		f := New(t.Context(), Options{Workers: 2})
		f.Add(l)
		time.Sleep(10 * time.Minute)
		requireMetrics(t, f, l.Size()-l.Fetched(), Paused)
		require.Positive(t, l.Fetched())
		require.Less(t, l.Fetched(), l.Size())
		asked := src.requests.Load()
		require.LessOrEqual(t, asked, int64(3))
		time.Sleep(24 * time.Hour)
		require.Equal(t, asked, src.requests.Load())
		f.Close()
		require.NoError(t, s.Close())
	})
}

// TestGivenUp has a layer give up what was fetched, as for others that need the room:
// it is not fetched ahead again, which would only displace and be displaced, and
// nobody says that it will be.
func TestGivenUp(t *testing.T) {
	src, x := image(t, 8<<20)
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s, l := open(t, dir, src, x, cache.Limit{})
		f := New(t.Context(), Options{Workers: 2})
		f.Add(l)
		time.Sleep(time.Minute)
		require.Equal(t, Done, f.State()[0].Phase)
		_, freed := s.Prune(true)
		require.Positive(t, freed)
		asked := src.requests.Load()
		time.Sleep(time.Hour)
		require.Equal(t, asked, src.requests.Load())
		require.Equal(t, []State{{DiffID: x.DiffID, Total: l.Size(), Phase: Off}}, f.State())
		_, err := l.ReadAt(t.Context(), make([]byte, l.Size()), 0)
		require.NoError(t, err)
		require.Equal(t, Done, f.State()[0].Phase)

		s.Prune(true)
		f.Add(l) // its image was pulled again
		time.Sleep(time.Minute)
		require.Equal(t, Done, f.State()[0].Phase)
		f.Close()
		require.NoError(t, s.Close())
	})
}

// file is a registry that keeps its blob on disk.
type file struct{ *os.File }

func (f file) Open(_ context.Context, _ []string, _ digest.Digest, off, n int64) (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(f, off, n)), nil
}

// BenchmarkFill shows how fast layers are completed when the network is not
// what limits, and how much memory the process takes meanwhile.
func BenchmarkFill(b *testing.B) {
	src, x := image(b, 256<<20)
	path := filepath.Join(b.TempDir(), "blob")
	require.NoError(b, os.WriteFile(path, src.blob, 0o600))
	f, err := os.Open(path)
	require.NoError(b, err)
	defer f.Close()
	src = nil
	debug.FreeOSMemory()
	for workers := 1; workers <= 4; workers *= 2 {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			b.SetBytes(int64(x.OutSize))
			var most int64
			for range b.N {
				s, l := open(b, b.TempDir(), file{f}, x, cache.Limit{})
				filler := New(b.Context(), Options{Workers: workers})
				filler.Add(l)
				for l.Fetched() < l.Size() {
					time.Sleep(5 * time.Millisecond)
					most = max(most, resident(b))
				}
				b.StopTimer() // what follows waits for the disk
				filler.Close()
				require.NoError(b, s.Close())
				b.StartTimer()
			}
			b.ReportMetric(float64(most)/1e6, "MB-resident")
		})
	}
}

func resident(t testing.TB) int64 {
	t.Helper()
	status, err := os.ReadFile("/proc/self/statm")
	require.NoError(t, err)
	var total, resident int64
	_, err = fmt.Sscan(string(status), &total, &resident)
	require.NoError(t, err)
	return resident * int64(os.Getpagesize())
}
