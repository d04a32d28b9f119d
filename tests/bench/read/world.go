package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// Snapshotters.
const (
	ours  = "clip"
	plain = "overlayfs"
)

// world is a registry with the images, and the sites that pull from it.
type world struct {
	lab      *harness.Lab
	registry *harness.Registry
	layout   string // directory of the layout with image M
	rounds   int
	sites    int // made so far

	whole               image // image M of docs/benchmarks.md
	one, forty, hundred image // of so many layers
}

// image is one in the registry, with its archive.
type image struct {
	ref  string
	size int64 // of the layers, compressed
}

func newWorld(ctx context.Context, rounds int) (_ *world, err error) {
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
	w := &world{lab: lab, layout: dir, rounds: rounds}
	if err := w.publishAll(ctx); err != nil {
		return nil, errors.Join(err, lab.Close())
	}
	return w, nil
}

// publishAll puts the images and their archives into the registry.
func (w *world) publishAll(ctx context.Context) (err error) {
	if w.registry, err = w.lab.StartRegistry(ctx); err != nil {
		return err
	}
	say("pushing and indexing the images")
	m, err := readImage(w.layout, images.ShortName(images.BenchGzip))
	if err != nil {
		return err
	}
	layers, err := m.Layers()
	if err != nil {
		return err
	}
	if w.whole, err = w.publish(ctx, "whole", m); err != nil {
		return err
	}
	for _, made := range []struct {
		to     *image
		name   string
		below  []v1.Layer
		layers int
	}{
		{&w.one, "one", layers[:1], 1},
		{&w.forty, "forty", layers[:1], 40},
		{&w.hundred, "hundred", layers[:3], 100},
	} {
		img, err := stacked(made.below, made.layers)
		if err != nil {
			return err
		}
		if *made.to, err = w.publish(ctx, made.name, img); err != nil {
			return err
		}
	}
	return nil
}

// readImage reads an image of a layout.
func readImage(dir, tag string) (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, d := range manifest.Manifests {
		if d.Annotations["org.opencontainers.image.ref.name"] == tag {
			return index.Image(d.Digest)
		}
	}
	return nil, fmt.Errorf("%s has no image %s", dir, tag)
}

// stacked is an image of n layers: those given, and small ones on top.
func stacked(below []v1.Layer, n int) (v1.Image, error) {
	img, err := mutate.ConfigFile(mutate.MediaType(empty.Image, types.OCIManifestSchema1), &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH})
	if err != nil {
		return nil, err
	}
	all := slices.Clone(below)
	for i := len(below); i < n; i++ {
		small, err := tarball.LayerFromOpener(images.SmallLayer(i), tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return nil, err
		}
		all = append(all, small)
	}
	return mutate.AppendLayers(img, all...)
}

// publish pushes an image and its archive.
func (w *world) publish(ctx context.Context, short string, img v1.Image) (p image, err error) {
	p.ref = w.registry.Ref("bench/" + short + ":1")
	ref, err := name.ParseReference(p.ref)
	if err != nil {
		return p, err
	}
	if err := remote.Write(ref, img, remote.WithContext(ctx)); err != nil {
		return p, fmt.Errorf("pushing %s: %w", p.ref, err)
	}
	manifest, err := img.Manifest()
	if err != nil {
		return p, err
	}
	for _, l := range manifest.Layers {
		p.size += l.Size
	}
	dir := w.lab.Path("layouts", short)
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return p, err
	}
	if err := l.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "it"})); err != nil {
		return p, err
	}
	if _, err = w.lab.Run(ctx, "clipctl", "index", "oci:"+dir+":it", "--storage-ref", p.ref, "--push"); err != nil {
		return p, err
	}
	return p, os.RemoveAll(dir)
}

// site is a containerd.
type site struct {
	*harness.Containerd
	daemon      *harness.Daemon // nil with overlayfs
	snapshotter string

	world *world
	names []string // of what runs
	execs int
}

// open starts a site with a snapshotter, and ours with a configuration.
func (w *world) open(ctx context.Context, snapshotter, config string) (s *site, err error) {
	w.sites++
	s = &site{snapshotter: snapshotter, world: w}
	if snapshotter == ours {
		name := fmt.Sprint("d", w.sites)
		s.names = append(s.names, name)
		if s.daemon, err = w.lab.StartDaemon(ctx, name, config); err != nil {
			return nil, err
		}
	}
	name := fmt.Sprint("c", w.sites)
	s.names = append(s.names, name)
	s.Containerd, err = w.lab.StartContainerd(ctx, name, s.daemon)
	unix.Sync() // what earlier sites have left to write is not this one's business
	return s, err
}

// close ends a site and removes what it has, so that the next one finds the disk as this one did.
func (s *site) close(ctx context.Context, images ...string) error {
	s.world.registry.Shape(harness.Link{})
	errs := []error{s.RemoveContainers(ctx)}
	for _, ref := range images {
		_, err := s.Ctr(ctx, "image", "rm", "--sync", ref)
		errs = append(errs, err)
	}
	errs = append(errs, s.Containerd.Stop())
	if s.daemon != nil {
		errs = append(errs, s.daemon.Stop())
	}
	for _, name := range s.names {
		dir := s.world.lab.Path(name)
		for _, m := range slices.Backward(harness.MountsUnder(dir)) {
			errs = append(errs, unix.Unmount(m, unix.MNT_DETACH))
		}
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// pull pulls an image.
func (s *site) pull(ctx context.Context, ref string) (harness.Result, error) {
	return s.Ctr(ctx, "image", "pull", "--snapshotter", s.snapshotter, ref)
}

// run runs a command in a container of its own.
func (s *site) run(ctx context.Context, ref string, command ...string) (harness.Result, error) {
	return s.RunContainer(ctx, s.snapshotter, ref, fmt.Sprint("run-", rand.Uint32()), command...)
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "==> "+format+"\n", args...) }
