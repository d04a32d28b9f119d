package cache

import (
	"io"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// asked are the ranges of a blob that were asked for.
type asked struct {
	*blobs
	mu     sync.Mutex // guards the fields below
	ranges [][2]int64 // offset and end
}

func newAsked(blob []byte) *asked {
	a := &asked{blobs: &blobs{blob: blob}}
	a.wrap = func(r io.Reader, off, n int64) io.Reader {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.ranges = append(a.ranges, [2]int64{off, off + n})
		return r
	}
	return a
}

func (a *asked) last() (from, end int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.ranges[len(a.ranges)-1]
	return r[0], r[1]
}

// paused returns a layer of which a run has brought what lies before a span that is
// between two seek points, and the registry that was asked for it.
func paused(t *testing.T, blob []byte) (l *Layer, src *asked, x *layer.Index, span int) {
	t.Helper()
	src, x = newAsked(blob), build(t, blob)
	_, l = open(t, t.TempDir(), src, x)
	for span = 100; span < l.spans; span++ {
		start, _ := l.spanRange(span)
		if decoded, _ := x.DecodeRange(start); l.head.SpanAt(decoded) < span-1 && x.Spans[span].InEnd-x.Spans[span-1].InEnd > 1<<10 {
			break
		}
	}
	fillSpans(t, l, span-1, span)
	return l, src, x, span
}

func fillSpans(t *testing.T, l *Layer, first, end int) {
	t.Helper()
	done, err := l.Fill(t.Context(), Fill{Want: []Spans{{first, end}}, Bytes: 1, Expected: true, Pace: unpaced})
	require.NoError(t, err)
	require.Positive(t, done.Bytes)
}

// requireSpan reads a span.
func requireSpan(t *testing.T, l *Layer, stream []byte, span int) {
	t.Helper()
	start, end := l.spanRange(span)
	got := make([]byte, end-start)
	_, err := l.ReadAt(t.Context(), got, int64(start))
	require.NoError(t, err)
	require.Equal(t, stream[start:end], got)
	arrived(t, l)
}

// TestRunsGoOn asks for a byte that was fetched before, and for no more.
func TestRunsGoOn(t *testing.T) {
	stream := testTar(t, 200)
	for _, gap := range []int{0, 1} {
		l, src, _, span := paused(t, gzipped(t, stream))
		_, end := src.last()
		fillSpans(t, l, span+gap, span+gap+1)
		from, _ := src.last()
		require.GreaterOrEqual(t, from, end-1)
		require.LessOrEqual(t, from, end)
		l.mu.Lock()
		require.True(t, l.have.get(span), "what lies between the pause and what is wanted comes along")
		require.NotContains(t, l.paused, span)
		l.mu.Unlock()
		requireSpan(t, l, stream, span)
		requireSpan(t, l, stream, span+gap)
		requireStream(t, l, stream)
		require.Empty(t, l.paused, "there is nothing to go on with")
	}
}

// TestNoPause has layers in which a run cannot go on where another has ended.
func TestNoPause(t *testing.T) {
	stream := testTar(t, 60)
	_, l := open(t, t.TempDir(), newAsked(stream), build(t, stream))
	requireSpan(t, l, stream, 3)
	require.Nil(t, l.paused)
	require.False(t, l.pauses())
}

// TestPauseIsGone decodes from a seek point again when what was decoded is not there
// any more.
func TestPauseIsGone(t *testing.T) {
	stream := testTar(t, 200)
	l, src, x, span := paused(t, gzipped(t, stream))
	l.mu.Lock()
	l.have.clear(span - 1)
	l.mu.Unlock()
	l.punch([]int{span - 1})
	requireSpan(t, l, stream, span)
	start, _ := l.spanRange(span)
	p, err := x.SeekPoint(start)
	require.NoError(t, err)
	from, _ := src.last()
	require.Equal(t, int64(p.In), from)
}

// TestPauseOnADiskThatFails has what decoding refers to altered on disk: it is no
// source's fault, and readers get what is right.
func TestPauseOnADiskThatFails(t *testing.T) {
	stream := testTar(t, 200)
	l, src, x, span := paused(t, gzipped(t, stream))
	start, _ := l.spanRange(span)
	_, err := l.data.WriteAt(make([]byte, 30<<10), int64(start)-30<<10)
	require.NoError(t, err)
	blamed := 0
	wrap := src.wrap
	src.wrap = func(r io.Reader, off, n int64) io.Reader {
		return struct {
			io.Reader
			blamable
		}{wrap(r, off, n), blamable{blamed: &blamed}}
	}
	requests := src.requests.Load()
	requireSpan(t, l, stream, span)
	require.Equal(t, requests+2, src.requests.Load(), "behind the pause, and then from a seek point")
	require.Zero(t, blamed)
	p, err := x.SeekPoint(start)
	require.NoError(t, err)
	from, _ := src.last()
	require.Equal(t, int64(p.In), from)
}
