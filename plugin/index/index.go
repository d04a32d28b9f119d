// Package index turns an image at hand into an archive.
//
// Layers are indexed side by side, the largest first, so that the last one to
// end is a small one. What was indexed once is taken from a cache: a digest
// names the same bytes for ever.
package index

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sort"

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
	Workers  int      // layers indexed at once; default one per processor
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
		opts.Workers = runtime.GOMAXPROCS(0)
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
	buffers := make(chan *layer.Buffers, opts.Workers)
	for range opts.Workers {
		buffers <- new(layer.Buffers)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(opts.Workers)
	for _, i := range largestFirst(img.Layers) {
		g.Go(func() error {
			opts := opts
			opts.Layer.Buffers = <-buffers
			defer func() { buffers <- opts.Layer.Buffers }()
			x, how, err := one(ctx, p, img.Layers[i], i, opts)
			if err != nil {
				return fmt.Errorf("layer %d of %d: %w", i+1, len(img.Layers), err)
			}
			out.Layers[i].Index = x
			if how.NotLazy != nil {
				out.Layers[i].Reason = how.NotLazy.Error()
			}
			if opts.Progress != nil {
				opts.Progress.Done(i, how)
			}
			return nil
		})
	}
	return out, g.Wait()
}

// one returns the index of layer i, or none if it cannot be read lazily.
func one(ctx context.Context, p content.Provider, desc ocispec.Descriptor, i int, opts Options) (*layer.Index, Outcome, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, Outcome{}, fmt.Errorf("digest %q: %w", desc.Digest, err)
	}
	if opts.Cache != nil && !opts.Force {
		if x := opts.Cache.get(ctx, desc, opts.Layer); x != nil {
			return x, Outcome{Cached: true}, nil
		}
	}
	x, err := build(ctx, p, desc, i, opts)
	if errors.Is(err, layer.ErrUnsupported) {
		return nil, Outcome{NotLazy: err}, nil
	}
	if err != nil {
		return nil, Outcome{}, err
	}
	if opts.Cache != nil {
		if err := opts.Cache.put(x, desc, opts.Layer); err != nil {
			log.G(ctx).WithError(err).WithField("layer", desc.Digest).Warn("cannot keep the layer's index; it will be made again the next time")
		}
	}
	return x, Outcome{}, nil
}

func build(ctx context.Context, p content.Provider, desc ocispec.Descriptor, i int, opts Options) (*layer.Index, error) {
	ra, err := p.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	lo := opts.Layer
	if opts.Progress != nil {
		lo.Progress = func(n int64) { opts.Progress.Read(i, n) }
	}
	return layer.Build(ctx, io.NewSectionReader(ra, 0, ra.Size()), desc, lo)
}

// largestFirst returns the numbers of the layers by falling size.
func largestFirst(layers []ocispec.Descriptor) []int {
	order := make([]int, len(layers))
	for i := range order {
		order[i] = i
	}
	sort.SliceStable(order, func(a, b int) bool { return layers[order[a]].Size > layers[order[b]].Size })
	return order
}
