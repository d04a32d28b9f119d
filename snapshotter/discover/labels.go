package discover

import (
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive"
)

// Labels that the snapshotter puts on the snapshots it keeps; "ctr snapshots
// --snapshotter clip info" and "clipctl status" show them.
const (
	// LabelLazy is "true" on a snapshot whose content is fetched when it is read.
	LabelLazy = "containerd.io/snapshot/clip.lazy"
	// LabelNotLazy says, on an ordinary snapshot of an image layer, why.
	LabelNotLazy = "containerd.io/snapshot/clip.not-lazy"
)

// LabelRecord, on an active snapshot of a lazy image, asks for a root of its own
// whose reads are recorded under the name that is the label's value. clipctl
// writes it; without it the snapshot stands on the root that all share.
const LabelRecord = "containerd.io/snapshot/clip.record"

// Target is what containerd says of the layer that it is about to unpack. Its
// unpacker writes these labels when the proxy plugin exports
// enable_remote_snapshot_annotations.
type Target struct {
	ChainID digest.Digest // what the snapshot will be called
	Layer   digest.Digest // the layer as it is in the registry; empty if containerd does not say
	// Above are the layers from this one on, as far as containerd lists them.
	Above []digest.Digest
	Image Image
}

// ErrNoTarget says that a snapshot is not prepared for unpacking a layer.
var ErrNoTarget = fmt.Errorf("not an image layer: %w", errdefs.ErrNotFound)

// ParseTarget reads the labels of a Prepare call. It returns ErrNoTarget if
// containerd does not offer to skip unpacking, and another error if it does
// but does not say of which image.
func ParseTarget(labels map[string]string) (Target, error) {
	t := Target{
		ChainID: digest.Digest(labels[snapshots.LabelSnapshotRef]),
		Layer:   digest.Digest(labels[snapshotters.TargetLayerDigestLabel]),
		Image: Image{
			Ref:      labels[snapshotters.TargetRefLabel],
			Manifest: digest.Digest(labels[snapshotters.TargetManifestDigestLabel]),
			Link:     digest.Digest(labels[archive.AnnotationLink]),
		},
	}
	if t.ChainID == "" {
		return t, ErrNoTarget
	}
	if list := labels[snapshotters.TargetImageLayersLabel]; list != "" {
		for _, d := range strings.Split(list, ",") {
			t.Above = append(t.Above, digest.Digest(d))
		}
	}
	if err := t.ChainID.Validate(); err != nil {
		return t, fmt.Errorf("chain ID %q: %w", t.ChainID, errdefs.ErrInvalidArgument)
	}
	if t.Image.Manifest == "" {
		return t, fmt.Errorf("containerd does not name the image (is enable_remote_snapshot_annotations = \"true\" among the exports of its proxy plugin?): %w", errdefs.ErrInvalidArgument)
	}
	if err := t.Image.Manifest.Validate(); err != nil {
		return t, fmt.Errorf("manifest digest %q: %w", t.Image.Manifest, errdefs.ErrInvalidArgument)
	}
	if t.Image.Link != "" && t.Image.Link.Validate() != nil {
		return t, fmt.Errorf("digest %q of the archive that the image links to: %w", t.Image.Link, errdefs.ErrInvalidArgument)
	}
	return t, nil
}

// LazyLabels returns what a lazy snapshot of an image's layer is labelled with that
// is made before containerd asks for it.
func LazyLabels(image Image, chainID digest.Digest) map[string]string {
	labels := map[string]string{snapshots.LabelSnapshotRef: chainID.String(), LabelLazy: "true"}
	for name, value := range map[string]string{
		snapshotters.TargetRefLabel:            image.Ref,
		snapshotters.TargetManifestDigestLabel: image.Manifest.String(),
		archive.AnnotationLink:                 image.Link.String(),
	} {
		if value != "" {
			labels[name] = value
		}
	}
	return labels
}
