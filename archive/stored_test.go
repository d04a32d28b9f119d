package archive

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// TestStored fetches pieces of what is stored in a zstd frame.
func TestStored(t *testing.T) {
	dec, err := zstd.NewReader(nil)
	require.NoError(t, err)
	defer dec.Close()
	for _, size := range []int{1, storedBlock - 1, storedBlock, storedBlock + 1, 3*storedBlock + 17} {
		content := make([]byte, size)
		for i := range content {
			content[i] = byte(rand.Uint32())
		}
		blob, err := appendStored([]byte("before"), bytes.NewReader(content), int64(size))
		require.NoError(t, err)
		whole, err := dec.DecodeAll(blob[len("before"):], nil)
		require.NoError(t, err)
		require.True(t, bytes.Equal(content, whole))
		for range 200 {
			start := rand.IntN(size)
			off := rand.IntN(size - start)
			n := 1 + rand.IntN(size-start-off)
			p := Place{In: int64(len("before")), Off: int64(start)}
			in, length := p.Range(int64(off), int64(n))
			piece := bytes.Clone(blob[in : in+length])
			got, err := p.Cut(piece, int64(off), int64(n))
			require.NoError(t, err)
			require.True(t, bytes.Equal(content[start+off:][:n], got))
			_, err = p.Cut(piece[1:], int64(off), int64(n))
			require.ErrorIs(t, err, ErrCorrupt)
		}
	}
	_, err = appendStored(nil, bytes.NewReader([]byte("short")), 6)
	require.Error(t, err)
}

func TestPlaceValidate(t *testing.T) {
	good := Place{Blob: digest.FromString("x"), In: 5, Off: 7}
	require.NoError(t, good.Validate())
	for _, bad := range []Place{{}, {Blob: "sha256:1"}, {Blob: good.Blob, In: -1}, {Blob: good.Blob, Off: -1}, {Blob: good.Blob, In: maxPlace + 1}, {Blob: good.Blob, Off: maxPlace + 1}} {
		require.Error(t, bad.Validate())
	}
}

// TestWindowsElsewhere opens an archive without its windows, and finds them in the compressed one.
func TestWindowsElsewhere(t *testing.T) {
	img := groupedImage(t)
	raw := write(t, &img.Image)
	a, err := open(raw)
	require.NoError(t, err)
	_, ok := a.Place(0)
	require.False(t, ok, "they are in the archive")
	blob, parts, err := a.Compress()
	require.NoError(t, err)
	require.Greater(t, parts.Windows.In, int64(clipHeaderSize))
	require.Equal(t, parts.Spans.Digest, digest.FromBytes(blob[parts.Spans.In:parts.Rest.In]))
	got, ok := PartsOf(map[string]string{AnnotationParts: string(marshal(t, parts))}, int64(len(blob)))
	require.True(t, ok)
	require.Equal(t, parts, got)
	dec, err := zstd.NewReader(nil)
	require.NoError(t, err)
	defer dec.Close()
	whole, err := dec.DecodeAll(blob, nil)
	require.NoError(t, err)
	require.True(t, bytes.Equal(raw, whole))

	id := digest.FromBytes(blob)
	tail := bytes.Clone(raw)
	clear(tail[:parts.Spans.Out])
	late, err := OpenTail(bytes.NewReader(tail), int64(len(tail)))
	require.NoError(t, err)
	_, err = late.Layer(0)
	require.ErrorIs(t, err, ErrCorrupt, "nobody said that its windows are elsewhere")
	late.WindowsIn(id, parts)
	for i := range a.DiffIDs() {
		want, err := a.Layer(i)
		require.NoError(t, err)
		require.NoError(t, want.CheckWindows())
		x, err := late.Layer(i)
		require.NoError(t, err)
		require.Nil(t, x.Windows)
		place, ok := late.Place(i)
		require.Equal(t, len(want.Groups) > 0, ok)
		for g, group := range x.Groups {
			require.Equal(t, id, place.Blob)
			in, n := place.Range(group.Off, group.Len)
			frame, err := place.Cut(bytes.Clone(blob[in:in+n]), group.Off, group.Len)
			require.NoError(t, err)
			require.NoError(t, x.VerifyGroup(g, frame))
		}
		x.Windows = want.Windows
		require.Equal(t, want, x)
	}
	// It cannot be written again without them.
	again, err := late.Image()
	require.NoError(t, err)
	_, err = Write(io.Discard, again)
	require.ErrorContains(t, err, "lacks its windows")

	bad := parts
	bad.Windows.Out++
	late.WindowsIn(id, bad)
	_, ok = late.Place(0)
	require.False(t, ok)
	bad = parts
	bad.Windows.Out--
	late.WindowsIn(id, bad)
	_, ok = late.Place(0)
	require.True(t, ok, "the group's digest tells whether it is right")
	late.s.table = append(late.s.table, late.s.table...)
	_, ok = late.Place(0)
	require.False(t, ok, "sections of windows overlap")
	bad = parts
	bad.Spans.Out = bad.Windows.Out
	late.WindowsIn(id, bad)
	_, ok = late.Place(0)
	require.False(t, ok)
}

// TestBorders tells the parts of archives whose sections stand in other orders, too.
func TestBorders(t *testing.T) {
	const size = 100
	at := func(kind uint32, off uint64) record { return record{Kind: kind, Offset: off, Stored: 10} }
	for name, c := range map[string]struct {
		table                []record
		windows, spans, rest int64
	}{
		"as written":          {[]record{at(kindWindows, 10), at(kindWindows, 20), at(kindSpans, 30), at(kindPoints, 40), at(kindInfo, 50)}, 10, 30, 50},
		"no windows":          {[]record{at(kindSpans, 30), at(kindSpans, 40), at(kindInfo, 50), at(kindEntries, 60)}, 30, 30, 50},
		"no spans":            {[]record{at(kindInfo, 50)}, 50, 50, 50},
		"spans are not first": {[]record{at(kindInfo, 10), at(kindSpans, 20), at(kindEntries, 30)}, 10, 10, 10},
		"windows among spans": {[]record{at(kindSpans, 10), at(kindWindows, 20), at(kindSpans, 30), at(kindInfo, 40)}, 10, 10, 40},
		"windows are last":    {[]record{at(kindSpans, 10), at(kindInfo, 20), at(kindWindows, 30)}, 10, 10, 20},
	} {
		windows, spans, rest := (&sections{size: size, table: c.table}).borders()
		require.Equal(t, []int64{c.windows, c.spans, c.rest}, []int64{windows, spans, rest}, name)
	}
}

// TestWindowsDamaged has windows that are not those that the points are of.
func TestWindowsDamaged(t *testing.T) {
	img := groupedImage(t)
	x := img.Layers[0].Index
	list := []section{{kindSpans, 0, x.AppendSpans(nil)}, {kindPoints, 0, x.AppendPoints(nil)}, {kindEntries, 0, x.AppendEntries(nil)}}
	for name, c := range map[string][]section{
		"no windows":       list,
		"points malformed": {list[0], {kindPoints, 0, []byte("points")}, list[2]},
		"other windows":    append(list, section{kindWindows, 0, x.Windows[1:]}),
		"windows of none":  {list[0], list[2], {kindWindows, 0, x.Windows}},
	} {
		b := forge(t, c, nil)
		_, err := ReadIndex(bytes.NewReader(b), int64(len(b)))
		require.ErrorIs(t, err, ErrCorrupt, name)
	}
	// An earlier program reads the layer without the points: fewer, but all that it needs.
	old, err := layer.DecodeSpans(x.AppendSpans(nil))
	require.NoError(t, err)
	require.Equal(t, x.Spans, old.Spans)
	require.Less(t, len(old.Points), len(x.Points))
}
