package cache

import (
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// arrived waits until nothing of the layer is under way.
func arrived(t *testing.T, l *Layer) {
	t.Helper()
	require.Eventually(t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.runs) == 0
	}, 10*time.Second, time.Millisecond)
}

// TestWhatLiesNearby comes along with what is read, as far as it is worth a request.
func TestWhatLiesNearby(t *testing.T) {
	stream := testTar(t, 200)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	_, l := open(t, t.TempDir(), src, x)
	const at = 8 << 20
	_, err := l.ReadAt(t.Context(), make([]byte, 10), at)
	require.NoError(t, err)
	arrived(t, l)
	start, next := x.DecodeRange(at)
	require.Less(t, int64(next-start), int64(leastRun*2/3), "otherwise this shows nothing")
	require.GreaterOrEqual(t, l.Fetched(), int64(leastRun-x.SpanSize))
	require.LessOrEqual(t, l.Fetched(), int64(leastRun+x.SpanSize))
	_, err = l.ReadAt(t.Context(), make([]byte, 10), int64(start)+leastRun-2*int64(x.SpanSize))
	require.NoError(t, err)
	require.EqualValues(t, 1, src.requests.Load())
}

// TestNothingComesAlongInVain reads a layer here and there: nothing comes along any
// more, until it is read again what does.
func TestNothingComesAlongInVain(t *testing.T) {
	stream := testTar(t, 400)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	_, l := open(t, t.TempDir(), src, x)
	read := func(off int64) (fetched int64) {
		before := l.Fetched()
		_, err := l.ReadAt(t.Context(), make([]byte, 10), off)
		require.NoError(t, err)
		arrived(t, l)
		return l.Fetched() - before
	}
	const apart = 6 << 20
	var off int64
	for ; l.guesses.good(); off += apart {
		require.Less(t, off, l.Size(), "it is never judged")
		require.Greater(t, read(off), int64(leastRun*2/3))
	}
	require.LessOrEqual(t, read(off), int64(2*256<<10), "to the next seek point, and no farther")
	_, err := io.Copy(io.Discard, io.NewSectionReader(readerAt{t, l}, 0, off))
	require.NoError(t, err)
	require.True(t, l.guesses.good())
}

// readerAt is a layer as an io.ReaderAt.
type readerAt struct {
	t *testing.T
	l *Layer
}

func (r readerAt) ReadAt(p []byte, off int64) (int, error) { return r.l.ReadAt(r.t.Context(), p, off) }

func TestGuesses(t *testing.T) {
	var g guesses
	g.touch(3)
	for i := range guessesTried {
		require.True(t, g.good())
		g.add(i, guessesTried)
	}
	require.False(t, g.good())
	for i := range guessesTried / guessesKept {
		require.False(t, g.good())
		g.touch(i)
		g.touch(i) // counts once
	}
	require.True(t, g.good())
	for range 3 * guessesMost {
		g.add(0, guessesTried)
	}
	require.LessOrEqual(t, g.brought, guessesMost, "what was long ago counts less")
	require.False(t, g.good())
}
