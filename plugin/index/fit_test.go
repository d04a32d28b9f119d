package index

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// textTar is a tar of one file that shrinks to about a third, and its gzip.
func textTar(t *testing.T, size int) (blob []byte, desc ocispec.Descriptor, x *layer.Index) {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	content := make([]byte, size)
	for i := range content {
		content[i] = byte('a' + rng.IntN(6))
	}
	blob = testutil.Gzip(t, testutil.Tar(t, testutil.File{Name: "file", Data: string(content)}))
	desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	x, err := layer.Build(t.Context(), bytes.NewReader(blob), desc, layer.Options{})
	require.NoError(t, err)
	return blob, desc, x
}

// TestFit makes what has to be fetched for a few reads little, and what a layer
// is remains the same.
func TestFit(t *testing.T) {
	blob, desc, x := textTar(t, 8<<20)
	reads := []Stretch{{5_000_000, 5_020_000}, {700_000, 710_000}, {900_000, 1_000_000}, {700_000, 700_001}}
	open := func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(blob)), nil
	}
	f := Fitting{Layer: desc, Index: x, Reads: reads}
	require.True(t, f.CanFit())
	fitted, err := Fit(t.Context(), open, []Fitting{f}, nil)
	require.NoError(t, err)
	y := fitted[0]
	require.Equal(t, x.DiffID, y.DiffID)
	require.Equal(t, x.Entries, y.Entries)
	cost := func(x *layer.Index) (n inflate.In) {
		for _, r := range reads {
			p, err := x.SeekPoint(inflate.Out(x.SpanAt(r.Off)) * x.SpanSize)
			require.NoError(t, err)
			n += x.Spans[x.SpanAt(r.End-1)].InEnd - p.In
		}
		return n
	}
	require.Less(t, cost(y), cost(x)/3)
	for _, r := range reads {
		from, _ := y.SpanRange(y.SpanAt(r.Off))
		p, err := y.SeekPoint(from)
		require.NoError(t, err)
		require.Less(t, from-p.Out, fitGap+inflate.WindowSize)
	}
}

// TestFitCannot keeps the index of a layer that cannot be had, or is another.
func TestFitCannot(t *testing.T) {
	blob, desc, x := textTar(t, 1<<20)
	f := Fitting{Layer: desc, Index: x, Reads: []Stretch{{0, 1}}}
	for name, open := range map[string]Opener{
		"gone": func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) { return nil, errdefs.ErrUnavailable },
		"altered": func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
			b := bytes.Clone(blob)
			b[len(b)/2] ^= 1
			return io.NopCloser(bytes.NewReader(b)), nil
		},
	} {
		fitted, err := Fit(t.Context(), open, []Fitting{f}, nil)
		require.NoError(t, err, name)
		require.Same(t, x, fitted[0], name)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := Fit(ctx, func(ctx context.Context, _ ocispec.Descriptor) (io.ReadCloser, error) {
		return nil, ctx.Err()
	}, []Fitting{f}, nil)
	require.ErrorIs(t, err, context.Canceled)

	require.False(t, Fitting{Layer: desc, Index: x}.CanFit(), "nothing is read")
	require.False(t, Fitting{Layer: desc, Reads: f.Reads}.CanFit(), "not lazy")
	require.False(t, Fitting{Layer: desc, Index: &layer.Index{Compression: layer.Zstd}, Reads: f.Reads}.CanFit())
}

func TestStarts(t *testing.T) {
	k := inflate.Out(1 << 10)
	require.Equal(t, []inflate.Out{192 * k, 1024 * k}, starts([]Stretch{{1024*k + 5, 1025 * k}, {0, 1}, {200 * k, 210 * k}, {250 * k, 300 * k}}))
	require.Empty(t, starts(nil))
	require.Empty(t, starts([]Stretch{{64 * k, 65 * k}}), "near the layer's start")
}
