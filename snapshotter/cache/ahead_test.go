package cache

import (
	"bytes"
	"io"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// arrived waits until nothing of the layer is under way.
func arrived(t *testing.T, l *Layer) {
	t.Helper()
	require.Eventually(t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.runs) == 0
	}, time.Minute, time.Millisecond)
}

// TestWhatLiesNearby comes along with what is read, as far as it is worth a request,
// and to where another one can go on.
func TestWhatLiesNearby(t *testing.T) {
	stream := testTar(t, 200)
	src := &blobs{blob: gzipped(t, stream)}
	const distance = 768 << 10
	x, err := layer.Build(t.Context(), bytes.NewReader(src.blob), ocispec.Descriptor{
		Digest: digest.FromBytes(src.blob), Size: int64(len(src.blob)),
	}, layer.Options{SpanSize: 64 << 10, PointInterval: distance})
	require.NoError(t, err)
	_, l := open(t, t.TempDir(), src, x)
	read := func(off int64) {
		_, err := l.ReadAt(t.Context(), make([]byte, 10), off)
		require.NoError(t, err)
		arrived(t, l)
	}
	const at = 8 << 20
	read(at)
	require.GreaterOrEqual(t, l.Fetched(), int64(leastRun-x.SpanSize))
	require.LessOrEqual(t, l.Fetched(), int64(leastRun+distance*5/4))
	start, _ := x.DecodeRange(at)
	for off := int64(start); l.Fetched() < 12<<20; off += int64(x.SpanSize) {
		read(off)
	}
	require.Less(t, src.requests.Load(), int64(10))
	share := float64(len(src.blob)) / float64(len(stream)) // it is about the same everywhere
	require.Less(t, float64(src.bytes.Load()), float64(l.Fetched())*share*1.06, "little is decoded twice")
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
