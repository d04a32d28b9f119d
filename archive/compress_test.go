package archive

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// TestCompress reads an archive from what is behind its tail's start alone.
func TestCompress(t *testing.T) {
	raw := write(t, &smallImage(t).Image)
	a, err := open(raw)
	require.NoError(t, err)
	blob, tail, err := a.Compress()
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

	require.Equal(t, tail.Digest, digest.FromBytes(blob[tail.In:]))
	sections, err := dec.DecodeAll(blob[tail.In:], nil)
	require.NoError(t, err)
	part := make([]byte, tail.Out, len(raw))
	part = append(part, sections...)
	require.Less(t, len(sections), len(raw)-clipHeaderSize)
	a, err = OpenTail(bytes.NewReader(part), int64(len(part)))
	require.NoError(t, err)
	got, err := contentsOf(a)
	require.NoError(t, err)
	want, err := readAll(raw)
	require.NoError(t, err)
	require.Equal(t, want, got)

	_, err = open(part)
	require.ErrorIs(t, err, ErrNotArchive)
	_, err = OpenTail(bytes.NewReader(raw), int64(len(raw))-1)
	require.ErrorIs(t, err, ErrCorrupt)
}

func TestTailOf(t *testing.T) {
	good := Tail{Digest: digest.FromString("x"), In: 10, Out: 20}
	annotated := func(tail Tail) map[string]string {
		raw, err := json.Marshal(tail)
		require.NoError(t, err)
		return map[string]string{AnnotationTail: string(raw)}
	}
	got, ok := TailOf(annotated(good), 11)
	require.True(t, ok)
	require.Equal(t, good, got)
	for name, annotations := range map[string]map[string]string{
		"none": nil, "no JSON": {AnnotationTail: "{"}, "number": {AnnotationTail: "1"},
		"no digest": annotated(Tail{In: 1, Out: 1}), "behind the end": annotated(Tail{Digest: good.Digest, In: 11, Out: 1}),
		"negative": annotated(Tail{Digest: good.Digest, In: -1, Out: 1}), "negative in the archive": annotated(Tail{Digest: good.Digest, In: 1, Out: -1}),
	} {
		_, ok := TailOf(annotations, 11)
		require.False(t, ok, name)
	}
}
