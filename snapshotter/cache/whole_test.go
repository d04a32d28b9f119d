package cache

import (
	"bytes"
	"context"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// rangeless is a registry that sends whole blobs only.
type rangeless struct {
	blob     []byte
	requests atomic.Int64
	sent     atomic.Int64
	wrap     func(io.Reader) io.Reader
}

func (s *rangeless) Open(_ context.Context, _ []string, _ digest.Digest, off, n int64) (io.ReadCloser, error) {
	s.requests.Add(1)
	var r io.Reader = bytes.NewReader(s.blob)
	if s.wrap != nil {
		r = s.wrap(r)
	}
	return &wholeBlob{s, r, off, n}, nil
}

// wholeBlob delivers n bytes after skip, as remote.Reader does.
type wholeBlob struct {
	from *rangeless
	r    io.Reader
	skip int64
	n    int64
}

func (b *wholeBlob) Close() error { return nil }
func (b *wholeBlob) Widen(off, end int64) bool {
	b.skip, b.n = off, end-off
	return true
}

func (b *wholeBlob) Read(p []byte) (int, error) {
	if b.n == 0 {
		return 0, io.EOF
	}
	left := &b.n
	if b.skip > 0 {
		left = &b.skip
	}
	n, err := b.r.Read(p[:min(int64(len(p)), *left)])
	*left -= int64(n)
	b.from.sent.Add(int64(n))
	if left == &b.skip {
		n = 0
	}
	return n, err
}

// TestWholeBlobIsSentOnce reads in the middle of a layer of which nobody sends a
// part: everything is there afterwards, also what comes before.
func TestWholeBlobIsSentOnce(t *testing.T) {
	stream := testTar(t, 60)
	for name, blob := range map[string][]byte{"gzip": gzipped(t, stream), "uncompressed": stream} {
		t.Run(name, func(t *testing.T) {
			src := &rangeless{blob: blob}
			s, l := open(t, t.TempDir(), src, build(t, blob))
			p := make([]byte, 10)
			_, err := l.ReadAt(t.Context(), p, l.Size()/2)
			require.NoError(t, err)
			require.Equal(t, stream[l.Size()/2:][:10], p)
			requireStream(t, l, stream)
			require.EqualValues(t, 1, src.requests.Load())
			require.LessOrEqual(t, src.sent.Load(), int64(len(blob)))

			// What was given up is sent again, and no more than there is before it.
			require.Positive(t, s.evict(1))
			src.sent.Store(0)
			_, err = l.ReadAt(t.Context(), p, 0)
			require.NoError(t, err)
			requireStream(t, l, stream)
			require.EqualValues(t, 2, src.requests.Load())
			require.LessOrEqual(t, src.sent.Load(), int64(len(blob)))
		})
	}
}

// TestWholeBlobForAll has a reader and a fill ask for parts at the same moment: one
// of them brings all, and the reader waits for it, whoever it is.
func TestWholeBlobForAll(t *testing.T) {
	stream := testTar(t, 200)
	src := &rangeless{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	for _, first := range []string{"reader", "fill"} {
		t.Run(first, func(t *testing.T) {
			src.requests.Store(0)
			src.sent.Store(0)
			opened := make(chan struct{})
			answer := map[string]chan struct{}{"reader": make(chan struct{}), "fill": make(chan struct{})}
			held := fetcherFunc(func(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
				opened <- struct{}{}
				if off < int64(x.Size)/2 {
					<-answer["fill"]
				} else {
					<-answer["reader"]
				}
				return src.Open(ctx, sources, d, off, n)
			})
			_, l := open(t, t.TempDir(), held, x)
			ended := make(chan error, 2)
			proceed := make(chan struct{})
			src.wrap = func(r io.Reader) io.Reader {
				return readerFunc(func(p []byte) (int, error) { <-proceed; return r.Read(p) })
			}
			go func() {
				_, err := l.Fill(t.Context(), Fill{Want: l.All(), Bytes: 100 << 10, Pace: unpaced})
				ended <- err
			}()
			<-opened
			go func() {
				_, err := l.ReadAt(t.Context(), make([]byte, 10), l.Size()*3/4)
				ended <- err
			}()
			<-opened
			close(answer[first])
			require.Eventually(t, func() bool {
				l.mu.Lock()
				defer l.mu.Unlock()
				return l.rangeless
			}, time.Minute, time.Millisecond)
			for other, ch := range answer {
				if other != first {
					close(ch) // it sees that it need not go on
				}
			}
			require.Eventually(t, func() bool {
				l.mu.Lock()
				defer l.mu.Unlock()
				return len(l.runs) == 1
			}, time.Minute, time.Millisecond)
			close(proceed)
			require.NoError(t, <-ended, "no fill stands still for who waits for it")
			require.NoError(t, <-ended)
			requireStream(t, l, stream)
			require.EqualValues(t, 2, src.requests.Load())
			require.LessOrEqual(t, src.sent.Load(), int64(len(src.blob)))
		})
	}
}

// TestFarOffsetOfAWholeBlob is so far away that it takes longer than a read waits,
// and than a run may hear nothing.
func TestFarOffsetOfAWholeBlob(t *testing.T) {
	stream := testTar(t, 20)
	src := &rangeless{blob: gzipped(t, stream)}
	src.wrap = func(r io.Reader) io.Reader { return trickle{r, len(src.blob)/100 + 1, time.Second} }
	x := build(t, src.blob)
	for name, fetch := range map[string]Fetcher{
		"from the start": src,
		"skipped": fetcherFunc(func(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
			rc, err := src.Open(ctx, sources, d, off, n)
			return struct{ io.ReadCloser }{rc}, err // as of a body that broke off, whose rest comes from elsewhere
		}),
	} {
		dir := t.TempDir()
		src.requests.Store(0)
		synctest.Test(t, func(t *testing.T) {
			s, l := open(t, dir, fetch, x)
			p := make([]byte, 10)
			_, err := l.ReadAt(t.Context(), p, l.Size()-10)
			require.ErrorIs(t, err, errReadTimeout, name)
			_, err = l.ReadAt(t.Context(), p, l.Size()-10)
			require.NoError(t, err, name)
			require.Equal(t, stream[len(stream)-10:], p)
			require.EqualValues(t, 1, src.requests.Load())
			require.NoError(t, s.Close())
		})
	}
}

// TestWholeBlobThatDoesNotFit is asked for by a fill once, and never again.
func TestWholeBlobThatDoesNotFit(t *testing.T) {
	src := &rangeless{blob: gzipped(t, testTar(t, 60))}
	x := build(t, src.blob)
	_, l := openWith(t, Options{Dir: t.TempDir(), Fetch: src, MaxSize: Limit{Size: int64(x.OutSize) / 2}}, x)
	for range 3 {
		_, err := l.Fill(t.Context(), Fill{Want: l.All(), Bytes: 100 << 10, Pace: unpaced})
		require.ErrorIs(t, err, ErrFull)
	}
	require.EqualValues(t, 1, src.requests.Load())
	require.Zero(t, src.sent.Load())
}

// TestSingleZstdFrame has a layer that can only be decoded from its start, and a
// registry that sends any part of it: it is streamed once, readers are served as
// what they want passes, and everything is there afterwards.
func TestSingleZstdFrame(t *testing.T) {
	stream := testTar(t, 60)
	w, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	blob := w.EncodeAll(stream, nil)
	src := &blobs{blob: blob}
	passed := make(chan struct{}) // the first half may come
	proceed := make(chan struct{})
	src.wrap = func(r io.Reader, _, _ int64) io.Reader {
		first := io.LimitReader(r, int64(len(blob))/2)
		return readerFunc(func(p []byte) (int, error) {
			if n, err := first.Read(p); err == nil {
				return n, nil
			}
			select {
			case <-passed:
			default:
				close(passed)
			}
			<-proceed
			return r.Read(p)
		})
	}
	x := build(t, blob)
	require.Len(t, x.Points, 1)
	dir := t.TempDir()
	s, l := open(t, dir, src, x)
	late := make(chan error, 1)
	go func() {
		_, err := l.ReadAt(context.Background(), make([]byte, 10), l.Size()-10)
		late <- err
	}()
	<-passed
	p := make([]byte, 10)
	_, err = l.ReadAt(t.Context(), p, l.Size()/4)
	require.NoError(t, err, "it has passed already")
	require.Equal(t, stream[l.Size()/4:][:10], p)
	require.Empty(t, late)
	close(proceed)
	require.NoError(t, <-late)
	requireStream(t, l, stream)
	require.EqualValues(t, 1, src.requests.Load())
	require.Equal(t, int64(len(blob)), src.bytes.Load())
	require.NoError(t, s.Close())

	_, l = open(t, dir, away{}, x)
	requireStream(t, l, stream)
}
