package index

import (
	"cmp"
	"context"
	"io"
	"runtime"
	"slices"

	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// fitSpanSize is the size of the spans of a layer that is fitted to a start, in
// uncompressed bytes: what is read is fetched in whole spans. Smaller ones
// would add more to the archive than they save (docs/benchmarks.md).
const fitSpanSize inflate.Out = 64 << 10

// fitGap is the least gap between two stretches that is worth a seek point, in
// uncompressed bytes: a point takes 2 KB of the archive, and who fetches both
// stretches would take less than this along.
const fitGap = 2 * fitSpanSize

// Stretch is [Off, End) of a layer's uncompressed stream.
type Stretch struct{ Off, End inflate.Out }

// Fitting is a layer to fit to what is read of it.
type Fitting struct {
	Layer ocispec.Descriptor
	Index *layer.Index // as it is
	Reads []Stretch    // in any order
}

// CanFit says whether Fit can make the index better: a zstd frame can only be
// decoded from its start.
func (f Fitting) CanFit() bool {
	return len(f.Reads) > 0 && f.Index != nil && f.Index.Compression != layer.Zstd
}

// Opener opens a layer's blob.
type Opener func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)

// Fit returns the indexes of the layers, made anew such that little but the
// reads has to be fetched for them: with small spans, and with seek points where
// reads begin. A layer whose blob cannot be had keeps its index, with a warning;
// the error is ctx's alone. progress may be nil.
func Fit(ctx context.Context, open Opener, layers []Fitting, progress Progress) ([]*layer.Index, error) {
	fitted := make([]*layer.Index, len(layers))
	g := new(errgroup.Group)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, f := range layers {
		g.Go(func() error {
			x, err := fit(ctx, open, f, func(n int64) {
				if progress != nil {
					progress.Read(i, n)
				}
			})
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				log.G(ctx).WithError(err).WithField("layer", f.Layer.Digest).
					Warn("the layer's index stays as it is: more will be fetched of it than what the start reads")
				x = f.Index
			}
			fitted[i] = x
			if progress != nil {
				progress.Done(i, Outcome{})
			}
			return nil
		})
	}
	return fitted, g.Wait()
}

func fit(ctx context.Context, open Opener, f Fitting, progress func(int64)) (*layer.Index, error) {
	blob, err := open(ctx, f.Layer)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	return layer.Build(ctx, blob, f.Layer, layer.Options{SpanSize: fitSpanSize, PointsAt: starts(f.Reads), Progress: progress})
}

// starts returns where the spans begin that the reads need, but for those that
// are near others.
func starts(reads []Stretch) (at []inflate.Out) {
	reads = slices.Clone(reads)
	slices.SortFunc(reads, func(a, b Stretch) int { return cmp.Compare(a.Off, b.Off) })
	var end inflate.Out // of what is fetched so far
	for _, r := range reads {
		start := r.Off / fitSpanSize * fitSpanSize
		if start >= end+fitGap {
			at = append(at, start)
		}
		end = max(end, (r.End+fitSpanSize-1)/fitSpanSize*fitSpanSize)
	}
	return at
}
