package layer_test

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

func TestVerifySpan(t *testing.T) {
	data := mixed(t)
	x := mustBuild(t, data)
	bad := func(what string, i int, b []byte) {
		t.Helper()
		require.ErrorIs(t, x.VerifySpan(i, b), layer.ErrMismatch, "span %d: %s", i, what)
	}
	for i := range x.Spans {
		start, end := x.SpanRange(i)
		span := slices.Clone(data[start:end])
		require.NoError(t, x.VerifySpan(i, span))
		for _, at := range []int{0, 1, len(span) / 2, len(span) - 1} {
			bad("altered", i, altered(span, at))
		}
		bad("empty", i, nil)
		bad("short", i, span[:len(span)-1])
		bad("long", i, append(span, 0))
		moved := append(span[1:len(span):len(span)], span[0])
		if !slices.Equal(moved, span) {
			bad("moved", i, moved)
		}
		if next := (i + 1) % (len(x.Spans) - 1); i < len(x.Spans)-1 {
			a, b := x.SpanRange(next)
			if !slices.Equal(data[a:b], span) {
				bad("another span", i, data[a:b])
			}
		}
	}
	// A digest that was altered fails its own span and the next.
	x.Spans[3].Digest[9]++
	for i := range 6 {
		start, end := x.SpanRange(i)
		require.Equal(t, i == 3 || i == 4, x.VerifySpan(i, data[start:end]) != nil, "span %d", i)
	}
}

// Equal content gets different digests: they depend on what is before.
func TestSpansChain(t *testing.T) {
	x := mustBuild(t, make([]byte, 64<<10))
	seen := map[[32]byte]bool{}
	for _, s := range x.Spans {
		require.False(t, seen[s.Digest])
		seen[s.Digest] = true
	}
	require.Len(t, seen, 16)
}

func TestSeekPointBadWindow(t *testing.T) {
	x := mustBuild(t, blobs(t, mixed(t))["gzip6"])
	bomb := mustBuild(t, blobs(t, mixed(t))["gzip6"])
	require.Greater(t, len(x.Points), 2)
	for i := 1; i < len(x.Points); i++ {
		p := x.Points[i]
		if len(p.Window) == 0 {
			continue
		}
		x.Points[i].Window = p.Window[:len(p.Window)/2]
		_, err := x.SeekPoint(p.Out)
		require.Error(t, err)
		bomb.Points[i].Window = zstdFrame(t, make([]byte, inflate.WindowSize+1))
		_, err = bomb.SeekPoint(p.Out)
		require.Error(t, err)
		bomb.Points[i].Window = zstdFrame(t, make([]byte, 64<<20))
		_, err = bomb.SeekPoint(p.Out)
		require.Error(t, err)
	}
}
