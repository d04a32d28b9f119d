package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// trickle delivers piece bytes, then waits, and so on.
type trickle struct {
	io.Reader
	piece int
	wait  time.Duration
}

func (r trickle) Read(p []byte) (int, error) {
	time.Sleep(r.wait)
	return r.Reader.Read(p[:min(len(p), r.piece)])
}

// TestRunLivesAsLongAsSomethingArrives takes minutes for what is fetched in one
// go: a reader of its beginning is served, one of its end gives up in time, and
// gets it later.
func TestRunLivesAsLongAsSomethingArrives(t *testing.T) {
	stream := testTar(t, 20)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	x.Points = x.Points[:1] // as of a layer that can only be read from its start
	src.wrap = func(r io.Reader, _, _ int64) io.Reader {
		return trickle{r, len(src.blob)/200 + 1, time.Second}
	}
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s, l := open(t, dir, src, x)
		p := make([]byte, 10)
		_, err := l.ReadAt(t.Context(), p, 0)
		require.NoError(t, err)
		begin := time.Now()
		_, err = l.ReadAt(t.Context(), p, l.Size()-10)
		require.ErrorIs(t, err, errdefs.ErrUnavailable)
		require.Equal(t, readTimeout, time.Since(begin))
		for range 4 {
			_, err = l.ReadAt(t.Context(), p, l.Size()-10)
		}
		require.NoError(t, err)
		require.Equal(t, stream[len(stream)-10:], p)
		require.EqualValues(t, 1, src.requests.Load())
		require.NoError(t, s.Close())
	})
}

// silent never delivers anything until its context ends.
type silent struct{ opened chan struct{} }

func (s silent) Open(ctx context.Context, _ []string, _ digest.Digest, _, _ int64) (io.ReadCloser, error) {
	s.opened <- struct{}{}
	return io.NopCloser(readerFunc(func([]byte) (int, error) {
		<-ctx.Done()
		return 0, context.Cause(ctx)
	})), nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestSilenceEndsARun(t *testing.T) {
	blob := gzipped(t, testTar(t, 20))
	x, dir := build(t, blob), t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		src := silent{make(chan struct{}, 10)}
		s, l := open(t, dir, src, x)
		begin := time.Now()
		_, err := l.ReadAt(t.Context(), make([]byte, 1), 0)
		require.ErrorIs(t, err, errdefs.ErrUnavailable)
		require.LessOrEqual(t, time.Since(begin), readTimeout)
		time.Sleep(time.Second)
		require.Len(t, src.opened, 1, "nobody waits any more")
		l.mu.Lock()
		require.Empty(t, l.runs)
		require.Empty(t, l.waits)
		l.mu.Unlock()
		require.NoError(t, s.Close())
	})
}

// TestLateReaderTriesAgain has a registry that says no after a while, and yes from then on. Who asked first hears the
// no; who came later to wait for the same has time left, and asks again.
func TestLateReaderTriesAgain(t *testing.T) {
	stream := testTar(t, 20)
	src := &blobs{blob: gzipped(t, stream)}
	x, dir := build(t, src.blob), t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		no := errors.New("no")
		_, l := open(t, dir, fetcherFunc(func(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
			if asked.Add(1) == 1 {
				time.Sleep(20 * time.Second)
				return nil, no
			}
			return src.Open(ctx, sources, d, off, n)
		}), x)
		var first error
		go func() { _, first = l.ReadAt(t.Context(), make([]byte, 10), 0) }()
		time.Sleep(19 * time.Second)
		p := make([]byte, 10)
		_, err := l.ReadAt(t.Context(), p, 0)
		require.NoError(t, err)
		require.Equal(t, stream[:10], p)
		synctest.Wait()
		require.ErrorIs(t, first, no)
		require.EqualValues(t, 2, asked.Load())
	})
}

// TestReaderOvertakesAFill has a fill that hangs in a large range. A reader of
// what is far behind it does not wait for it, and one of what comes next has
// it go on.
func TestReaderOvertakesAFill(t *testing.T) {
	stream := testTar(t, 200)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	proceed := make(chan struct{})
	goOn := sync.OnceFunc(func() { close(proceed) })
	src.wrap = func(r io.Reader, off, _ int64) io.Reader {
		if off > 1000 { // the fill starts behind the gzip header
			return r // the reader's
		}
		return readerFunc(func(p []byte) (int, error) {
			<-proceed
			return r.Read(p)
		})
	}
	_, l := open(t, t.TempDir(), src, x)
	t.Cleanup(goOn) // before it is closed
	filled := make(chan error, 1)
	go func() {
		_, err := l.Fill(t.Context(), Fill{Want: l.All(), Bytes: int64(len(src.blob)), Pace: unpaced})
		filled <- err
	}()
	require.Eventually(t, func() bool { return src.requests.Load() == 1 }, time.Minute, time.Millisecond)

	p := make([]byte, 100)
	far := int64(len(stream)) * 3 / 4
	_, err := l.ReadAt(t.Context(), p, far)
	require.NoError(t, err)
	require.Equal(t, stream[far:far+100], p)
	require.EqualValues(t, 2, src.requests.Load())

	read := make(chan error, 1)
	go func() {
		_, err := l.ReadAt(t.Context(), p, 0)
		read <- err
	}()
	select {
	case err := <-read:
		require.Fail(t, "the fill was to bring it", "%v after %d requests", err, src.requests.Load())
	case <-time.After(100 * time.Millisecond):
	}
	goOn()
	require.NoError(t, <-read)
	require.NoError(t, <-filled)
	require.EqualValues(t, 2, src.requests.Load())
	require.Equal(t, l.Size(), l.Fetched())
	requireStream(t, l, stream)
}

// TestFillStandsStillForReaders has a reader wait for another layer. A fill stands
// still for seconds only: they are those of a clock that the machine's speed is not in.
func TestFillStandsStillForReaders(t *testing.T) {
	src := &blobs{blob: gzipped(t, testTar(t, 200))}
	other := &blobs{blob: gzipped(t, testTar(t, 3))}
	x, y, dir := build(t, src.blob), build(t, other.blob), t.TempDir()
	synctest.Test(t, func(t *testing.T) { testFillStandsStill(t, dir, src, other, x, y) })
}

// testFillStandsStill has a fill of src's layer, x, and a reader of other's, y.
func testFillStandsStill(t *testing.T, dir string, src, other *blobs, x, y *layer.Index) {
	release := make(chan struct{})
	other.wrap = func(r io.Reader, _, _ int64) io.Reader {
		return readerFunc(func(p []byte) (int, error) { <-release; return r.Read(p) })
	}
	opened, hold := make(chan struct{}), make(chan struct{})
	begun := sync.OnceFunc(func() { close(opened) })
	src.wrap = func(r io.Reader, _, _ int64) io.Reader {
		return readerFunc(func(p []byte) (int, error) { begun(); <-hold; return r.Read(p) })
	}
	s, err := Open(t.Context(), Options{Dir: dir, Fetch: byDigest{x.Digest: src, y.Digest: other}})
	require.NoError(t, err)
	defer s.Close()
	require.NoError(t, s.Add("registry.example/repo:tag", x))
	require.NoError(t, s.Add("registry.example/repo:tag", y))
	l, err := s.Layer(x.DiffID)
	require.NoError(t, err)
	m, err := s.Layer(y.DiffID)
	require.NoError(t, err)

	ended := make(chan error, 2)
	fill := func(f Fill) {
		_, err := l.Fill(t.Context(), f)
		ended <- err
	}
	go fill(Fill{Want: l.All(), Bytes: 1 << 20, Pace: unpaced})
	<-opened
	read := make(chan error, 1)
	go func() {
		_, err := m.ReadAt(t.Context(), make([]byte, 1), 0)
		read <- err
	}()
	synctest.Wait()
	require.EqualValues(t, 1, other.requests.Load())
	close(hold)
	go fill(Fill{Want: []Spans{{l.spans - 1, l.spans}}, Bytes: 1, Expected: true, Pace: unpaced})
	select {
	case <-ended:
		require.Fail(t, "a fill did not stand still")
	case <-time.After(300 * time.Millisecond):
	}
	require.EqualValues(t, 1, src.requests.Load(), "none begins")
	_, err = l.ReadAt(t.Context(), make([]byte, 10), 0)
	require.NoError(t, err, "what a reader waits for goes on")
	close(release)
	require.NoError(t, <-read)
	require.NoError(t, <-ended)
	require.NoError(t, <-ended)
	require.Positive(t, l.Fetched())
}

// TestExpectedFillsGoOn has a reader wait for what one of two fills brings that
// are of one list: the other goes on, and one of something else does not.
func TestExpectedFillsGoOn(t *testing.T) {
	stream := testTar(t, 200)
	src := &blobs{blob: gzipped(t, stream)}
	release := make(chan struct{})
	src.wrap = func(r io.Reader, off, _ int64) io.Reader {
		if off > 1000 {
			return r
		}
		return readerFunc(func(p []byte) (int, error) { <-release; return r.Read(p) })
	}
	_, l := open(t, t.TempDir(), src, build(t, src.blob))
	first := make(chan error, 1)
	go func() {
		_, err := l.Fill(t.Context(), Fill{Want: []Spans{{0, 1}}, Bytes: 1, Expected: true, Pace: unpaced})
		first <- err
	}()
	require.Eventually(t, func() bool { return src.requests.Load() == 1 }, time.Minute, time.Millisecond)
	read := make(chan error, 1)
	go func() {
		_, err := l.ReadAt(t.Context(), make([]byte, 1), 0)
		read <- err
	}()
	require.Eventually(t, func() bool {
		l.store.gate.mu.Lock()
		defer l.store.gate.mu.Unlock()
		return l.store.gate.readers == 1 && l.store.gate.others == 0
	}, time.Minute, time.Millisecond)
	done, err := l.Fill(t.Context(), Fill{Want: []Spans{{l.spans - 1, l.spans}}, Bytes: 1, Expected: true, Pace: unpaced})
	require.NoError(t, err)
	require.Positive(t, done.Bytes)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = l.Fill(ctx, Fill{Want: l.All(), Bytes: 1, Pace: unpaced})
	require.ErrorIs(t, err, context.DeadlineExceeded)

	// A reader that fetches for itself holds the list back only with what it
	// does not name.
	middle := l.spans / 2
	l.Expect(Spans{middle, middle + 1})
	l.Expect(Spans{-1, 0})
	for span, held := range map[int]bool{middle: false, middle / 2: true} {
		l.mu.Lock()
		r, err := l.runForLocked(span, span+1)
		l.mu.Unlock()
		require.NoError(t, err)
		require.Equal(t, held, !r.expected)
	}
	close(release)
	require.NoError(t, <-read)
	require.NoError(t, <-first)
}

// TestFillTakesWhatIsWanted joins what is near and leaves out what is far, and
// what a layer does not have.
func TestFillTakesWhatIsWanted(t *testing.T) {
	stream := testTar(t, 200)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	_, l := open(t, t.TempDir(), src, x)
	last := l.spans - 1
	want := []Spans{{last, 1 << 40}, {-7, 1}, {2, 3}, {5, 5}, {9, 4}}
	for n := range 4 {
		done, err := l.Fill(t.Context(), Fill{Want: want, Bytes: 1 << 20, Pace: unpaced})
		require.NoError(t, err)
		if done.Bytes == 0 {
			require.Positive(t, n)
			break
		}
	}
	require.True(t, l.have.get(0) && l.have.get(2) && l.have.get(last))
	require.LessOrEqual(t, src.requests.Load(), int64(2))
	require.Less(t, src.bytes.Load(), int64(len(src.blob))/2)
	requireStream(t, l, stream)
}

// TestFillAsksForSoMuch asks for about as many bytes as it was told to in each
// request, and for little more than the blob in all.
func TestFillAsksForSoMuch(t *testing.T) {
	stream := testTar(t, 200)
	for name, blob := range map[string][]byte{"gzip": gzipped(t, stream), "uncompressed": stream} {
		t.Run(name, func(t *testing.T) {
			src := &blobs{blob: blob}
			var most int64
			src.wrap = func(r io.Reader, _, n int64) io.Reader { most = max(most, n); return r }
			x := build(t, blob)
			_, l := open(t, t.TempDir(), src, x)
			size := x.Size / 10
			fillAll(t, l, int64(size))
			requireStream(t, l, stream)
			require.InDelta(t, 10, src.requests.Load(), 2)
			require.Less(t, most, int64(size)*5/4)
			require.Less(t, src.bytes.Load(), int64(len(blob))*11/10)
		})
	}
}

// TestFailedFillIsNoReadersBusiness has a reader wait for a fill that fails.
func TestFailedFillIsNoReadersBusiness(t *testing.T) {
	stream := testTar(t, 20)
	src := &blobs{blob: gzipped(t, stream)}
	release := make(chan struct{})
	var once sync.Once
	src.answer = func(b []byte) ([]byte, error) {
		err := error(nil)
		once.Do(func() {
			<-release
			err = errors.New("away")
		})
		return b, err
	}
	_, l := open(t, t.TempDir(), src, build(t, src.blob))
	filled := make(chan error, 1)
	go func() {
		_, err := l.Fill(t.Context(), Fill{Want: l.All(), Bytes: 1 << 20, Pace: unpaced})
		filled <- err
	}()
	require.Eventually(t, func() bool { return src.requests.Load() == 1 }, time.Minute, time.Millisecond)
	read := make(chan error, 1)
	go func() {
		_, err := l.ReadAt(t.Context(), make([]byte, 10), 0)
		read <- err
	}()
	require.Eventually(t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.waits) == 1
	}, time.Minute, time.Millisecond)
	close(release)
	require.ErrorContains(t, <-filled, "away")
	require.NoError(t, <-read)
}

func TestReadingForwardTakesFewRequests(t *testing.T) {
	stream := testTar(t, 400)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	_, l := open(t, t.TempDir(), src, x)
	requireStream(t, l, stream)
	require.Less(t, src.requests.Load(), int64(len(x.Points))/2)
	require.Less(t, src.bytes.Load(), int64(len(src.blob))*5/4)
}

func TestSmallLayerIsFetchedWhole(t *testing.T) {
	stream := testTar(t, 5)
	src := &blobs{blob: gzipped(t, stream)}
	require.Less(t, len(src.blob), smallBlob)
	_, l := open(t, t.TempDir(), src, build(t, src.blob))
	_, err := l.ReadAt(t.Context(), make([]byte, 1), l.Size()-1)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return l.Fetched() == l.Size() }, time.Minute, time.Millisecond)
	requireStream(t, l, stream)
	require.EqualValues(t, 1, src.requests.Load())
}

// TestDiskForgets has a file end before what was stored in it: it is fetched again.
func TestDiskForgets(t *testing.T) {
	stream := testTar(t, 60)
	src := &blobs{blob: gzipped(t, stream)}
	x, dir := build(t, src.blob), t.TempDir()
	_, l := open(t, dir, src, x)
	requireStream(t, l, stream)
	last, _ := l.spanRange(l.spans - 1)
	require.NoError(t, os.Truncate(filepath.Join(dir, x.DiffID.Encoded(), dataFile), int64(last)+1))
	asked := src.requests.Load()
	p := make([]byte, 2*l.SpanSize()) // more than what is lost
	n, err := l.ReadAt(t.Context(), p, int64(last)-l.SpanSize())
	require.NoError(t, err)
	require.Equal(t, stream[int64(last)-l.SpanSize():], p[:n])
	require.Equal(t, asked+1, src.requests.Load())
	requireStream(t, l, stream)
	require.Equal(t, asked+1, src.requests.Load())
}

// TestDiskTakesNothing has a file that nothing can be written to, for another reason
// than want of room: readers are served, and a fill says what is wrong.
func TestDiskTakesNothing(t *testing.T) {
	stream := testTar(t, 60)
	src := &blobs{blob: gzipped(t, stream)}
	s, l := open(t, t.TempDir(), src, build(t, src.blob))
	readOnly, err := os.Open(l.data.Name())
	require.NoError(t, err)
	writable := l.data
	l.data = readOnly
	defer writable.Close()
	_, err = l.Fill(t.Context(), Fill{Want: l.All(), Bytes: 1 << 20, Pace: unpaced})
	require.ErrorIs(t, err, syscall.EBADF)
	require.NotErrorIs(t, err, ErrFull)
	p := make([]byte, 10)
	_, err = l.ReadAt(t.Context(), p, 1<<20)
	require.NoError(t, err)
	require.Equal(t, stream[1<<20:][:10], p)
	require.Eventually(t, func() bool { return s.used.Load() == 0 }, time.Minute, time.Millisecond) // the run goes on behind it
}

// TestRemovedWhileWritten removes a layer between the moments in which a span of it is
// written and counted.
func TestRemovedWhileWritten(t *testing.T) {
	stream := testTar(t, 60)
	_, l := open(t, t.TempDir(), away{}, build(t, gzipped(t, stream)))
	l.mu.Lock()
	l.removed = true // and data not closed yet
	l.mu.Unlock()
	require.ErrorIs(t, l.write(0, stream[:l.SpanSize()], false), os.ErrClosed)
	require.Zero(t, l.store.used.Load())
	require.Zero(t, l.counted)
}

// blamable is an answer that wants to know what became of it.
type blamable struct {
	io.Reader
	blamed *int
}

func (blamable) Close() error { return nil }
func (b blamable) Blame()     { *b.blamed++ }

// TestWrongBytesAreBlamed tells the source that it delivered something else.
func TestWrongBytesAreBlamed(t *testing.T) {
	stream := testTar(t, 5)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	blamed, wrong := 0, true
	_, l := open(t, t.TempDir(), fetcherFunc(func(_ context.Context, _ []string, _ digest.Digest, off, n int64) (io.ReadCloser, error) {
		b := src.blob[off : off+n]
		if wrong {
			b = make([]byte, n)
		}
		wrong = false
		return blamable{bytes.NewReader(b), &blamed}, nil
	}), x)
	requireStream(t, l, stream)
	require.Equal(t, 1, blamed)
}

// TestNothingIsLeft reads, fails, fills and closes, and finds as many
// goroutines and descriptors as before.
func TestNothingIsLeft(t *testing.T) {
	stream := testTar(t, 60)
	blob := gzipped(t, stream)
	x := build(t, blob)
	counts := func() []int {
		fds, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return []int{runtime.NumGoroutine(), len(fds)}
	}
	before := counts()
	for range 3 {
		src := &blobs{blob: blob}
		s, err := Open(t.Context(), Options{Dir: filepath.Join(t.TempDir(), "layers"), Fetch: src})
		require.NoError(t, err)
		require.NoError(t, s.Add("registry.example/repo:tag", x))
		l, err := s.Layer(x.DiffID)
		require.NoError(t, err)
		var wg sync.WaitGroup
		for i := range 64 {
			wg.Go(func() {
				ctx, cancel := context.WithCancel(t.Context())
				if i%8 == 0 {
					cancel()
				}
				_, _ = l.ReadAt(ctx, make([]byte, 100), 700<<10)
				cancel()
			})
		}
		wg.Wait()
		src.answer = func([]byte) ([]byte, error) { return nil, errors.New("away") }
		_, err = l.ReadAt(t.Context(), make([]byte, 100), l.Size()-100)
		require.Error(t, err)
		src.answer = nil
		fillAll(t, l, 1<<20)
		require.NoError(t, s.Close())
		_, err = l.ReadAt(t.Context(), make([]byte, 100), 0)
		require.Error(t, err)
	}
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		for i, now := range counts() {
			assert.LessOrEqual(c, now, before[i]+1-i, "the check is a goroutine itself")
		}
	}, time.Minute, 10*time.Millisecond)
}

func TestStreams(t *testing.T) {
	var s streams
	require.Zero(t, s.ahead(0, 4))
	s.went(0, 40)
	require.Equal(t, 5, s.ahead(42, 44), "a little was skipped")
	require.Zero(t, s.ahead(50, 54), "too much was skipped")
	s.went(42, 1000)
	require.Equal(t, aheadMost, s.ahead(1000, 1004))
	for i := range len(s.known) {
		s.went(5000+100*i, 5001+100*i)
	}
	require.Zero(t, s.ahead(1000, 1004), "the oldest is forgotten")
	require.False(t, slices.Contains(s.known[:], stream{}))
}

// TestIndexIsForgotten keeps no index in memory of what is not fetched.
func TestIndexIsForgotten(t *testing.T) {
	stream := testTar(t, 60)
	src := &blobs{blob: gzipped(t, stream)}
	x, dir := build(t, src.blob), t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s, l := open(t, dir, src, x)
		held := func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.index != nil
		}
		require.False(t, held())
		_, err := l.ReadAt(t.Context(), make([]byte, 1), 0)
		require.NoError(t, err)
		time.Sleep(indexIdle - time.Second)
		require.True(t, held())
		time.Sleep(2*upkeepPeriod + time.Second)
		require.False(t, held())
		requireStream(t, l, stream)
		require.NoError(t, s.Close())
	})
}
