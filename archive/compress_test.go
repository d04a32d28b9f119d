package archive

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// TestCompress reads an archive from its parts alone.
func TestCompress(t *testing.T) {
	raw := write(t, &smallImage(t).Image)
	a, err := open(raw)
	require.NoError(t, err)
	blob, parts, err := a.Compress()
	require.NoError(t, err)
	again, _, err := a.Compress()
	require.NoError(t, err)
	require.True(t, bytes.Equal(blob, again))

	dec, err := zstd.NewReader(nil)
	require.NoError(t, err)
	defer dec.Close()
	whole, err := dec.DecodeAll(blob, nil)
	require.NoError(t, err)
	require.True(t, bytes.Equal(raw, whole))

	require.Equal(t, parts.Spans.Digest, digest.FromBytes(blob[parts.Spans.In:parts.Rest.In]))
	require.Equal(t, parts.Rest.Digest, digest.FromBytes(blob[parts.Rest.In:]))
	require.Greater(t, parts.Spans.Out, int64(clipHeaderSize))
	spans, err := dec.DecodeAll(blob[parts.Spans.In:parts.Rest.In], nil)
	require.NoError(t, err)
	rest, err := dec.DecodeAll(blob[parts.Rest.In:], nil)
	require.NoError(t, err)

	part := append(make([]byte, parts.Rest.Out, len(raw)), rest...)
	early, err := OpenTail(bytes.NewReader(part), int64(len(part)))
	require.NoError(t, err)
	for i := range a.DiffIDs() {
		want, err := a.Layer(i)
		require.NoError(t, err)
		want.Spans, want.Points, want.SpanSize, want.Compression = nil, nil, 0, 0
		files, err := early.Files(i)
		require.NoError(t, err)
		require.Equal(t, want, files)
		_, err = early.Spans(i)
		require.ErrorIs(t, err, ErrCorrupt)
	}
	require.Len(t, spans, copy(part[parts.Spans.Out:parts.Rest.Out], spans))
	got, err := contentsOf(early)
	require.NoError(t, err)
	want, err := readAll(raw)
	require.NoError(t, err)
	require.Equal(t, want, got)

	_, err = open(part)
	require.ErrorIs(t, err, ErrNotArchive)
	_, err = OpenTail(bytes.NewReader(raw), int64(len(raw))-1)
	require.ErrorIs(t, err, ErrCorrupt)
}

// TestCompressWithoutSpans has no part for them.
func TestCompressWithoutSpans(t *testing.T) {
	img := &smallImage(t).Image
	for i := range img.Layers {
		img.Layers[i] = Layer{Reason: "of another kind"}
	}
	a, err := open(write(t, img))
	require.NoError(t, err)
	blob, parts, err := a.Compress()
	require.NoError(t, err)
	require.Equal(t, parts.Rest.In, parts.Spans.In)
	require.Equal(t, parts.Rest.Out, parts.Spans.Out)
	got, ok := PartsOf(map[string]string{AnnotationParts: string(marshal(t, parts))}, int64(len(blob)))
	require.True(t, ok)
	require.Equal(t, parts, got)
}

func marshal(t *testing.T, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	require.NoError(t, err)
	return raw
}

func TestPartsOf(t *testing.T) {
	good := Parts{Spans: Part{Digest: digest.FromString("x"), In: 10, Out: 20}, Rest: Part{Digest: digest.FromString("y"), In: 15, Out: 30}}
	annotated := func(change func(*Parts)) map[string]string {
		p := good
		change(&p)
		return map[string]string{AnnotationParts: string(marshal(t, p))}
	}
	got, ok := PartsOf(annotated(func(*Parts) {}), 16)
	require.True(t, ok)
	require.Equal(t, good, got)
	for name, annotations := range map[string]map[string]string{
		"none": nil, "no JSON": {AnnotationParts: "{"}, "number": {AnnotationParts: "1"},
		"no digest":       annotated(func(p *Parts) { p.Spans.Digest = "" }),
		"no other digest": annotated(func(p *Parts) { p.Rest.Digest = "sha256:1" }),
		"behind the end":  annotated(func(p *Parts) { p.Rest.In = 16 }),
		"out of order":    annotated(func(p *Parts) { p.Spans.In = 16 }),
		"overlapping":     annotated(func(p *Parts) { p.Spans.Out = 31 }),
		"negative":        annotated(func(p *Parts) { p.Spans.In = -1 }),
		"negative there":  annotated(func(p *Parts) { p.Spans.Out = -1 }),
	} {
		_, ok := PartsOf(annotations, 16)
		require.False(t, ok, name)
	}
}
