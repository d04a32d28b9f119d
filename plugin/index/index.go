// Package index turns an image at hand into an archive.
//
// Layers are indexed side by side, the largest first, so that the last one to
// end is a small one. What was indexed once is taken from a cache, after the
// layers that are more work: a digest names the same bytes for ever.
package index

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Progress is told what an indexer does. Its methods are called from several
// goroutines at once.
type Progress interface {
	// Read says that n more compressed bytes of layer i have been read.
	Read(i int, n int64)
	// Done says how layer i ended.
	Done(i int, how Outcome)
}

// Outcome says how a layer ended.
type Outcome struct {
	Cached  bool  // its index came from the cache
	NotLazy error // why it cannot be read lazily; nil if it can
}

// Image is what to index.
type Image struct {
	StorageRef string // the remote reference to store
	Platform   ocispec.Platform
	Descriptor ocispec.Descriptor // of the manifest
	Manifest   []byte             // verbatim
	Config     []byte             // verbatim
	Layers     []ocispec.Descriptor
}

// Options configures Run.
type Options struct {
	Workers  int      // layers indexed at once; default one per processor, 5 at most, and 3 with zstd layers
	Progress Progress // may be nil
	Cache    *Cache   // of layer indexes; nil for none
	// Force has layers indexed whose indexes are in the cache, which then get
	// replaced.
	Force bool
	Layer layer.Options
}

// Run reads img's layers from p and returns what to write as an archive. A
// layer that is sound but cannot be read lazily is recorded with the reason;
// any other failure ends the run.
func Run(ctx context.Context, p content.Provider, img Image, opts Options) (*archive.Image, error) {
	if opts.Workers == 0 {
		opts.Workers = workers(img.Layers)
	}
	var err error
	if opts.Layer, err = opts.Layer.Normalize(); err != nil {
		return nil, err
	}
	out := &archive.Image{
		StorageRef: img.StorageRef,
		Platform:   img.Platform,
		Descriptor: img.Descriptor,
		Manifest:   img.Manifest,
		Config:     img.Config,
		Layers:     make([]archive.Layer, len(img.Layers)),
	}
	idle := make(chan *worker, opts.Workers)
	for range opts.Workers {
		w := &worker{Options: opts, provider: p}
		w.Layer.Buffers = new(layer.Buffers)
		idle <- w
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(opts.Workers)
	for _, i := range largestFirst(img.Layers, opts.cached) {
		g.Go(func() error {
			w := <-idle
			defer func() { idle <- w }()
			l, how, err := w.layer(ctx, img.Layers[i], i)
			if err != nil {
				return fmt.Errorf("layer %d of %d: %w", i+1, len(img.Layers), err)
			}
			out.Layers[i] = l
			if opts.Progress != nil {
				opts.Progress.Done(i, how)
			}
			return nil
		})
	}
	return out, g.Wait()
}

// workers is how many layers are indexed at once unless said otherwise: as many
// as take less than 64 MiB, garbage included, beside what has become of others,
// and one per processor at most. The decoder of a zstd layer has the stream's
// window in memory, mostly 8 MiB.
func workers(layers []ocispec.Descriptor) int {
	most := 5
	if slices.ContainsFunc(layers, func(l ocispec.Descriptor) bool { return strings.HasSuffix(l.MediaType, "zstd") }) {
		most = 3
	}
	return min(runtime.GOMAXPROCS(0), most)
}

// cached says whether the layer's index seems to be in the cache.
func (o Options) cached(desc ocispec.Descriptor) bool {
	return o.Cache != nil && !o.Force && desc.Digest.Validate() == nil && o.Cache.has(desc, o.Layer)
}

// worker takes one layer after the other.
type worker struct {
	Options
	provider content.Provider
	encoder  archive.IndexEncoder
}

// layer returns layer i of an image. A layer that cannot be read lazily has a
// reason instead of an index.
func (w *worker) layer(ctx context.Context, desc ocispec.Descriptor, i int) (archive.Layer, Outcome, error) {
	if err := desc.Digest.Validate(); err != nil {
		return archive.Layer{}, Outcome{}, fmt.Errorf("digest %q: %w", desc.Digest, err)
	}
	if w.Cache != nil && !w.Force {
		if e := w.Cache.get(ctx, desc, w.Layer); e != nil {
			return e.Layer(), Outcome{Cached: true}, nil
		}
	}
	x, err := w.build(ctx, desc, i)
	if errors.Is(err, layer.ErrUnsupported) {
		return archive.Layer{Reason: err.Error()}, Outcome{NotLazy: err}, nil
	}
	if err != nil {
		return archive.Layer{}, Outcome{}, err
	}
	e, err := w.encoder.Encode(x)
	if err != nil {
		return archive.Layer{}, Outcome{}, err
	}
	if w.Cache != nil {
		if err := w.Cache.put(e, desc, w.Layer); err != nil {
			log.G(ctx).WithError(err).WithField("layer", desc.Digest).Warn("cannot keep the layer's index; it will be made again the next time")
		}
	}
	return e.Layer(), Outcome{}, nil
}

func (w *worker) build(ctx context.Context, desc ocispec.Descriptor, i int) (*layer.Index, error) {
	ra, err := w.provider.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	opts := w.Layer
	if w.Progress != nil {
		opts.Progress = func(n int64) { w.Progress.Read(i, n) }
	}
	return layer.Build(ctx, io.NewSectionReader(ra, 0, ra.Size()), desc, opts)
}

// largestFirst returns the numbers of the layers in the order in which to take
// them: by falling size, and those that are cached last.
func largestFirst(layers []ocispec.Descriptor, cached func(ocispec.Descriptor) bool) []int {
	order, work := make([]int, len(layers)), make([]int64, len(layers))
	for i, l := range layers {
		if order[i] = i; !cached(l) {
			work[i] = 1 + l.Size
		}
	}
	slices.SortStableFunc(order, func(a, b int) int {
		return cmp.Or(cmp.Compare(work[b], work[a]), cmp.Compare(layers[b].Size, layers[a].Size))
	})
	return order
}
