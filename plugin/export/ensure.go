package export

import (
	"context"
	"fmt"
	"sync/atomic"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// maxFetches is how many blobs are fetched at once, containerd's own default.
const maxFetches = 3

// Ensured says what Ensure found.
type Ensured struct {
	Blobs   int   // fetched
	Bytes   int64 // in them
	Present int   // layers that were there
}

// Ensure has all content of the selected platforms of the image called name in
// containerd's content store: what is missing is fetched, by digest, so that
// the image stays what it is wherever its tag points now. After it the image
// can be exported and pushed, also if it was pulled lazily.
func Ensure(ctx context.Context, client *containerd.Client, name string, sel Selection, from remotes.Fetcher) (Ensured, error) {
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		return Ensured{}, fmt.Errorf("image %q: leasing its content: %w", name, err)
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // it expires by itself
	s, err := FromStore(ctx, client, name)
	if err != nil {
		return Ensured{}, err
	}
	defer s.Close()
	store := client.ContentStore()
	fetching := &fetchingProvider{Store: store, fetch: remotes.FetchHandler(store, from)}
	s.Provider = fetching
	manifests, err := s.Selected(ctx, sel)
	if err != nil {
		return Ensured{}, err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxFetches)
	layers := 0
	for _, m := range manifests {
		layers += len(m.Layers)
		for _, l := range m.Layers {
			g.Go(func() error {
				ra, err := fetching.ReaderAt(gctx, l)
				if err != nil {
					return fmt.Errorf("image %s: layer %s: %w", name, l.Digest, err)
				}
				return ra.Close()
			})
		}
	}
	err = g.Wait()
	e := Ensured{Blobs: int(fetching.blobs.Load()), Bytes: fetching.bytes.Load(), Present: layers - int(fetching.layers.Load())}
	if err != nil {
		return e, err
	}
	return e, keepChildren(ctx, store, s.Target, manifests)
}

// keepChildren sets the labels by which garbage collection finds what belongs
// to an image.
func keepChildren(ctx context.Context, store content.Store, target ocispec.Descriptor, manifests []Manifest) error {
	label := images.SetChildrenLabels(store, images.ChildrenHandler(store))
	for _, m := range manifests {
		if _, err := label(ctx, m.Descriptor); err != nil {
			return err
		}
	}
	_, err := label(ctx, target)
	return err
}

// fetchingProvider fetches what is missing before it is read.
type fetchingProvider struct {
	content.Store
	fetch images.HandlerFunc

	blobs, layers, bytes atomic.Int64 // fetched
}

func (p *fetchingProvider) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	ra, err := p.Store.ReaderAt(ctx, desc)
	if !errdefs.IsNotFound(err) {
		return ra, err
	}
	if _, err := p.fetch(ctx, desc); err != nil {
		return nil, fmt.Errorf("fetching %s: %w", desc.Digest, err)
	}
	p.blobs.Add(1)
	p.bytes.Add(desc.Size)
	if images.IsLayerType(desc.MediaType) {
		p.layers.Add(1)
	}
	return p.Store.ReaderAt(ctx, desc)
}
