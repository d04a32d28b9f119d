package cache

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// blobs is a registry in memory that counts and can misbehave.
type blobs struct {
	blob     []byte
	requests atomic.Int64
	bytes    atomic.Int64
	answer   func(b []byte) ([]byte, error) // what to send instead of b
	wrap     func(r io.Reader, off, n int64) io.Reader
}

func (s *blobs) Open(_ context.Context, sources []string, _ digest.Digest, off, n int64) (io.ReadCloser, error) {
	if len(sources) == 0 {
		return nil, errors.New("no source")
	}
	s.requests.Add(1)
	s.bytes.Add(n)
	b := bytes.Clone(s.blob[off : off+n])
	if s.answer != nil {
		var err error
		if b, err = s.answer(b); err != nil {
			return nil, err
		}
	}
	var r io.Reader = bytes.NewReader(b)
	if s.wrap != nil {
		r = s.wrap(r, off, n)
	}
	return io.NopCloser(r), nil
}

// once keeps what is slow to make: compressing takes long under the race detector.
func once[T any](key any, make func() T) T {
	made, _ := kept.LoadOrStore(key, sync.OnceValue(make))
	return made.(func() T)()
}

var kept sync.Map

// testTar returns a tar stream whose files are partly compressible.
func testTar(t testing.TB, files int) []byte {
	t.Helper()
	return once(files, func() []byte {
		r := rand.New(rand.NewPCG(1, 2))
		var b bytes.Buffer
		tw := tar.NewWriter(&b)
		for i := range files {
			size := r.IntN(200 << 10)
			content := make([]byte, 0, size)
			for len(content) < size {
				content = fmt.Appendf(content, "%d %d some text that repeats ", i, r.IntN(1000000))
			}
			require.NoError(t, tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("dir/file%d", i), Size: int64(len(content)), Mode: 0o644}))
			_, err := tw.Write(content)
			require.NoError(t, err)
		}
		require.NoError(t, tw.Close())
		return slices.Clip(b.Bytes())
	})
}

func gzipped(t testing.TB, stream []byte) []byte {
	t.Helper()
	return once("gzip "+digest.FromBytes(stream), func() []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, err := w.Write(stream)
		require.NoError(t, err)
		require.NoError(t, w.Close())
		return slices.Clip(b.Bytes())
	})
}

func build(t testing.TB, blob []byte) *layer.Index {
	t.Helper()
	x := once("index "+digest.FromBytes(blob), func() layer.Index {
		x, err := layer.Build(context.Background(), bytes.NewReader(blob), ocispec.Descriptor{
			Digest: digest.FromBytes(blob), Size: int64(len(blob)),
		}, layer.Options{SpanSize: 64 << 10, PointInterval: 256 << 10})
		require.NoError(t, err)
		return *x
	})
	return &x
}

func open(t testing.TB, dir string, src Fetcher, x *layer.Index) (*Store, *Layer) {
	t.Helper()
	return openWith(t, Options{Dir: dir, Fetch: src}, x)
}

func openWith(t testing.TB, opts Options, x *layer.Index) (*Store, *Layer) {
	t.Helper()
	s, err := Open(t.Context(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	require.NoError(t, s.Add("registry.example/repo:tag", x))
	l, err := s.Layer(x.DiffID)
	require.NoError(t, err)
	return s, l
}

func TestAnyRangeEqualsTheStream(t *testing.T) {
	stream := testTar(t, 60)
	for name, blob := range map[string][]byte{"gzip": gzipped(t, stream), "uncompressed": stream} {
		t.Run(name, func(t *testing.T) {
			src := &blobs{blob: blob}
			_, l := open(t, t.TempDir(), src, build(t, blob))
			require.Equal(t, int64(len(stream)), l.Size())
			var wg sync.WaitGroup
			for seed := range uint64(8) {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(seed, 0))
					for range 100 {
						off := r.Int64N(int64(len(stream)))
						p := make([]byte, r.IntN(300<<10)+1)
						n, err := l.ReadAt(context.Background(), p, off)
						if err != nil && !errors.Is(err, io.EOF) {
							t.Error(err)
							return
						}
						if !bytes.Equal(p[:n], stream[off:off+int64(n)]) {
							t.Errorf("wrong bytes at %d", off)
						}
					}
				})
			}
			wg.Wait()
			_, err := l.ReadAt(context.Background(), make([]byte, 1), l.Size())
			require.ErrorIs(t, err, io.EOF)
		})
	}
}

// requireStream reads all of the layer and compares.
func requireStream(t testing.TB, l *Layer, stream []byte) {
	t.Helper()
	p := make([]byte, 300<<10)
	for off := 0; off < len(stream); off += len(p) {
		n, err := l.ReadAt(t.Context(), p, int64(off))
		require.NoError(t, err)
		require.True(t, bytes.Equal(stream[off:off+n], p[:n]), "wrong bytes at %d", off)
	}
}

// fillAll completes the layer.
func fillAll(t testing.TB, l *Layer, n int64) {
	t.Helper()
	for {
		done, err := l.Fill(t.Context(), Fill{Want: l.All(), Bytes: n, Pace: unpaced})
		require.NoError(t, err)
		if done.Bytes == 0 {
			return
		}
	}
}

func unpaced(context.Context, int) error { return nil }

func TestReadersOfOneSpanShareOneRequest(t *testing.T) {
	stream := testTar(t, 60)
	src := &blobs{blob: gzipped(t, stream)}
	_, l := open(t, t.TempDir(), src, build(t, src.blob))
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			p := make([]byte, 100)
			if _, err := l.ReadAt(context.Background(), p, 700<<10); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, src.requests.Load())
	require.Less(t, src.bytes.Load(), int64(len(src.blob))/2)
}

func TestReadingInPiecesFetchesOnce(t *testing.T) {
	stream := testTar(t, 60)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	_, l := open(t, t.TempDir(), src, x)
	p := make([]byte, 100<<10)
	for off := int64(0); off < l.Size(); off += int64(len(p)) {
		n, err := l.ReadAt(context.Background(), p, off)
		if err != nil {
			require.ErrorIs(t, err, io.EOF)
		}
		require.True(t, bytes.Equal(stream[off:off+int64(n)], p[:n]))
	}
	// A span that a seek point lies in is decoded from the point before it, so
	// a part of each interval comes twice.
	require.Less(t, src.bytes.Load(), int64(len(src.blob))*3/2)
	require.LessOrEqual(t, src.requests.Load(), int64(len(x.Points)))
}

func TestSpansSurviveARestart(t *testing.T) {
	dir := t.TempDir()
	stream := testTar(t, 20)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	s, l := open(t, dir, src, x)
	p := make([]byte, len(stream))
	_, err := l.ReadAt(context.Background(), p, 0)
	require.NoError(t, err)
	require.Equal(t, stream, p)
	require.NoError(t, s.Close())

	away := &blobs{answer: func([]byte) ([]byte, error) { return nil, errors.New("away") }}
	_, l = open(t, dir, away, x)
	clear(p)
	_, err = l.ReadAt(context.Background(), p, 0)
	require.NoError(t, err)
	require.Equal(t, stream, p)
	require.Equal(t, l.Size(), l.Fetched())
}

// A process that dies loses what was not recorded, never gains anything.
func TestUnrecordedSpansAreFetchedAgain(t *testing.T) {
	dir := t.TempDir()
	stream := testTar(t, 20)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	_, l := open(t, dir, src, x)
	p := make([]byte, len(stream))
	_, err := l.ReadAt(context.Background(), p, 0)
	require.NoError(t, err)

	// As after a power cut: the data is gone, nothing was recorded.
	data := filepath.Join(dir, x.DiffID.Encoded(), "data")
	require.NoError(t, os.Truncate(data, 0))
	for name, have := range map[string][]byte{"no record": nil, "damaged record": []byte("nonsense")} {
		t.Run(name, func(t *testing.T) {
			if have != nil {
				require.NoError(t, os.WriteFile(filepath.Join(dir, x.DiffID.Encoded(), "have"), have, 0o600))
			}
			_, l := open(t, dir, src, x)
			clear(p)
			_, err := l.ReadAt(context.Background(), p, 0)
			require.NoError(t, err)
			require.Equal(t, stream, p)
			require.NoError(t, os.Truncate(data, 0))
		})
	}
}

func TestWrongBytesAreNeverReturned(t *testing.T) {
	stream := testTar(t, 60)
	blob := gzipped(t, stream)
	for name, spoil := range map[string]func([]byte) []byte{
		"altered":   func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"truncated": func(b []byte) []byte { return b[:len(b)/2] },
		"empty":     func([]byte) []byte { return nil },
		"zeros":     func(b []byte) []byte { clear(b); return b },
	} {
		t.Run(name, func(t *testing.T) {
			src := &blobs{blob: blob}
			_, l := open(t, t.TempDir(), src, build(t, blob))
			src.answer = func(b []byte) ([]byte, error) { return spoil(b), nil }
			p := make([]byte, 100<<10)
			n, err := l.ReadAt(context.Background(), p, 900<<10)
			if err == nil { // bit by bit it got there
				require.Contains(t, []string{"altered", "truncated"}, name)
				require.Equal(t, stream[900<<10:1000<<10], p)
				return
			}
			require.Zero(t, n)
			src.answer = nil
			_, err = l.ReadAt(context.Background(), p, 900<<10)
			require.NoError(t, err, "the next read tries again")
			require.Equal(t, stream[900<<10:1000<<10], p)
		})
	}
}

func TestOneBadAnswerIsRepeated(t *testing.T) {
	stream := testTar(t, 20)
	src := &blobs{blob: gzipped(t, stream)}
	_, l := open(t, t.TempDir(), src, build(t, src.blob))
	var once sync.Once
	src.answer = func(b []byte) ([]byte, error) {
		once.Do(func() { b[10] ^= 0xff })
		return b, nil
	}
	p := make([]byte, 10)
	_, err := l.ReadAt(context.Background(), p, 1<<20)
	require.NoError(t, err)
	require.EqualValues(t, 2, src.requests.Load())
}

func TestKeepRemovesTheRest(t *testing.T) {
	dir := t.TempDir()
	src := &blobs{blob: testTar(t, 3)}
	x := build(t, src.blob)
	s, _ := open(t, dir, src, x)
	require.NoError(t, os.Mkdir(filepath.Join(dir, ".new-left-behind"), 0o700))
	require.NoError(t, s.Keep(func(d digest.Digest) bool { return d == x.DiffID }))
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.NoError(t, s.Keep(func(digest.Digest) bool { return false }))
	left, err = os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
	_, err = s.Layer(x.DiffID)
	require.True(t, errdefs.IsNotFound(err))
}

func TestEntriesComeBack(t *testing.T) {
	src := &blobs{blob: gzipped(t, testTar(t, 30))}
	x := build(t, src.blob)
	s, _ := open(t, t.TempDir(), src, x)
	got, err := s.Entries(x.DiffID)
	require.NoError(t, err)
	require.True(t, reflect.DeepEqual(x, got))
}

// TestIndexIsReadAside has an index that takes long to read, for who needs something
// that is missing: who reads what is here does not wait for it.
func TestIndexIsReadAside(t *testing.T) {
	stream := testTar(t, 60)
	src := &blobs{blob: gzipped(t, stream)}
	x, dir := build(t, src.blob), t.TempDir()
	s, _ := open(t, dir, src, x)
	require.NoError(t, s.Close()) // what is new is written no more
	_, l := open(t, dir, src, x)
	p := make([]byte, 10)
	_, err := l.ReadAt(t.Context(), p, 0)
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.runs) == 0
	}, time.Minute, time.Millisecond)
	l.mu.Lock()
	l.index = nil // as after a while without fetches
	l.mu.Unlock()
	spans := filepath.Join(dir, x.DiffID.Encoded(), spansFile)
	raw, err := os.ReadFile(spans)
	require.NoError(t, err)
	require.NoError(t, os.Remove(spans))
	require.NoError(t, unix.Mkfifo(spans, 0o600))
	missed := make(chan error, 1)
	go func() {
		_, err := l.ReadAt(context.Background(), make([]byte, 10), l.Size()-10)
		missed <- err
	}()
	var fifo *os.File // whoever reads it waits until it is closed
	require.Eventually(t, func() bool {
		fifo, err = os.OpenFile(spans, os.O_WRONLY|unix.O_NONBLOCK, 0) // which fails without a reader
		return err == nil
	}, time.Minute, time.Millisecond)
	defer fifo.Close()
	here := make(chan error, 1)
	go func() {
		_, err := l.ReadAt(context.Background(), p, 0)
		here <- err
	}()
	select {
	case err = <-here:
	case <-time.After(readTimeout / 2):
		err = errors.New("it waits for the index")
	}
	_, werr := fifo.Write(raw)
	require.NoError(t, errors.Join(err, werr, fifo.Close()))
	require.NoError(t, <-missed)
	require.Equal(t, stream[:10], p)
}

type fetcherFunc func(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error)

func (f fetcherFunc) Open(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	return f(ctx, sources, d, off, n)
}

// byDigest is a registry of several blobs.
type byDigest map[digest.Digest]Fetcher

func (m byDigest) Open(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	return m[d].Open(ctx, sources, d, off, n)
}
