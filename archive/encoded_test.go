package archive

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
)

// encodeAll has the layers encoded before they are written.
func encodeAll(tb testing.TB, img *Image) {
	tb.Helper()
	var enc IndexEncoder
	for i, l := range img.Layers {
		e, err := enc.Encode(l.Index)
		require.NoError(tb, err)
		img.Layers[i] = e.Layer()
	}
}

func encoded(tb testing.TB, l Layer) []byte {
	tb.Helper()
	var b bytes.Buffer
	e, err := new(IndexEncoder).Encode(l.Index)
	require.NoError(tb, err)
	require.NoError(tb, e.Write(&b))
	return b.Bytes()
}

func TestEncodedIndexIsTheSameArchive(t *testing.T) {
	testEncodedIndex(t, newImage(t, testStreams(t)...))
	testEncodedIndex(t, groupedImage(t))
}

func testEncodedIndex(t *testing.T, img *testImage) {
	t.Helper()
	want := write(t, &img.Image)
	encodeAll(t, &img.Image)
	require.True(t, bytes.Equal(want, write(t, &img.Image)))

	for i, l := range img.Layers { // as a cache has it
		b := encoded(t, l)
		e, err := ReadIndex(bytes.NewReader(b), int64(len(b)))
		require.NoError(t, err)
		require.Equal(t, l.Index, e.Index())
		img.Layers[i] = e.Layer()
	}
	require.True(t, bytes.Equal(want, write(t, &img.Image)))
}

// Sections of another index than the layer has by now are not written.
func TestEncodedIndexIsReplaced(t *testing.T) {
	img := smallImage(t)
	encodeAll(t, &img.Image)
	other := *img.Layers[0].Index
	other.Entries = other.Entries[:1]
	img.Layers[0].Index = &other
	got, err := readAll(write(t, &img.Image))
	require.NoError(t, err)
	require.Equal(t, &other, got.Layers[0])
}

func TestReadIndexDamaged(t *testing.T) {
	img := smallImage(t)
	b := encoded(t, img.Layers[0])
	for i := range b {
		for _, bad := range [][]byte{b[:i], append(append(bytes.Clone(b[:i]), b[i]^1), b[i+1:]...)} {
			e, err := ReadIndex(bytes.NewReader(bad), int64(len(bad)))
			if err == nil { // the version became a lower one, or a reserved byte another
				require.Equal(t, img.Layers[0].Index, e.Index(), "byte %d", i)
				require.GreaterOrEqual(t, i, len(b)-footerSize)
			}
		}
	}
	x := img.Layers[0].Index
	good := []section{{kindSpans, 0, x.AppendSpans(nil)}, {kindEntries, 0, x.AppendEntries(nil)}}
	for name, list := range map[string][]section{
		"no spans":          good[1:],
		"no entries":        good[:1],
		"spans malformed":   {{kindSpans, 0, []byte("spans")}, good[1]},
		"entries malformed": {good[0], {kindEntries, 0, []byte("entries")}},
	} {
		b := forge(t, list, nil)
		_, err := ReadIndex(bytes.NewReader(b), int64(len(b)))
		require.ErrorIs(t, err, ErrCorrupt, name)
	}
}
