// Package index turns an image at hand into an archive.
//
// Layers are indexed side by side, the largest first, so that the last one to
// end is a small one.
package index

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sort"

	"github.com/containerd/containerd/v2/core/content"
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
	// Done says that layer i is indexed, or why it cannot be read lazily.
	Done(i int, notLazy error)
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
	Layer    layer.Options
}

// Run reads img's layers from p and returns what to write as an archive. A
// layer that is sound but cannot be read lazily is recorded with the reason;
// any other failure ends the run.
func Run(ctx context.Context, p content.Provider, img Image, opts Options) (*archive.Image, error) {
	if opts.Workers == 0 {
		opts.Workers = runtime.GOMAXPROCS(0)
	}
	out := &archive.Image{
		StorageRef: img.StorageRef,
		Platform:   img.Platform,
		Descriptor: img.Descriptor,
		Manifest:   img.Manifest,
		Config:     img.Config,
		Layers:     make([]archive.Layer, len(img.Layers)),
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(opts.Workers)
	for _, i := range largestFirst(img.Layers) {
		g.Go(func() error {
			x, err := one(ctx, p, img.Layers[i], i, opts)
			if err != nil && !errors.Is(err, layer.ErrUnsupported) {
				return fmt.Errorf("layer %d of %d: %w", i+1, len(img.Layers), err)
			}
			if err != nil {
				out.Layers[i].Reason = err.Error()
			} else {
				out.Layers[i].Index = x
			}
			if opts.Progress != nil {
				opts.Progress.Done(i, err)
			}
			return nil
		})
	}
	return out, g.Wait()
}

func one(ctx context.Context, p content.Provider, desc ocispec.Descriptor, i int, opts Options) (*layer.Index, error) {
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
