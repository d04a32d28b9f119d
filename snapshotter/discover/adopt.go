package discover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Indexing on the node.
const (
	// indexedSuffix marks an archive that was made from the one beside it.
	indexedSuffix = ".indexed.clip"
	// adoptWorkers is how many layers are streamed at once.
	adoptWorkers  = 3
	adoptAttempts = 3
	// stallTimeout ends a download from which nothing comes.
	stallTimeout = 60 * time.Second
)

// errAdopting is wrapped when indexing failed: an attempt is too dear to repeat
// for each layer of a pull.
var errAdopting = errors.New("making layer indexes for an archive that CLIP wrote")

var errStalled = fmt.Errorf("nothing arrived for %s: %w", stallTimeout, errdefs.ErrUnavailable)

// adopt makes an archive for the image of which CLIP wrote the one at path.
//
// CLIP's archive has no layer indexes, and its file index is wrong where a tar
// says more than CLIP keeps. So every layer is streamed from the registry once,
// checked against the image's digests and indexed. What comes out is kept
// beside the archive for the next time.
func (f *Finder) adopt(ctx context.Context, ref string, manifest digest.Digest, path string) (*archive.Archive, error) {
	start := time.Now()
	fields := log.G(ctx).WithField("image", ref).WithField("path", path)
	fields.Info("indexing the layers of an archive that CLIP wrote")
	img, err := f.indexImage(ctx, ref, manifest, path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, errAdopting, err)
	}
	indexed := strings.TrimSuffix(path, ".clip") + indexedSuffix
	if _, err := archive.WriteFile(indexed, img); err != nil {
		return nil, err
	}
	fields.WithField("indexed", indexed).WithField("took", time.Since(start)).Info("indexed the layers of an archive that CLIP wrote")
	return archive.OpenFile(indexed)
}

// indexImage streams the image that CLIP's archive at path is of.
func (f *Finder) indexImage(ctx context.Context, ref string, manifest digest.Digest, path string) (*archive.Image, error) {
	fetcher, err := f.opts.Fetcher(ctx, ref)
	if err != nil {
		return nil, err
	}
	img, m, err := describe(ctx, fetcher, ref, manifest)
	if err != nil {
		return nil, err
	}
	if err := sameLayers(path, m); err != nil {
		return nil, err
	}
	img.Layers = make([]archive.Layer, len(m.Layers))
	buffers := make(chan *layer.Buffers, adoptWorkers)
	for range adoptWorkers {
		buffers <- new(layer.Buffers)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(adoptWorkers)
	for i, desc := range m.Layers {
		g.Go(func() (err error) {
			b := <-buffers
			defer func() { buffers <- b }()
			img.Layers[i], err = indexLayer(ctx, fetcher, desc, b)
			return err
		})
	}
	return img, g.Wait()
}

// describe fetches manifest and config.
func describe(ctx context.Context, fetcher remotes.Fetcher, ref string, manifest digest.Digest) (*archive.Image, ocispec.Manifest, error) {
	ctx, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	var m ocispec.Manifest
	// Its size is not known: the most that is read takes the size's place.
	raw, err := fetchSmall(ctx, fetcher, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: manifest, Size: maxManifest})
	if err != nil {
		return nil, m, fmt.Errorf("manifest: %w", err)
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, m, fmt.Errorf("manifest: %w", err)
	}
	m.Config.URLs = nil
	config, err := fetchSmall(ctx, fetcher, m.Config)
	if err != nil {
		return nil, m, fmt.Errorf("config: %w", err)
	}
	img := &archive.Image{StorageRef: ref, Manifest: raw, Config: config, Descriptor: ocispec.Descriptor{
		MediaType: m.MediaType, Digest: manifest, Size: int64(len(raw)),
	}}
	if m.MediaType == "" {
		img.Descriptor.MediaType = ocispec.MediaTypeImageManifest
	}
	if err := json.Unmarshal(config, &img.Platform); err != nil {
		return nil, m, fmt.Errorf("config: %w", err)
	}
	return img, m, nil
}

// sameLayers makes sure that CLIP's archive at path is of the manifest that it names.
func sameLayers(path string, m ocispec.Manifest) error {
	u, err := archive.OpenUpstreamFile(path)
	if err != nil {
		return err
	}
	defer u.Close()
	img, _ := u.Image()
	same := len(img.Layers) == len(m.Layers)
	for i := 0; same && i < len(m.Layers); i++ {
		same = img.Layers[i] == m.Layers[i].Digest.String()
	}
	if !same {
		return fmt.Errorf("it lists other layers than the image's manifest: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// indexLayer streams a layer. One that is sound but cannot be read lazily has
// a reason instead of an index.
func indexLayer(ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor, b *layer.Buffers) (archive.Layer, error) {
	for attempt := 1; ; attempt++ {
		x, err := streamLayer(ctx, fetcher, desc, b)
		switch {
		case err == nil:
			return archive.Layer{Index: x}, nil
		case errors.Is(err, layer.ErrUnsupported):
			return archive.Layer{Reason: err.Error()}, nil
		case attempt == adoptAttempts, ctx.Err() != nil, errors.Is(err, inflate.ErrCorrupt):
			return archive.Layer{}, err
		}
		log.G(ctx).WithError(err).WithField("layer", desc.Digest).Warn("streaming a layer failed; trying again")
	}
}

func streamLayer(ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor, b *layer.Buffers) (*layer.Index, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(stallTimeout, func() { cancel(errStalled) })
	defer watch.Stop()
	rc, err := fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return layer.Build(ctx, watched{rc, watch}, desc, layer.Options{Buffers: b})
}

// watched is a reader that puts off the end of its time whenever something comes.
type watched struct {
	io.Reader
	watch *time.Timer
}

func (w watched) Read(p []byte) (int, error) {
	n, err := w.Reader.Read(p)
	if n > 0 {
		w.watch.Reset(stallTimeout)
	}
	return n, err
}
