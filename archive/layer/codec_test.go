package layer_test

import (
	"bytes"
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

func TestRoundTrip(t *testing.T) {
	for _, s := range streams(t) {
		for _, blob := range blobs(t, s.data) {
			requireRoundTrip(t, mustBuild(t, blob))
		}
	}
}

// Encoding appends.
func TestAppend(t *testing.T) {
	x := mustBuild(t, mixed(t))
	prefix := []byte("prefix")
	require.True(t, bytes.Equal(append(prefix, x.AppendSpans(nil)...), x.AppendSpans(prefix)))
	require.True(t, bytes.Equal(append(prefix, x.AppendEntries(nil)...), x.AppendEntries(prefix)))
}

// gzipIndex is a small index of a gzip layer with all kinds of entry.
func gzipIndex(tb testing.TB) *layer.Index {
	tb.Helper()
	return &layer.Index{
		Digest: digest.FromString("blob"), Size: 1000, DiffID: digest.FromString("stream"), OutSize: 10_000,
		Compression: layer.Gzip, SpanSize: 4096,
		Spans: []layer.Span{{InEnd: 300, Digest: [32]byte{1}}, {InEnd: 700, Digest: [32]byte{2}}, {InEnd: 992, Digest: [32]byte{3}}},
		Points: []layer.Point{
			{In: 10}, {Out: 5000, In: 400, Bit: 7, State: []byte("state"), Window: []byte("window")},
		},
		Entries: []layer.Entry{
			{Name: "d", Type: layer.TypeDir, Mode: 0o1777, ModTime: math.MaxInt64},
			{Name: "z", Type: layer.TypeSparse, Size: 1<<20 + 5, Off: 512, Extents: []layer.Extent{
				{Pos: 1024, Len: 512, Off: 512}, {Pos: 4096, Len: 1024, Off: 1024}, {Pos: 1 << 20, Len: 5, Off: 2048},
			}},
			{Name: "f", Type: layer.TypeReg, Mode: 0o644, ModTime: math.MinInt64, ModNsec: 999_999_999, Size: 5000, Off: 512},
			{Name: "g", Type: layer.TypeReg, UID: math.MaxUint32, GID: math.MaxUint32, Size: 100, Off: 9900},
			{Name: "s", Type: layer.TypeSymlink, Link: "\xff", Xattrs: []layer.Xattr{{Name: "user.a", Value: "\x00"}, {}}},
			{Name: "h", Type: layer.TypeLink, Link: "f"},
			{Name: "", Type: layer.TypeChar, DevMajor: math.MaxUint32, DevMinor: 1},
			{Name: "p", Type: layer.TypeFifo},
			{Name: "hole", Type: layer.TypeSparse, Size: 1 << 40, Off: 9900},
		},
	}
}

func TestDecodeSpansMalformed(t *testing.T) {
	requireRoundTrip(t, gzipIndex(t))
	for _, c := range []struct {
		want  string
		spoil func(*layer.Index)
	}{
		{"digest", func(x *layer.Index) { x.Digest = "" }},
		{"digest", func(x *layer.Index) { x.Digest = "sha256:abc" }},
		{"digest", func(x *layer.Index) { x.Digest = digest.Digest("sha256:" + strings.Repeat("a", 300)) }},
		{"digest", func(x *layer.Index) { x.DiffID = "md5:d41d8cd98f00b204e9800998ecf8427e" }},
		{"diff ID", func(x *layer.Index) { x.DiffID = digest.SHA512.FromString("x") }},
		{"blob size", func(x *layer.Index) { x.Size = -1 }},
		{"uncompressed size", func(x *layer.Index) { x.OutSize = -1 }},
		{"compression", func(x *layer.Index) { x.Compression = 3 }},
		{"blob size", func(x *layer.Index) { x.Compression, x.Points = layer.Uncompressed, nil }},
		{"seek points", func(x *layer.Index) { x.Compression, x.Size = layer.Uncompressed, inflate.In(x.OutSize) }},
		{"span size", func(x *layer.Index) { x.SpanSize = 0 }},
		{"span size", func(x *layer.Index) { x.SpanSize = 2048 }},
		{"span size", func(x *layer.Index) { x.SpanSize = 4097 }},
		{"span size", func(x *layer.Index) { x.SpanSize = 32 << 20 }},
		{"number of spans", func(x *layer.Index) { x.Spans = x.Spans[:2] }},
		{"number of spans", func(x *layer.Index) { x.Spans = append(x.Spans, x.Spans[2]) }},
		{"number of spans", func(x *layer.Index) { x.OutSize = math.MaxInt64 }},
		{"span end", func(x *layer.Index) { x.Spans[2].InEnd = 1001 }},
		{"span end", func(x *layer.Index) { x.Spans[1].InEnd = 299 }},
		{"before its seek point", func(x *layer.Index) { x.Spans[0].InEnd = 9 }},
		{"before its seek point", func(x *layer.Index) { x.Points[1].Out, x.Points[1].In = 4000, 800 }},
		{"number of seek points", func(x *layer.Index) { x.Points = nil }},
		{"first seek point", func(x *layer.Index) { x.Points[0].Out = 1 }},
		{"seek point", func(x *layer.Index) { x.Points[1].Out = 10_001 }},
		{"seek point", func(x *layer.Index) { x.Points[1].In = 1001 }},
		{"seek point", func(x *layer.Index) { x.Points[1].In = 9 }},
		{"bit offset", func(x *layer.Index) { x.Points[1].Bit = 8 }},
		{"state", func(x *layer.Index) { x.Points[1].State = make([]byte, inflate.MaxState+1) }},
		{"window", func(x *layer.Index) { x.Points[1].Window = make([]byte, 2*inflate.WindowSize) }},
	} {
		x := gzipIndex(t)
		c.spoil(x)
		_, err := layer.DecodeSpans(x.AppendSpans(nil))
		require.ErrorIs(t, err, layer.ErrFormat, c.want)
		require.ErrorContains(t, err, c.want)
	}
	b := gzipIndex(t).AppendSpans(nil)
	_, err := layer.DecodeSpans(append(b, 0))
	require.ErrorContains(t, err, "after its end")
	for n := range b {
		_, err := layer.DecodeSpans(b[:n])
		require.ErrorIs(t, err, layer.ErrFormat, "%d bytes", n)
	}
}

func TestDecodeEntriesMalformed(t *testing.T) {
	for _, c := range []struct {
		want  string
		spoil func([]layer.Entry)
	}{
		{"name", func(e []layer.Entry) { e[0].Name = strings.Repeat("x", 1<<20+1) }},
		{"link", func(e []layer.Entry) { e[4].Link = strings.Repeat("x", 1<<20+1) }},
		{"entry type", func(e []layer.Entry) { e[0].Type = 'x' }},
		{"entry type", func(e []layer.Entry) { e[0].Type = 0 }},
		{"mode", func(e []layer.Entry) { e[0].Mode = 0o10000 }},
		{"nanoseconds", func(e []layer.Entry) { e[0].ModNsec = 1e9 }},
		{"file size", func(e []layer.Entry) { e[2].Size = 10_001 }},
		{"file size", func(e []layer.Entry) { e[2].Size = -1 }},
		{"file offset", func(e []layer.Entry) { e[3].Off = 511 }},
		{"file offset", func(e []layer.Entry) { e[3].Off = 10_001 }},
		{"beyond the end", func(e []layer.Entry) { e[3].Size = 101 }},
		{"file size", func(e []layer.Entry) { e[1].Size = -1 }},
		{"file beyond", func(e []layer.Entry) { e[1].Off, e[2].Off = 9000, 9000 }},
		{"extent", func(e []layer.Entry) { e[1].Extents[0].Len = 0 }},
		{"extent", func(e []layer.Entry) { e[1].Extents[1].Len = -1 }},
		{"extent", func(e []layer.Entry) { e[1].Extents[0].Pos = -512 }},
		{"extent", func(e []layer.Entry) { e[1].Extents[1].Pos = e[1].Extents[0].End() }},
		{"extent", func(e []layer.Entry) { e[1].Extents[2].Pos = 0 }},
		{"extent", func(e []layer.Entry) { e[1].Extents[2].Len = 6 }},
		{"extents", func(e []layer.Entry) { e[1].Extents[0].Pos = 1000 }},
		{"extents", func(e []layer.Entry) { e[1].Extents[0].Len = 500 }},
		{"extents", func(e []layer.Entry) { e[1].Size = 1<<40 + 5 }},
		{"xattr name", func(e []layer.Entry) { e[4].Xattrs[0].Name = strings.Repeat("x", 1<<20+1) }},
		{"xattr value", func(e []layer.Entry) { e[4].Xattrs[0].Value = strings.Repeat("x", 1<<20+1) }},
	} {
		x := gzipIndex(t)
		c.spoil(x.Entries)
		err := (&layer.Index{OutSize: x.OutSize}).DecodeEntries(x.AppendEntries(nil))
		require.ErrorIs(t, err, layer.ErrFormat, c.want)
		require.ErrorContains(t, err, c.want)
		require.Equal(t, err, (&layer.Index{OutSize: x.OutSize}).CheckEntries(x.AppendEntries(nil)))
	}
	fine := layer.Entry{Type: layer.TypeSparse, Size: 3 << 29, Extents: []layer.Extent{{Pos: 512, Len: 512}}} // more than half
	err := (&layer.Index{OutSize: 512}).DecodeEntries((&layer.Index{Entries: []layer.Entry{fine, fine}}).AppendEntries(nil))
	require.ErrorContains(t, err, "holes")
	require.NoError(t, (&layer.Index{OutSize: 512}).DecodeEntries((&layer.Index{Entries: []layer.Entry{fine}}).AppendEntries(nil)))
	many := layer.Entry{Type: layer.TypeDir, Xattrs: make([]layer.Xattr, 70_000)}
	err = (&layer.Index{}).DecodeEntries((&layer.Index{Entries: []layer.Entry{many}}).AppendEntries(nil))
	require.ErrorContains(t, err, "number of xattrs")

	x := gzipIndex(t)
	b := x.AppendEntries(nil)
	require.ErrorContains(t, x.DecodeEntries(append(b, 0)), "after its end")
	require.ErrorContains(t, x.DecodeEntries([]byte{200, 1, 0}), "entries")
	for n := range b {
		require.ErrorIs(t, x.DecodeEntries(b[:n]), layer.ErrFormat, "%d bytes", n)
	}
	require.Len(t, x.Entries, 9, "a failure leaves the index as it was")

	// What was decoded does not change with what it was decoded from.
	require.NoError(t, x.DecodeEntries(b))
	require.NoError(t, (&layer.Index{OutSize: x.OutSize}).CheckEntries(b))
	clear(b)
	require.Equal(t, gzipIndex(t).Entries, x.Entries)
}

func FuzzDecodeSpans(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(gzipIndex(f).AppendSpans(nil))
	f.Add((&layer.Index{
		Digest: digest.FromString(""), DiffID: digest.SHA256.FromString(""), SpanSize: 16 << 20,
		Size: math.MaxInt64, OutSize: math.MaxInt64,
	}).AppendSpans(nil))
	for _, blob := range blobs(f, mixed(f)[:0]) {
		f.Add(mustBuild(f, blob).AppendSpans(nil))
	}
	f.Add(mustBuild(f, testimage.Gzip(f, 6, mixed(f))).AppendSpans(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := layer.DecodeSpans(b)
		if err != nil {
			require.ErrorIs(t, err, layer.ErrFormat)
			return
		}
		y, err := layer.DecodeSpans(x.AppendSpans(nil))
		require.NoError(t, err)
		require.True(t, reflect.DeepEqual(x, y))
		for i := range x.Spans {
			start, end := x.SpanRange(i)
			require.True(t, 0 <= start && start < end && end <= x.OutSize)
			if p, err := x.SeekPoint(start); err == nil {
				require.True(t, p.Out <= start && p.In <= x.Spans[i].InEnd && len(p.Window) <= inflate.WindowSize)
			}
		}
	})
}

func FuzzDecodeEntries(f *testing.F) {
	f.Add([]byte(nil), int64(0))
	f.Add([]byte{0}, int64(math.MaxInt64))
	f.Add(gzipIndex(f).AppendEntries(nil), int64(10_000))
	x := mustBuild(f, mixed(f))
	f.Add(x.AppendEntries(nil), int64(x.OutSize))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		x := &layer.Index{OutSize: inflate.Out(max(size, 0))}
		err := x.DecodeEntries(b)
		require.Equal(t, err, (&layer.Index{OutSize: x.OutSize}).CheckEntries(b))
		if err != nil {
			require.ErrorIs(t, err, layer.ErrFormat)
			return
		}
		y := &layer.Index{OutSize: x.OutSize}
		require.NoError(t, y.DecodeEntries(x.AppendEntries(nil)))
		require.True(t, reflect.DeepEqual(x, y))
		for _, e := range x.Entries {
			require.True(t, e.Size >= 0 && e.Off >= 0 && e.Off <= x.OutSize)
			extents := e.Extents
			if e.Type != layer.TypeSparse {
				extents = []layer.Extent{{Len: e.Size, Off: e.Off}}
			}
			pos := int64(0)
			for _, p := range extents {
				require.True(t, p.Pos >= pos && p.End() <= e.Size && p.Off >= e.Off && inflate.Out(p.Len) <= x.OutSize-p.Off)
				pos = p.End()
			}
		}
	})
}
