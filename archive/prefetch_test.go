package archive

import (
	"bytes"
	"encoding/binary"
	"math"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// recordedImage has a list that goes to and fro between layers and spans.
func recordedImage(tb testing.TB) *testImage {
	img := newImage(tb, testStreams(tb)...)
	img.Prefetch = &Prefetch{
		Recorded: time.Unix(1700000000, 0).UTC(),
		Spans:    []SpanRange{{2, 5, 3}, {0, 0, 1}, {2, 0, 2}, {1, 0, 1}, {2, 20, 1}},
	}
	return img
}

func TestPrefetch(t *testing.T) {
	img := recordedImage(t)
	b := write(t, &img.Image)
	require.Equal(t, b, write(t, &recordedImage(t).Image), "equal images give equal bytes")
	a, err := open(b)
	require.NoError(t, err)
	got, err := a.Prefetch()
	require.NoError(t, err)
	require.Equal(t, img.Prefetch, got)

	again, err := a.Image()
	require.NoError(t, err)
	require.Equal(t, b, write(t, again), "an archive is written again as it was")
	again.Prefetch = nil
	b = write(t, again)
	require.Equal(t, write(t, &newImage(t, testStreams(t)...).Image), b)
	a, err = open(b)
	require.NoError(t, err)
	got, err = a.Prefetch()
	require.NoError(t, err)
	require.Nil(t, got)
}

func TestImageKeepsReasons(t *testing.T) {
	img := newImage(t, testStreams(t)...)
	img.Layers[1] = Layer{Reason: "zstd compression"}
	b := write(t, &img.Image)
	a, err := open(b)
	require.NoError(t, err)
	again, err := a.Image()
	require.NoError(t, err)
	require.Equal(t, b, write(t, again))
}

func TestPrefetchInvalid(t *testing.T) {
	for _, c := range []struct {
		want  string
		spans []SpanRange
	}{
		{"layer 3, which has no index", []SpanRange{{3, 0, 1}}},
		{"layer -1", []SpanRange{{-1, 0, 1}}},
		{"[0, 0)", []SpanRange{{0, 0, 0}}},
		{"[-1, 0)", []SpanRange{{0, -1, 1}}},
		{"[1000, 1001)", []SpanRange{{0, 1000, 1}}},
		{"spans", []SpanRange{{2, 1, math.MaxInt}}},
		{"span 6 of layer 2 twice", []SpanRange{{2, 5, 3}, {2, 6, 1}}},
		{"65537 ranges", make([]SpanRange, maxPrefetch+1)},
	} {
		img := newImage(t, testStreams(t)...)
		img.Prefetch = &Prefetch{Spans: c.spans}
		_, err := WriteFile(filepath.Join(t.TempDir(), "x.clip"), &img.Image)
		require.ErrorContains(t, err, c.want)
	}
}

// list encodes numbers as they come.
func list(numbers ...uint64) (b []byte) {
	for _, n := range numbers {
		b = binary.AppendUvarint(b, n)
	}
	return b
}

func TestDecodePrefetch(t *testing.T) {
	p, err := decodePrefetch(list(7, 2, 1, 8, 3, 1, 1, 1), 2) // zigzag: 8 is 4, 1 is -1
	require.NoError(t, err)
	require.Equal(t, &Prefetch{Recorded: time.Unix(7, 0).UTC(), Spans: []SpanRange{{1, 4, 3}, {1, 6, 1}}}, p)
	for _, c := range []struct {
		want   string
		layers int
		b      []byte
	}{
		{"time", 1, nil},
		{"time", 1, list(math.MaxUint64)},
		{"number of ranges", 1, list(0)},
		{"number of ranges", 1, list(0, 1)},
		{"number of ranges", 1, list(0, math.MaxUint64, 0, 0, 1)},
		{"number of ranges", 1, append(list(0, maxPrefetch+1), make([]byte, 4*maxPrefetch)...)},
		{"no layers", 0, list(0, 1, 0, 0, 1)},
		{"a layer that the image does not have", 1, list(0, 1, 1, 0, 1)},
		{"first span", 1, append(list(0, 1, 0), 0x80, 0x80)},
		{"span -1", 1, list(0, 1, 0, 1, 1)},
		{"span", 1, list(0, 1, 0, math.MaxUint64, 1)},
		{"an empty range", 1, list(0, 1, 0, 0, 0)},
		{"number of spans", 1, list(0, 1, 0, 0, math.MaxUint64)},
		{"1 bytes too many", 1, list(0, 1, 0, 0, 1, 0)},
	} {
		_, err := decodePrefetch(c.b, c.layers)
		require.ErrorIs(t, err, ErrCorrupt, c.want)
		require.ErrorContains(t, err, c.want)
	}
}

func FuzzPrefetch(f *testing.F) {
	f.Add(recordedImage(f).Prefetch.append(nil), 3)
	f.Add(list(0, 1, 0, math.MaxUint64, 1), 1)
	f.Add(list(math.MaxUint64), 0)
	f.Fuzz(func(t *testing.T, b []byte, layers int) {
		p, err := decodePrefetch(b, max(layers, 0))
		if err != nil {
			require.ErrorIs(t, err, ErrCorrupt)
			return
		}
		require.LessOrEqual(t, len(p.Spans), maxPrefetch)
		for _, r := range p.Spans {
			require.True(t, r.Layer >= 0 && r.Layer < layers && r.First >= 0 && r.Count > 0 && r.End() > r.First)
		}
		again, err := decodePrefetch(p.append(nil), layers)
		require.NoError(t, err)
		require.Equal(t, p, again)
		if len(p.append(nil)) == len(b) {
			require.True(t, bytes.Equal(b, p.append(nil)))
		}
	})
}
