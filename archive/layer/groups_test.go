package layer_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"reflect"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// grouped is a layer that has several groups of windows.
func grouped(tb testing.TB) (x *layer.Index, blob, data []byte) {
	tb.Helper()
	var files []testimage.File
	for i := range 17 {
		files = append(files, testimage.Reg(fmt.Sprint("file", i), testimage.Content(uint64(i), 70_000)))
	}
	data = testimage.Tar(tb, files...)
	blob = testimage.Gzip(tb, 6, data)
	x = mustBuild(tb, blob)
	require.Greater(tb, len(x.Groups), 1)
	return x, blob, data
}

func decoded(tb testing.TB, x *layer.Index) *layer.Index {
	tb.Helper()
	y, err := layer.DecodeSpans(x.AppendSpans(nil))
	require.NoError(tb, err)
	require.NoError(tb, y.DecodePoints(x.AppendPoints(nil)))
	return y
}

// TestGroups reads a layer with its windows, group by group, and without.
func TestGroups(t *testing.T) {
	x, blob, data := grouped(t)
	check(t, x, blob, data)
	require.NoError(t, x.CheckWindows())
	require.Len(t, x.Windows, int(x.WindowsSize()))

	y := decoded(t, x)
	require.Equal(t, x.Points, y.Points)
	require.Equal(t, x.Groups, y.Groups)
	require.ErrorIs(t, y.CheckWindows(), layer.ErrMismatch)
	members := make([]int, len(x.Groups))
	for _, p := range x.Points[1:] {
		group, ok := y.GroupAt(p.Out)
		want, err := x.SeekPoint(p.Out)
		require.NoError(t, err)
		bare := want
		bare.Window = nil
		require.Equal(t, bare, y.SeekPointWithout(p.Out))
		if !ok {
			got, err := y.SeekPoint(p.Out)
			require.NoError(t, err)
			require.Equal(t, want, got)
			continue
		}
		members[group]++
		g := y.Groups[group]
		got, err := y.SeekPointIn(p.Out, x.Windows[g.Off:g.Off+g.Len])
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	for _, n := range members {
		require.Equal(t, 15, n)
	}
	farthest := inflate.Out(0)
	for i := 0; i < len(y.Spans); i += 7 {
		start, end := y.SpanRange(i)
		p, err := y.SeekPoint(start)
		require.NoError(t, err)
		farthest = max(farthest, start-p.Out)
		var b bytes.Buffer
		require.NoError(t, y.Copy(t.Context(), &b, start, int64(end-start), func(_ context.Context, off, n inflate.In) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(blob[off:][:n])), nil
		}))
		require.True(t, bytes.Equal(data[start:end], b.Bytes()))
	}
	require.Greater(t, farthest, small.PointInterval, "it starts farther ahead")

	z := x.WithoutGroups()
	require.True(t, bytes.Equal(x.AppendSpans(nil), z.AppendSpans(nil)))
	require.Less(t, len(z.Points), len(x.Points)/2)
	require.Zero(t, z.WindowsSize())
	require.Equal(t, z, z.WithoutGroups())
	first := x.Reachable(func(group int) bool { return group == 0 })
	require.Len(t, first.Points, len(z.Points)+15)
	require.Equal(t, x.Groups, first.Groups)
}

// TestGroupsDamaged has windows that are not what the index is of.
func TestGroupsDamaged(t *testing.T) {
	x, _, _ := grouped(t)
	off := x.Points[len(x.Points)-1].Out
	for _, p := range x.Points {
		if _, ok := x.GroupAt(p.Out); ok {
			off = p.Out
			break
		}
	}
	good := x.Windows[:x.Groups[0].Len]
	for i := 0; i < len(good); i += 101 {
		bad := bytes.Clone(good)
		bad[i]++
		require.ErrorIs(t, x.VerifyGroup(0, bad), layer.ErrMismatch)
	}
	_, err := x.SeekPointIn(off, good[1:])
	require.ErrorIs(t, err, layer.ErrMismatch)

	// What has the digest may still be nonsense.
	for name, frame := range map[string][]byte{
		"no frame":     []byte("frame"),
		"empty":        {},
		"short":        zstdFrame(t, make([]byte, 10)),
		"large":        zstdFrame(t, make([]byte, 64<<20)),
		"cut":          good[:len(good)-1],
		"without data": zstdFrame(t, nil),
	} {
		y := *x
		y.Groups = []layer.Group{{Len: int64(len(frame)), Digest: sha256.Sum256(frame)}}
		_, err := y.SeekPointIn(off, frame)
		if name == "short" || name == "empty" || name == "without data" {
			last := off
			for _, p := range x.Points {
				if p.Group == 1 {
					last = p.Out
				}
			}
			_, err = y.SeekPointIn(last, frame)
		}
		require.Error(t, err, name)
	}
}

// groupIndex is gzipIndex with groups.
func groupIndex(tb testing.TB) *layer.Index {
	tb.Helper()
	x := gzipIndex(tb)
	x.Points = append(x.Points,
		layer.Point{Out: 6000, In: 500, Group: 1, WindowSize: 100},
		layer.Point{Out: 7000, In: 600, Bit: 3, State: []byte("s"), Group: 1, WindowOff: 100, WindowSize: inflate.WindowSize},
		layer.Point{Out: 8000, In: 650, Window: []byte("w")},
		layer.Point{Out: 9000, In: 900, Group: 2, WindowSize: 1},
	)
	x.Groups = []layer.Group{{Len: 10, Digest: [32]byte{1}}, {Off: 10, Len: 20, Digest: [32]byte{2}}}
	return x
}

func TestDecodePointsMalformed(t *testing.T) {
	x := groupIndex(t)
	y := decoded(t, x)
	require.Equal(t, x.Points, y.Points)
	require.Equal(t, x.Groups, y.Groups)
	for _, c := range []struct {
		want  string
		spoil func(*layer.Index)
	}{
		{"group", func(x *layer.Index) { x.Groups[1].Len = 2 << 20 }},
		{"number of seek points", func(x *layer.Index) { x.Groups = append(x.Groups, layer.Group{Len: 1}) }},
		{"bit offset", func(x *layer.Index) { x.Points[3].Bit = 8 }},
		{"decoder state", func(x *layer.Index) { x.Points[3].State = make([]byte, inflate.MaxState+1) }},
		{"window", func(x *layer.Index) { x.Points[3].WindowSize = inflate.WindowSize + 1 }},
		{"window", func(x *layer.Index) { x.Points[3].WindowSize = 0 }},
		{"window", func(x *layer.Index) { x.Points[2].Out = 0 }},
		{"window", func(x *layer.Index) { x.Points[3].Out = x.Points[2].Out }},
		{"group", func(x *layer.Index) { x.Groups[0].Len = 0 }},
		{"seek point", func(x *layer.Index) { x.Points[5].Out = 10_001 }},
		{"seek point", func(x *layer.Index) { x.Points[5].In = 1001 }},
		{"order", func(x *layer.Index) { x.Points[5].Out = 8000 }},
		{"order", func(x *layer.Index) { x.Points[3].In = 651 }},
		{"before its seek point", func(x *layer.Index) {
			x.Points[3].Out, x.Points[3].In = 8100, 999
			x.Points[5].Out = 8192
			x.Points[5].In = 999
		}},
	} {
		bad, good := groupIndex(t), groupIndex(t)
		c.spoil(bad)
		y, err := layer.DecodeSpans(good.AppendSpans(nil))
		require.NoError(t, err)
		before := *y
		err = y.DecodePoints(bad.AppendPoints(nil))
		require.ErrorIs(t, err, layer.ErrFormat, c.want)
		require.ErrorContains(t, err, c.want)
		require.Equal(t, &before, y)
	}
	b := x.AppendPoints(nil)
	y, err := layer.DecodeSpans(x.AppendSpans(nil))
	require.NoError(t, err)
	require.ErrorContains(t, y.DecodePoints(append(b, 0)), "after its end")
	for n := range b {
		require.ErrorIs(t, y.DecodePoints(b[:n]), layer.ErrFormat, "%d bytes", n)
	}
	require.ErrorContains(t, mustBuild(t, mixed(t)).DecodePoints(b), "not gzip'ed")

	many := groupIndex(t) // of windows that are more than a group may have
	many.Points = many.Points[:2]
	for i := range 33 {
		many.Points = append(many.Points, layer.Point{Out: 6000 + inflate.Out(i), In: 500, Group: 1, WindowSize: inflate.WindowSize})
	}
	many.Groups = many.Groups[:1]
	require.ErrorContains(t, y.DecodePoints(many.AppendPoints(nil)), "window")
}

func FuzzDecodePoints(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(groupIndex(f).AppendPoints(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := layer.DecodeSpans(gzipIndex(t).AppendSpans(nil))
		require.NoError(t, err)
		if err := x.DecodePoints(b); err != nil {
			require.ErrorIs(t, err, layer.ErrFormat)
			return
		}
		y := decoded(t, x)
		require.True(t, reflect.DeepEqual(x, y))
		for i := range x.Spans {
			start, _ := x.SpanRange(i)
			p := x.SeekPointWithout(start)
			require.True(t, p.Out <= start && p.In <= x.Spans[i].InEnd)
			if group, ok := x.GroupAt(start); ok {
				require.Less(t, group, len(x.Groups))
				_, err := x.SeekPointIn(start, nil)
				require.Error(t, err)
			}
		}
	})
}
