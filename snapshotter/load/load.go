// Package load makes an image in containerd out of its archive alone.
//
// An archive has the image's manifest and config, and the indexes of its
// layers. Load puts the first two into containerd's content store and has the
// snapshotter make lazy snapshots of the last: what a pull would leave behind.
// No registry is asked for anything; that is for the first read of a file.
package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
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
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
)

// Loaded says what Load made.
type Loaded struct {
	Name   string             // of the image
	Target ocispec.Descriptor // its manifest, as it was built
	Layers int
}

// Load makes the image of the archive at path, in the namespace of ctx, called
// name; empty is the reference that the archive stores. snapshotter is what
// containerd calls ours, which must run on this machine. An image of that name
// becomes this one.
//
// It fails with errdefs.ErrFailedPrecondition if the image cannot be read
// lazily: then it must be pulled.
func Load(ctx context.Context, client *containerd.Client, snapshotter, path, name string) (Loaded, error) {
	a, err := archive.OpenFile(path)
	if err != nil {
		return Loaded{}, err
	}
	defer a.Close()
	info := a.Info()
	if name == "" {
		name = info.StorageRef
	}
	manifest, _ := a.Manifest()
	for i, l := range manifest.Layers {
		if reason := a.NotLazy(i); reason != "" {
			return Loaded{}, fmt.Errorf("layer %s of %s cannot be read lazily, pull the image: %s: %w", l.Digest, name, reason, errdefs.ErrFailedPrecondition)
		}
	}
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		return Loaded{}, err
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // it expires by itself
	remove, err := offer(ctx, client, snapshotter, path, info.Descriptor.Digest)
	if err != nil {
		return Loaded{}, err
	}
	defer remove()
	if err := prepare(ctx, client.SnapshotService(snapshotter), a); err != nil {
		return Loaded{}, fmt.Errorf("image %s: %w", name, err)
	}
	if err := writeContent(ctx, client.ContentStore(), a, snapshotter); err != nil {
		return Loaded{}, fmt.Errorf("image %s: %w", name, err)
	}
	target := ocispec.Descriptor{MediaType: info.Descriptor.MediaType, Digest: info.Descriptor.Digest, Size: info.Descriptor.Size}
	return Loaded{Name: name, Target: target, Layers: len(manifest.Layers)}, SetImage(ctx, client.ImageService(), name, target)
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
	dir := filepath.Join(root, "archives")
	out, err := os.CreateTemp(dir, ".load-")
	if err != nil {
		return nil, fmt.Errorf("the directory of the snapshotter's archives (is containerd-clip-grpc running on this machine?): %w", err)
	}
	defer os.Remove(out.Name())
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Close()); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "load-"+image.Encoded()+"-"+filepath.Base(out.Name())[len(".load-"):]+".clip")
	return func() { os.Remove(file) }, os.Rename(out.Name(), file)
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
func prepare(ctx context.Context, sn snapshots.Snapshotter, a *archive.Archive) error {
	info := a.Info()
	manifest, _ := a.Manifest()
	parent := ""
	for i, chainID := range a.ChainIDs() {
		key := fmt.Sprintf("extract-load-%s %s", info.Descriptor.Digest.Encoded()[:12], chainID)
		_, err := sn.Prepare(ctx, key, parent, snapshots.WithLabels(map[string]string{
			snapshots.LabelSnapshotRef:             chainID.String(),
			snapshots.LabelSnapshotDiffID:          a.DiffIDs()[i].String(),
			snapshotters.TargetRefLabel:            info.StorageRef,
			snapshotters.TargetManifestDigestLabel: info.Descriptor.Digest.String(),
			snapshotters.TargetLayerDigestLabel:    manifest.Layers[i].Digest.String(),
		}))
		if err == nil {
			err = errors.Join(errors.New("the snapshotter would unpack it; its log says why"), sn.Remove(ctx, key))
			return fmt.Errorf("layer %s is not lazy: %w: %w", manifest.Layers[i].Digest, err, errdefs.ErrFailedPrecondition)
		}
		if !errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("layer %s: %w", manifest.Layers[i].Digest, err)
		}
		if _, err := sn.Stat(ctx, chainID.String()); err != nil {
			return fmt.Errorf("layer %s: %w", manifest.Layers[i].Digest, err)
		}
		parent = chainID.String()
	}
	return nil
}

// writeContent stores config and manifest, labelled as a pull labels them, so
// that garbage collection finds what belongs to the image.
func writeContent(ctx context.Context, store content.Store, a *archive.Archive, snapshotter string) error {
	manifest, raw := a.Manifest()
	chainIDs := a.ChainIDs()
	config := map[string]string{}
	if len(chainIDs) > 0 {
		config["containerd.io/gc.ref.snapshot."+snapshotter] = chainIDs[len(chainIDs)-1].String()
	}
	if err := writeBlob(ctx, store, manifest.Config, a.Config(), config); err != nil {
		return err
	}
	labels := map[string]string{"containerd.io/gc.ref.content.config": manifest.Config.Digest.String()}
	for i, l := range manifest.Layers {
		labels["containerd.io/gc.ref.content.l."+strconv.Itoa(i)] = l.Digest.String()
	}
	return writeBlob(ctx, store, a.Info().Descriptor, raw, labels)
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
