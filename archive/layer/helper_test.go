package layer_test

import (
	"bytes"
	"crypto/sha256"
	"encoding"
	"io"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// small gives small layers many spans and seek points.
var small = layer.Options{SpanSize: 4 << 10, PointInterval: 32 << 10}

// stream is an uncompressed layer.
type stream struct {
	name string
	data []byte
}

func streams(tb testing.TB) []stream {
	tb.Helper()
	const meta = 512 + 1024 // a header and the end marker
	one := func(size int) []byte { return testimage.Tar(tb, testimage.Reg("f", testimage.Content(7, size))) }
	return []stream{
		{"empty", nil},
		{"no entries", testimage.Tar(tb)},
		{"shorter than a span", one(100)},
		{"one span", one(4<<10 - meta)},
		{"one span and a byte", append(one(4<<10-meta), 0)},
		{"two spans", one(8<<10 - meta)},
		{"two spans less a byte", append(one(8<<10-meta-512), make([]byte, 511)...)},
		{"many spans", mixed(tb)},
		{"zeros", testimage.Tar(tb, testimage.Reg("zero", string(make([]byte, 300<<10))))},
		{"data after the end", append(one(20<<10), testimage.Content(8, 70_001)...)},
	}
}

// mixed is a stream of a few hundred KiB.
func mixed(tb testing.TB) []byte {
	tb.Helper()
	return testimage.Tar(tb,
		testimage.Dir("bin/"),
		testimage.Reg("bin/sh", testimage.Content(1, 150_001)),
		testimage.Symlink("bin/bash", "sh"),
		testimage.Link("bin/dash", "bin/sh"),
		testimage.Reg("etc/empty", ""),
		testimage.Reg("etc/passwd", testimage.Content(2, 3000)),
		testimage.Reg("lib/libc", testimage.Content(3, 200_000)),
	)
}

// blobs compresses data in every way that Build can read.
func blobs(tb testing.TB, data []byte) map[string][]byte {
	tb.Helper()
	a, b := len(data)/3, len(data)*2/3
	return map[string][]byte{
		"uncompressed":     data,
		"gzip0":            testimage.Gzip(tb, 0, data),
		"gzip1":            testimage.Gzip(tb, 1, data),
		"gzip6":            testimage.Gzip(tb, 6, data),
		"gzip9":            testimage.Gzip(tb, 9, data),
		"stateless":        testimage.Gzip(tb, gzip.StatelessCompression, data),
		"huffman only":     testimage.Gzip(tb, gzip.HuffmanOnly, data),
		"three members":    testimage.Gzip(tb, 6, data[:a], data[a:b], data[b:]),
		"empty members":    testimage.Gzip(tb, 1, nil, data[:a], nil, data[a:], nil),
		"zstd":             zstdFrames(tb, data),
		"zstd no checksum": zstdFrames(tb, data, zstd.WithEncoderCRC(false), zstd.WithEncoderLevel(zstd.SpeedFastest)),
		"three frames":     slices.Concat(zstdFrames(tb, data[:a]), zstdFrames(tb, data[a:b]), zstdFrames(tb, data[b:])),
		"many frames":      manyFrames(tb, data),
		"empty frames":     slices.Concat(skippable, zstdFrames(tb, nil), zstdFrames(tb, data[:a]), skippable, zstdFrames(tb, nil), zstdFrames(tb, data[a:]), skippable),
	}
}

// skippable is a zstd frame without data.
var skippable = []byte{0x5a, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 'x'}

// zstdFrames compresses data as a writer of layers does: in one frame, whose
// header does not tell the size.
func zstdFrames(tb testing.TB, data []byte, opts ...zstd.EOption) []byte {
	tb.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, append(opts, zstd.WithZeroFrames(true))...)
	require.NoError(tb, err)
	_, err = w.Write(data)
	require.NoError(tb, err)
	require.NoError(tb, w.Close())
	return b.Bytes()
}

// manyFrames makes a frame, which tells its size, of every 10,000 bytes.
func manyFrames(tb testing.TB, data []byte) []byte {
	tb.Helper()
	blob := zstdFrames(tb, nil)
	for part := range slices.Chunk(data, 10_000) {
		blob = append(blob, zstdFrame(tb, part)...)
	}
	return blob
}

func build(tb testing.TB, blob []byte, opts layer.Options) (*layer.Index, error) {
	tb.Helper()
	return layer.Build(tb.Context(), bytes.NewReader(blob), testimage.Descriptor(ocispec.MediaTypeImageLayer, blob), opts)
}

func mustBuild(tb testing.TB, blob []byte) *layer.Index {
	tb.Helper()
	x, err := build(tb, blob, small)
	require.NoError(tb, err)
	return x
}

// check checks an index against its blob and the stream in it.
func check(tb testing.TB, x *layer.Index, blob, data []byte) {
	tb.Helper()
	require.Equal(tb, digest.FromBytes(blob), x.Digest)
	require.Equal(tb, digest.FromBytes(data), x.DiffID)
	require.EqualValues(tb, len(blob), x.Size)
	require.EqualValues(tb, len(data), x.OutSize)
	require.Len(tb, x.Spans, (len(data)+int(x.SpanSize)-1)/int(x.SpanSize))
	for i := range x.Spans {
		start, end := x.SpanRange(i)
		require.Equal(tb, i, x.SpanAt(start))
		require.Equal(tb, i, x.SpanAt(end-1))
		require.NoError(tb, x.VerifySpan(i, data[start:end]))
		if len(x.Points) == 1 && i%16 != 0 && i < len(x.Spans)-1 {
			continue // each is decoded from the start of the stream
		}
		if got := read(tb, x, blob, i); !bytes.Equal(got, data[start:end]) {
			tb.Fatalf("span %d: wrong bytes", i)
		}
		if i < len(x.Spans)-1 && x.Spans[i].Digest != chainValue(tb, data[:end]) {
			tb.Fatalf("span %d: digest is not the chaining value", i)
		}
	}
	if n := len(x.Spans); n > 0 {
		require.Equal(tb, x.DiffID, digest.NewDigestFromBytes(digest.SHA256, x.Spans[n-1].Digest[:]))
		require.LessOrEqual(tb, x.Spans[n-1].InEnd, x.Size)
	}
	var last inflate.Out
	for i, p := range x.Points {
		require.Equal(tb, p.Out == 0, i == 0)
		require.True(tb, i == 0 || p.Out-last >= small.PointInterval)
		last = p.Out
	}
}

// read decodes a span as a worker does: from the seek point before it to the
// end of its compressed bytes.
func read(tb testing.TB, x *layer.Index, blob []byte, i int) []byte {
	tb.Helper()
	start, end := x.SpanRange(i)
	p, err := x.SeekPoint(start)
	require.NoError(tb, err)
	require.LessOrEqual(tb, p.Out, start)
	from, _ := x.DecodeRange(start)
	require.Equal(tb, p.Out, from)
	r, err := x.Decode(bytes.NewReader(blob[p.In:x.Spans[i].InEnd]), p)
	require.NoError(tb, err)
	defer func() { require.NoError(tb, r.Close()) }()
	_, err = io.CopyN(io.Discard, r, int64(start-p.Out))
	require.NoError(tb, err)
	got := make([]byte, end-start)
	_, err = io.ReadFull(r, got)
	require.NoError(tb, err)
	return got
}

// chainValue is SHA-256's chaining value after data, as crypto/sha256 stores it.
func chainValue(tb testing.TB, data []byte) [32]byte {
	tb.Helper()
	h := sha256.New()
	h.Write(data)
	state, err := h.(encoding.BinaryMarshaler).MarshalBinary()
	require.NoError(tb, err)
	return [32]byte(state[4:36])
}

// noLeak fails a test that ends with more goroutines than it began with.
func noLeak(t *testing.T) {
	t.Helper()
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(10 * time.Millisecond) {
			if runtime.NumGoroutine() <= before {
				return
			}
		}
		t.Errorf("%d goroutines instead of %d", runtime.NumGoroutine(), before)
	})
}

func altered(b []byte, at int) []byte {
	b = slices.Clone(b)
	b[at] ^= 0x20
	return b
}

// requireImports builds the index of a stream in each compression, checks each, and that they say the same of imports.
func requireImports(t *testing.T, stream []byte, check func(t *testing.T, x *layer.Index)) {
	t.Helper()
	var encoded []byte
	for name, blob := range map[string][]byte{"uncompressed": stream, "gzip": testimage.Gzip(t, 1, stream), "zstd": zstdFrames(t, stream)} {
		t.Run(name, func(t *testing.T) {
			x := mustBuild(t, blob)
			require.Equal(t, compression(name), x.Compression)
			check(t, x)
			if encoded == nil {
				encoded = x.Imports
			}
			require.Equal(t, encoded, x.Imports, "they are the same however the layer is compressed")
		})
	}
}
