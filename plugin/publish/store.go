package publish

import (
	"bytes"
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
)

// labelKept leads, in containerd's content store, from an image's manifest to
// the artifact that is its archive, and from that to the archive: its value is a
// digest. containerd's garbage collector follows it: the archive stays as long
// as the image, and goes with it.
const labelKept = "containerd.io/gc.ref.content.clip"

// Keep ties an artifact to the image manifest that it is of. Both are in the
// content store, and so is the artifact's archive. One that was tied before is
// let go.
func Keep(ctx context.Context, store content.Store, manifest digest.Digest, artifact ocispec.Descriptor) error {
	if err := writeBlob(ctx, store, ocispec.DescriptorEmptyJSON, ocispec.DescriptorEmptyJSON.Data); err != nil {
		return err
	}
	if err := labelChildren(ctx, store, artifact); err != nil {
		return err
	}
	_, err := store.Update(ctx, content.Info{Digest: manifest, Labels: map[string]string{labelKept: artifact.Digest.String()}}, "labels."+labelKept)
	if err != nil {
		return fmt.Errorf("labelling manifest %s: %w", manifest, err)
	}
	return nil
}

// Kept returns the digest of the artifact that Keep tied to a manifest. The
// error is errdefs.ErrNotFound if there is none.
func Kept(ctx context.Context, store content.Store, manifest digest.Digest) (digest.Digest, error) {
	info, err := store.Info(ctx, manifest)
	if err != nil {
		return "", fmt.Errorf("manifest %s: %w", manifest, err)
	}
	kept := digest.Digest(info.Labels[labelKept])
	if kept == "" {
		return "", fmt.Errorf("containerd's store has no archive of manifest %s (clipctl pull-archive fetches it): %w", manifest, errdefs.ErrNotFound)
	}
	return kept, kept.Validate()
}

// writeBlob stores b, unless it is there.
func writeBlob(ctx context.Context, store content.Store, desc ocispec.Descriptor, b []byte) error {
	err := content.WriteBlob(ctx, store, "clip-"+desc.Digest.String(), bytes.NewReader(b), desc)
	if err != nil {
		return fmt.Errorf("storing %s: %w", desc.Digest, err)
	}
	return nil
}

// labelChildren sets the labels by which garbage collection finds what a
// manifest or index refers to.
func labelChildren(ctx context.Context, store content.Store, desc ocispec.Descriptor) error {
	label := func(child ocispec.Descriptor) []string {
		if child.MediaType == archive.MediaType {
			return []string{labelKept} // "ctr content prune" takes away what layers have
		}
		return images.ChildGCLabels(child)
	}
	if _, err := images.SetChildrenMappedLabels(store, images.ChildrenHandler(store), label)(ctx, desc); err != nil {
		return fmt.Errorf("labelling %s: %w", desc.Digest, err)
	}
	return nil
}
