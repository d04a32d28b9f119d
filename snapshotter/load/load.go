// Package load makes an image in containerd out of its archive alone.
//
// An archive has the image's manifest and config, and the indexes of its
// layers. Load puts the first two into containerd's content store and has the
// snapshotter make lazy snapshots of the last: what a pull would leave behind.
// No registry is asked for anything; that is for the first read of a file.
//
// CLIP's own archives have none of these. Manifest and config come from the
// registry, and the snapshotter streams the layers to index them.
package load

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
)

// Options says what to make of an archive.
type Options struct {
	// Snapshotter is what containerd calls ours, which must run on this machine.
	Snapshotter string
	// From is a reference whose repository has the image. Empty is the one that
	// the archive stores.
	From string
	// Name is the image's; empty is From. An image of that name becomes this one.
	Name string
	// Registry is asked for what CLIP's archives lack.
	Registry discover.Registry
}

// Loaded says what Load made.
type Loaded struct {
	Name   string             // of the image
	Target ocispec.Descriptor // its manifest, as it was built
	Layers int
}

// Load makes the image of the archive at path, in the namespace of ctx.
//
// It fails with errdefs.ErrFailedPrecondition if the image cannot be read
// lazily: then it must be pulled.
func Load(ctx context.Context, client *containerd.Client, path string, o Options) (Loaded, error) {
	img, err := open(ctx, path, o)
	if err != nil {
		return Loaded{}, err
	}
	name := cmp.Or(o.Name, img.ref)
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		return Loaded{}, err
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // it expires by itself
	remove, err := offer(ctx, client, o.Snapshotter, path, img.target.Digest)
	if err != nil {
		return Loaded{}, err
	}
	defer remove()
	if err := img.prepare(ctx, client.SnapshotService(o.Snapshotter)); err != nil {
		return Loaded{}, fmt.Errorf("image %s: %w", name, err)
	}
	if err := img.writeContent(ctx, client.ContentStore(), o.Snapshotter); err != nil {
		return Loaded{}, fmt.Errorf("image %s: %w", name, err)
	}
	return Loaded{Name: name, Target: img.target, Layers: len(img.manifest.Layers)}, SetImage(ctx, client.ImageService(), name, img.target)
}

// image is what containerd is to have.
type image struct {
	ref         string // reference whose repository has the layers
	target      ocispec.Descriptor
	raw, config []byte
	manifest    ocispec.Manifest
	diffIDs     []digest.Digest
}

// open reads the archive at path.
func open(ctx context.Context, path string, o Options) (image, error) {
	a, err := archive.OpenFile(path)
	if errors.Is(err, archive.ErrNoSections) {
		return openUpstream(ctx, path, o)
	}
	if err != nil {
		return image{}, err
	}
	defer a.Close()
	info := a.Info()
	img := image{ref: cmp.Or(o.From, info.StorageRef), config: a.Config(), diffIDs: a.DiffIDs()}
	img.target = ocispec.Descriptor{MediaType: info.Descriptor.MediaType, Digest: info.Descriptor.Digest, Size: info.Descriptor.Size}
	img.manifest, img.raw = a.Manifest()
	for i, l := range img.manifest.Layers {
		if reason := a.NotLazy(i); reason != "" {
			return img, fmt.Errorf("layer %s of %s cannot be read lazily, pull the image: %s: %w", l.Digest, img.ref, reason, errdefs.ErrFailedPrecondition)
		}
	}
	return img, nil
}

// openUpstream reads an archive that CLIP wrote, and the registry.
func openUpstream(ctx context.Context, path string, o Options) (image, error) {
	of, err := discover.Upstream(ctx, o.Registry, path, o.From)
	if err != nil {
		return image{}, fmt.Errorf("CLIP wrote this archive, without manifest and config, which must come from the image's registry (--from names another copy): %w", err)
	}
	img := image{ref: of.StorageRef, target: of.Descriptor, raw: of.Manifest, config: of.Config}
	var config ocispec.Image
	if err := errors.Join(json.Unmarshal(of.Manifest, &img.manifest), json.Unmarshal(of.Config, &config)); err != nil {
		return img, err
	}
	img.diffIDs = config.RootFS.DiffIDs
	if len(img.diffIDs) != len(img.manifest.Layers) {
		return img, fmt.Errorf("the config of image %s describes %d layers, its manifest %d: %w", of.StorageRef, len(img.diffIDs), len(img.manifest.Layers), errdefs.ErrInvalidArgument)
	}
	return img, nil
}

// offer puts a copy of the archive where the snapshotter looks for archives,
// until remove is called. Lazy snapshots do not need it any more.
func offer(ctx context.Context, client *containerd.Client, snapshotter, path string, image digest.Digest) (remove func(), err error) {
	root, err := rootOf(ctx, client, snapshotter)
	if err != nil {
		return nil, err
	}
	in, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	remove, err = discover.Offer(filepath.Join(root, "archives"), in, image)
	if err != nil {
		return nil, fmt.Errorf("the directory of the snapshotter's archives (is containerd-clip-grpc running on this machine?): %w", err)
	}
	return remove, nil
}

// rootOf returns the snapshotter's state directory, as containerd knows it.
func rootOf(ctx context.Context, client *containerd.Client, snapshotter string) (string, error) {
	resp, err := client.IntrospectionService().Plugins(ctx, fmt.Sprintf("type==%s,id==%s", plugins.SnapshotPlugin, snapshotter))
	if err != nil {
		return "", fmt.Errorf("asking containerd for its snapshotters: %w", err)
	}
	for _, p := range resp.Plugins {
		if root := p.Exports["root"]; root != "" {
			return root, nil
		}
	}
	return "", fmt.Errorf("containerd has no snapshotter %q with a root among its exports (config.toml.example registers it): %w", snapshotter, errdefs.ErrNotFound)
}

// prepare has the snapshotter make a lazy snapshot of each layer, as a pull does.
func (img image) prepare(ctx context.Context, sn snapshots.Snapshotter) error {
	parent := ""
	for i, chainID := range img.chainIDs() {
		layer := img.manifest.Layers[i].Digest
		key := fmt.Sprintf("extract-load-%s %s", img.target.Digest.Encoded()[:12], chainID)
		_, err := sn.Prepare(ctx, key, parent, snapshots.WithLabels(map[string]string{
			snapshots.LabelSnapshotRef:             chainID.String(),
			snapshots.LabelSnapshotDiffID:          img.diffIDs[i].String(),
			snapshotters.TargetRefLabel:            img.ref,
			snapshotters.TargetManifestDigestLabel: img.target.Digest.String(),
			snapshotters.TargetLayerDigestLabel:    layer.String(),
		}))
		if err == nil {
			err = errors.Join(errors.New("the snapshotter would unpack it; its log says why"), sn.Remove(ctx, key))
			return fmt.Errorf("layer %s is not lazy: %w: %w", layer, err, errdefs.ErrFailedPrecondition)
		}
		if !errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("layer %s: %w", layer, err)
		}
		if _, err := sn.Stat(ctx, chainID.String()); err != nil {
			return fmt.Errorf("layer %s: %w", layer, err)
		}
		parent = chainID.String()
	}
	return nil
}

// chainIDs are what containerd calls the layers' snapshots.
func (img image) chainIDs() []digest.Digest { return identity.ChainIDs(slices.Clone(img.diffIDs)) }

// writeContent stores config and manifest, labelled as a pull labels them, so
// that garbage collection finds what belongs to the image.
func (img image) writeContent(ctx context.Context, store content.Store, snapshotter string) error {
	config := map[string]string{}
	if chainIDs := img.chainIDs(); len(chainIDs) > 0 {
		config["containerd.io/gc.ref.snapshot."+snapshotter] = chainIDs[len(chainIDs)-1].String()
	}
	if err := writeBlob(ctx, store, img.manifest.Config, img.config, config); err != nil {
		return err
	}
	labels := map[string]string{"containerd.io/gc.ref.content.config": img.manifest.Config.Digest.String()}
	for i, l := range img.manifest.Layers {
		labels["containerd.io/gc.ref.content.l."+strconv.Itoa(i)] = l.Digest.String()
	}
	return writeBlob(ctx, store, img.target, img.raw, labels)
}

func writeBlob(ctx context.Context, store content.Store, desc ocispec.Descriptor, b []byte, labels map[string]string) error {
	err := content.WriteBlob(ctx, store, "load-"+desc.Digest.String(), strings.NewReader(string(b)), desc, content.WithLabels(labels))
	if err != nil {
		return fmt.Errorf("storing %s: %w", desc.Digest, err)
	}
	var paths []string
	for k := range labels {
		paths = append(paths, "labels."+k)
	}
	if len(paths) == 0 {
		return nil
	}
	_, err = store.Update(ctx, content.Info{Digest: desc.Digest, Labels: labels}, paths...) // it may have been there
	return err
}

// SetImage has an image's name stand for target, whatever it stood for before.
func SetImage(ctx context.Context, store images.Store, name string, target ocispec.Descriptor) error {
	image := images.Image{Name: name, Target: target}
	_, err := store.Create(ctx, image)
	if errdefs.IsAlreadyExists(err) {
		_, err = store.Update(ctx, image, "target")
	}
	return err
}
