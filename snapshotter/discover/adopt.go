package discover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
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

// Stream is given the uncompressed stream of a layer that is being indexed.
type Stream interface {
	io.Writer
	// Done says that it was all of the layer diffID.
	Done(diffID digest.Digest)
	// Close says that nobody will add the layer any more.
	Close()
}

// adopt makes an archive for the image of which CLIP wrote the one at path.
//
// CLIP's archive has no layer indexes, and its file index is wrong where a tar
// says more than CLIP keeps. So every layer that no other image brought is
// streamed from the registry once, checked against the image's digests and
// indexed. The archive that comes out is kept for the next time, what was
// streamed for the layers that are added before r is forgotten.
func (f *Finder) adopt(ctx context.Context, r *result, ref string, manifest digest.Digest, path string) (*archive.Archive, error) {
	start := time.Now()
	fields := log.G(ctx).WithField("image", ref).WithField("path", path)
	fields.Info("indexing the layers of an archive that CLIP wrote")
	img, err := f.indexImage(ctx, r, ref, manifest, path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, errAdopting, err)
	}
	indexed := f.indexedPath(manifest)
	if err := os.MkdirAll(f.indexedDir(), 0o700); err != nil {
		return nil, err
	}
	if _, err := archive.WriteFile(indexed, img); err != nil {
		return nil, err
	}
	fields.WithField("indexed", indexed).WithField("took", time.Since(start)).Info("indexed the layers of an archive that CLIP wrote")
	return archive.OpenFile(indexed)
}

// indexedPath is where the archive is that adopt made for an image.
func (f *Finder) indexedPath(manifest digest.Digest) string {
	return filepath.Join(f.indexedDir(), manifest.Encoded()+".clip")
}

func (f *Finder) indexedDir() string { return filepath.Join(f.opts.Dir, ".indexed") }

// Sweep removes what the finder made of archives that are gone. Find does it, too.
func (f *Finder) Sweep(ctx context.Context) error {
	local, err := f.inspectAll(ctx)
	if err == nil {
		f.sweep(ctx, local)
	}
	return err
}

// sweep removes archives that adopt made for images of which CLIP's archive is
// gone. local is what is in Options.Dir now.
func (f *Finder) sweep(ctx context.Context, local []localFile) {
	paths, _ := filepath.Glob(filepath.Join(f.indexedDir(), "*.clip")) // the pattern is right
	for _, path := range paths {
		a, err := archive.OpenFile(path)
		needed := false
		if err == nil {
			info := a.Info()
			needed = slices.ContainsFunc(local, func(l localFile) bool { return l.isUpstream() && l.isOf(info.StorageRef, info.Descriptor.Digest) })
			a.Close()
		}
		if needed {
			continue
		}
		logger := log.G(ctx).WithField("path", path)
		if err := os.Remove(path); err != nil {
			logger.WithError(err).Warn("cannot remove the layer indexes of an archive that is gone")
			continue
		}
		logger.Info("removed the layer indexes of an archive that is gone")
	}
}

// indexImage streams the image that CLIP's archive at path is of.
func (f *Finder) indexImage(ctx context.Context, r *result, ref string, manifest digest.Digest, path string) (*archive.Image, error) {
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
	diffIDs, err := diffIDsOf(img.Config, len(m.Layers))
	if err != nil {
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
		if x := f.here(ctx, diffIDs[i], desc); x != nil {
			img.Layers[i].Index = x
			continue
		}
		g.Go(func() (err error) {
			b := <-buffers
			defer func() { buffers <- b }()
			img.Layers[i], err = f.indexOnce(ctx, r, fetcher, desc, b)
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
	if img, _ := u.Image(); !listsLayers(img, m) {
		return errOtherLayers
	}
	return nil
}

var errOtherLayers = fmt.Errorf("it lists other layers than the image's manifest: %w", errdefs.ErrInvalidArgument)

// listsLayers says whether CLIP's archive of img lists the layers of m.
func listsLayers(img archive.UpstreamImage, m ocispec.Manifest) bool {
	return slices.EqualFunc(img.Layers, m.Layers, func(listed string, l ocispec.Descriptor) bool { return listed == l.Digest.String() })
}

// diffIDsOf returns the diff IDs of an image's layers.
func diffIDsOf(config []byte, layers int) ([]digest.Digest, error) {
	var c ocispec.Image
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if len(c.RootFS.DiffIDs) != layers {
		return nil, fmt.Errorf("the image's config describes %d layers, its manifest %d: %w", len(c.RootFS.DiffIDs), layers, errdefs.ErrInvalidArgument)
	}
	return c.RootFS.DiffIDs, nil
}

// here returns the index of a layer that is on the node already, because of
// another image; nil if it is to be streamed. It is the index of these very
// bytes: the same stream may come in another compression.
func (f *Finder) here(ctx context.Context, diffID digest.Digest, desc ocispec.Descriptor) *layer.Index {
	if f.opts.Known == nil {
		return nil
	}
	x, err := f.opts.Known(diffID)
	if err == nil && x.Digest == desc.Digest {
		return x
	}
	if err != nil && !errdefs.IsNotFound(err) {
		log.G(ctx).WithError(err).WithField("layer", desc.Digest).Warn("a layer that is here cannot be made use of; it is streamed anew")
	}
	return nil
}

// streamed is a layer that is being streamed, or that was for an image that is
// still being added.
type streamed struct {
	done  chan struct{}
	layer archive.Layer // valid after done
	err   error         // valid after done
}

// indexOnce is indexLayer, unless that is being done for another image, or for
// this one, which may have a layer twice. What goes wrong there may not go
// wrong here.
func (f *Finder) indexOnce(ctx context.Context, r *result, fetcher remotes.Fetcher, desc ocispec.Descriptor, b *layer.Buffers) (archive.Layer, error) {
	for {
		f.mu.Lock()
		s, others := f.streamed[desc.Digest]
		if !others {
			s = &streamed{done: make(chan struct{})}
			f.streamed[desc.Digest] = s
		}
		f.mu.Unlock()
		if !others {
			s.layer, s.err = f.indexLayer(ctx, r, fetcher, desc, b)
			f.mu.Lock()
			if s.err == nil {
				r.layers = append(r.layers, desc.Digest)
			} else {
				delete(f.streamed, desc.Digest)
			}
			f.mu.Unlock()
			close(s.done)
			return s.layer, s.err
		}
		select {
		case <-s.done:
		case <-ctx.Done():
			return archive.Layer{}, context.Cause(ctx)
		}
		if s.err == nil {
			return s.layer, nil
		}
	}
}

// indexLayer streams a layer. One that is sound but cannot be read lazily has
// a reason instead of an index.
func (f *Finder) indexLayer(ctx context.Context, r *result, fetcher remotes.Fetcher, desc ocispec.Descriptor, b *layer.Buffers) (archive.Layer, error) {
	for attempt := 1; ; attempt++ {
		x, err := f.streamLayer(ctx, r, fetcher, desc, b)
		switch {
		case err == nil:
			return archive.Layer{Index: x}, nil
		case errors.Is(err, layer.ErrUnsupported):
			return archive.Layer{Reason: err.Error()}, nil
		case attempt == adoptAttempts, ctx.Err() != nil, errors.Is(err, inflate.ErrCorrupt):
			return archive.Layer{}, err
		}
		log.G(ctx).WithError(err).WithField("digest", desc.Digest).Warn("streaming a layer failed; trying again")
	}
}

func (f *Finder) streamLayer(ctx context.Context, r *result, fetcher remotes.Fetcher, desc ocispec.Descriptor, b *layer.Buffers) (*layer.Index, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(stallTimeout, func() { cancel(errStalled) })
	defer watch.Stop()
	rc, err := fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	opts := layer.Options{Buffers: b}
	if f.opts.Receive == nil {
		return layer.Build(ctx, watched{rc, watch}, desc, opts)
	}
	stream := f.opts.Receive()
	opts.Out = stream
	x, err := layer.Build(ctx, watched{rc, watch}, desc, opts)
	if err != nil {
		stream.Close()
		return nil, err
	}
	stream.Done(x.DiffID)
	f.mu.Lock()
	r.streams = append(r.streams, stream)
	f.mu.Unlock()
	return x, nil
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
