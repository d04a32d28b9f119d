package inflate

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"reflect"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// index is what a builder learns from one pass over a stream.
type index struct {
	points []Point
	ends   []In // In at each multiple of step, and at the end
	step   int
}

// buildIndex reads s with seek points, also at some offsets, step bytes at a time.
func buildIndex(t testing.TB, s stream, interval Out, step int, at ...Out) index {
	t.Helper()
	x := index{step: step}
	z, err := NewReader(bytes.NewReader(s.gz), Options{Interval: interval, At: at, OnPoint: func(p Point) error {
		p.Window = bytes.Clone(p.Window)
		x.points = append(x.points, p)
		return nil
	}})
	require.NoError(t, err, s.name)
	require.Zero(t, z.In())
	buf := make([]byte, step)
	for off := 0; ; off += step {
		n, err := io.ReadFull(z, buf)
		require.True(t, bytes.Equal(s.data[off:off+n], buf[:n]), s.name)
		x.ends = append(x.ends, z.In())
		if err != nil {
			require.True(t, errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF), "%s: %v", s.name, err)
			require.Equal(t, Out(len(s.data)), z.Out())
			break
		}
	}
	return x
}

// dependsOn tells the plain way whether the output behind p depends on byte i
// of the full window: it alters that byte and looks whether the next WindowSize
// bytes differ.
func dependsOn(t *testing.T, s stream, p Point, i int) bool {
	t.Helper()
	start := max(0, int(p.Out)-WindowSize)
	p.Window = bytes.Clone(s.data[start:p.Out])
	p.Window[i] ^= 0xff
	z, err := Resume(bytes.NewReader(s.gz[p.In:]), p)
	require.NoError(t, err)
	end := min(len(s.data), int(p.Out)+WindowSize)
	got := make([]byte, end-int(p.Out))
	_, err = io.ReadFull(z, got)
	require.NoError(t, err)
	return !bytes.Equal(s.data[p.Out:end], got)
}

func TestPointsAreInOrder(t *testing.T) {
	for _, s := range streams(t) {
		for _, interval := range []Out{1, WindowSize + 1, 100_000} {
			x := buildIndex(t, s, interval, 64<<10)
			require.NotEmpty(t, x.points, s.name)
			require.Zero(t, x.points[0].Out, s.name)
			interval = max(interval, WindowSize)
			// The last candidate may be the best, which waits for a block or the end of a match.
			most := interval*5/4 + interval/4 + 2*WindowSize + 2*maxMatch
			for i, p := range x.points {
				require.LessOrEqual(t, p.Bit, uint8(7))
				require.LessOrEqual(t, len(p.State), MaxState)
				require.LessOrEqual(t, len(p.Window), WindowSize)
				if i == 0 {
					continue
				}
				gap := p.Out - x.points[i-1].Out
				require.GreaterOrEqual(t, gap, max(interval*3/4, WindowSize), s.name)
				require.Less(t, gap, most, s.name)
				require.GreaterOrEqual(t, p.In, x.points[i-1].In, s.name)
			}
			last := x.points[len(x.points)-1].Out
			require.Less(t, Out(len(s.data))-last, most, s.name)
		}
	}
}

// TestPointsAreCheap finds the one place far and wide that refers to nothing before it.
func TestPointsAreCheap(t *testing.T) {
	const interval, from, to = 1 << 20, 900 << 10, 1000 << 10
	rng := newRand(12)
	data := mixedData(rng, 3<<20)
	for i := from; i < to; i++ {
		data[i] = byte(rng.Uint32())
	}
	s := stream{"noise in the middle", stdGzip(t, 6, data), data}
	points := buildIndex(t, s, interval, 64<<10).points
	cheap := points[1]
	require.GreaterOrEqual(t, cheap.Out, Out(from))
	require.Less(t, cheap.Out, Out(to))
	require.LessOrEqual(t, wordsUsed(cheap.Window), enough)
	require.True(t, slices.ContainsFunc(points[2:], func(p Point) bool { return wordsUsed(p.Window) > enough }), "it is not like this everywhere")
}

// TestPointsAt has points close before the offsets that are asked for.
func TestPointsAt(t *testing.T) {
	exact, inBlock := 0, 0
	for _, s := range streams(t) {
		rng := newRand(11)
		var at []Out
		for off := Out(rng.IntN(50_000)); off < Out(len(s.data)); off += Out(rng.IntN(200_000)) {
			at = append(at, off)
		}
		points := buildIndex(t, s, 300_000, 97_003, at...).points
		require.True(t, reflect.DeepEqual(points, buildIndex(t, s, 300_000, 1<<20, at...).points), s.name)
		for _, off := range at {
			i, found := slices.BinarySearchFunc(points, off, func(p Point, off Out) int { return cmp.Compare(p.Out, off) })
			if !found {
				i--
			}
			require.GreaterOrEqual(t, i, 0)
			far := off - points[i].Out
			require.LessOrEqual(t, far, Out(WindowSize+2*maxMatch), s.name)
			if far <= maxMatch {
				exact++
			}
		}
		for i, p := range points {
			if i > 0 {
				require.GreaterOrEqual(t, p.Out-points[i-1].Out, Out(WindowSize), s.name)
			}
			if len(p.State) > 0 {
				inBlock++
			}
			z, err := Resume(bytes.NewReader(s.gz[p.In:]), p)
			require.NoError(t, err, s.name)
			data, err := io.ReadAll(z)
			require.NoError(t, err, "%s at %d", s.name, p.Out)
			require.True(t, bytes.Equal(s.data[p.Out:], data), "%s at %d", s.name, p.Out)
		}
	}
	require.Greater(t, exact, 20)
	require.Greater(t, inBlock, 20)
}

// TestPointsDoNotDependOnReads reads in small and large pieces.
func TestPointsDoNotDependOnReads(t *testing.T) {
	for _, s := range streams(t) {
		want := buildIndex(t, s, 40_000, 1<<20).points
		for _, step := range []int{97, 4096, 100_003} {
			require.True(t, reflect.DeepEqual(want, buildIndex(t, s, 40_000, step).points), s.name)
		}
	}
}

func TestResume(t *testing.T) {
	inBlock, atBit, stored, sparse := 0, 0, 0, 0
	for _, s := range streams(t) {
		var at []Out // else there are few points inside blocks, and none inside stored ones
		for off := Out(40_000); off < Out(len(s.data)); off += 77_777 {
			at = append(at, off)
		}
		for _, interval := range []Out{WindowSize, WindowSize + 7777} {
			for _, p := range buildIndex(t, s, interval, 64<<10, at...).points {
				z, err := Resume(bytes.NewReader(s.gz[p.In:]), p)
				require.NoError(t, err, s.name)
				require.Equal(t, p.Out, z.Out())
				require.Equal(t, p.In, z.In())
				data, err := io.ReadAll(z)
				require.NoError(t, err, "%s at %d", s.name, p.Out)
				require.True(t, bytes.Equal(s.data[p.Out:], data), "%s at %d", s.name, p.Out)
				require.Equal(t, Out(len(s.data)), z.Out())
				if len(p.State) > 0 {
					inBlock++
					if p.State[0]>>1 == typeStored {
						stored++
					}
				}
				if p.Bit > 0 {
					atBit++
				}
				if len(p.Window) > 0 && bytes.IndexByte(p.Window, 0) > 0 {
					sparse++
				}
			}
		}
	}
	// The cases that matter did occur.
	for _, n := range []int{inBlock, atBit, stored, sparse} {
		require.Greater(t, n, 20)
	}
}

// TestWindow checks byte by byte that a window has just what is needed.
func TestWindow(t *testing.T) {
	kept, dropped := 0, 0
	for _, s := range streams(t) {
		rng := newRand(7)
		for _, p := range buildIndex(t, s, 50_000, 64<<10).points {
			full := s.data[max(0, p.Out-WindowSize):p.Out]
			missing := len(full) - len(p.Window)
			require.GreaterOrEqual(t, missing, 0)
			for range 40 {
				if len(full) == 0 {
					break
				}
				i := rng.IntN(len(full))
				in := i >= missing && p.Window[i-missing] != 0
				if in {
					require.Equal(t, full[i], p.Window[i-missing])
				}
				if full[i] == 0 {
					continue // in or not looks the same
				}
				require.Equal(t, dependsOn(t, s, p, i), in, "%s: point at %d, byte %d", s.name, p.Out, i)
				if in {
					kept++
				} else {
					dropped++
				}
			}
			if len(p.Window) > 0 {
				require.True(t, full[missing] == 0 || dependsOn(t, s, p, missing), "%s: window not trimmed", s.name)
			}
		}
	}
	require.Greater(t, kept, 100)
	require.Greater(t, dropped, 100)
}

// TestInIsExact checks In from both sides: its bytes are enough, and one less
// is not.
func TestInIsExact(t *testing.T) {
	for _, s := range streams(t) {
		const step = 60_007
		for i, in := range buildIndex(t, s, WindowSize, step).ends {
			out := min(len(s.data), (i+1)*step)
			require.GreaterOrEqual(t, decodable(t, s.gz[:in]), out, s.name)
			if in > 0 {
				require.Less(t, decodable(t, s.gz[:in-1]), out, s.name)
			}
		}
	}
}

// decodable returns how much of a truncated stream can be decoded.
func decodable(t *testing.T, gz []byte) int {
	t.Helper()
	z, err := NewReader(bytes.NewReader(gz), Options{})
	if err != nil {
		require.ErrorIs(t, err, ErrCorrupt)
		return 0
	}
	data, err := io.ReadAll(z)
	if err != nil {
		require.ErrorIs(t, err, ErrCorrupt)
	}
	return len(data)
}

// TestSpan decodes spans from just the bytes that an index says they need.
func TestSpan(t *testing.T) {
	for _, s := range streams(t) {
		const step = 32 << 10
		x := buildIndex(t, s, 64<<10, step)
		var z Reader
		buf := make([]byte, step)
		at := 0
		for i, end := range x.ends {
			from, to := min(len(s.data), i*step), min(len(s.data), (i+1)*step)
			for at+1 < len(x.points) && int(x.points[at+1].Out) <= from {
				at++
			}
			p := x.points[at]
			if from == to {
				continue
			}
			require.NoError(t, z.ResetAt(bytes.NewReader(s.gz[p.In:end]), p))
			_, err := io.CopyN(io.Discard, &z, int64(from-int(p.Out)))
			require.NoError(t, err, s.name)
			_, err = io.ReadFull(&z, buf[:to-from])
			require.NoError(t, err, s.name)
			require.True(t, bytes.Equal(s.data[from:to], buf[:to-from]), s.name)
			require.Equal(t, end, z.In(), s.name)
		}
	}
}
