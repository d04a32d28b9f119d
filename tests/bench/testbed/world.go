package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// World is a registry with the images, and the sites that pull from it.
type World struct {
	Lab      *harness.Lab
	Registry *harness.Registry
	Cache    string // directory of what is kept between runs
	Layout   string // directory of the layout with image M
	Rounds   int

	Whole      Image // image M of docs/benchmarks.md
	One, Forty Image // of so many layers

	sites int // made so far
}

// Image is one in the registry, with its archive.
type Image struct {
	v1.Image
	Name, Ref string
	Bytes     int64          // of the layers, compressed
	Index     harness.Result // of `clipctl index`
	Archive   int64          // bytes that it added to the registry
}

// New starts a registry and puts the images and their archives into it. The caller closes its lab.
func New(ctx context.Context, rounds int) (_ *World, err error) {
	options, err := harness.Installed()
	if err != nil {
		return nil, err
	}
	cache := filepath.Join(filepath.Dir(options.Parts), "images")
	dir, err := images.Bench(ctx, cache)
	if err != nil {
		return nil, err
	}
	lab, err := harness.NewLab(options)
	if err != nil {
		return nil, err
	}
	w := &World{Lab: lab, Cache: cache, Layout: dir, Rounds: rounds}
	if err := w.publishAll(ctx); err != nil {
		return nil, errors.Join(err, lab.Close())
	}
	return w, nil
}

func (w *World) publishAll(ctx context.Context) (err error) {
	if w.Registry, err = w.Lab.StartRegistry(ctx); err != nil {
		return err
	}
	Say("pushing and indexing the images")
	m, err := ReadImage(w.Layout, images.ShortName(images.BenchGzip))
	if err != nil {
		return err
	}
	if w.Whole, err = w.Publish(ctx, "whole", m); err != nil {
		return err
	}
	if w.One, err = w.PublishStacked(ctx, "one", 1, 1); err != nil {
		return err
	}
	w.Forty, err = w.PublishStacked(ctx, "forty", 1, 40)
	return err
}

// ReadImage reads an image of a layout.
func ReadImage(dir, tag string) (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, d := range manifest.Manifests {
		if d.Annotations[ocispec.AnnotationRefName] == tag {
			return index.Image(d.Digest)
		}
	}
	return nil, fmt.Errorf("%s has no image %s", dir, tag)
}

// LayoutTag is the tag of the image in a layout of WriteLayout.
const LayoutTag = "it"

// WriteLayout makes a layout with one image.
func WriteLayout(dir string, img v1.Image) error {
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return l.AppendImage(img, layout.WithAnnotations(map[string]string{ocispec.AnnotationRefName: LayoutTag}))
}

// PublishStacked publishes an image of n layers: the lowest ones of image M, and small ones on top.
func (w *World) PublishStacked(ctx context.Context, short string, lowest, n int) (Image, error) {
	below, err := w.Whole.Layers()
	if err != nil {
		return Image{}, err
	}
	img, err := mutate.ConfigFile(mutate.MediaType(empty.Image, types.OCIManifestSchema1), &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH})
	if err != nil {
		return Image{}, err
	}
	all := slices.Clone(below[:lowest])
	for i := lowest; i < n; i++ {
		small, err := tarball.LayerFromOpener(images.SmallLayer(i), tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return Image{}, err
		}
		all = append(all, small)
	}
	if img, err = mutate.AppendLayers(img, all...); err != nil {
		return Image{}, err
	}
	return w.Publish(ctx, short, img)
}

// Ref is how an image is called in the registry.
func (w *World) Ref(short string) string { return w.Registry.Ref("bench/" + short + ":1") }

// Publish pushes an image and its archive.
func (w *World) Publish(ctx context.Context, short string, img v1.Image) (p Image, err error) {
	p = Image{Image: img, Name: short, Ref: w.Ref(short)}
	ref, err := name.ParseReference(p.Ref)
	if err != nil {
		return p, err
	}
	if err := remote.Write(ref, img, remote.WithContext(ctx)); err != nil {
		return p, fmt.Errorf("pushing %s: %w", p.Ref, err)
	}
	manifest, err := img.Manifest()
	if err != nil {
		return p, err
	}
	for _, l := range manifest.Layers {
		p.Bytes += l.Size
	}
	dir := w.Lab.Path("layouts", short)
	if err := WriteLayout(dir, img); err != nil {
		return p, err
	}
	p.Archive, err = w.Added(func() (err error) {
		p.Index, err = w.Lab.Run(ctx, "clipctl", "index", "oci:"+dir+":"+LayoutTag, "--storage-ref", p.Ref, "--push")
		return err
	})
	return p, errors.Join(err, os.RemoveAll(dir))
}

// Added is how many bytes push adds to what the registry stores.
func (w *World) Added(push func() error) (int64, error) {
	before, err := w.Registry.StoredBytes()
	if err != nil {
		return 0, err
	}
	if err := push(); err != nil {
		return 0, err
	}
	after, err := w.Registry.StoredBytes()
	return after - before, err
}

// Say tells on stderr what goes on.
func Say(format string, args ...any) { fmt.Fprintf(os.Stderr, "==> "+format+"\n", args...) }
