package discover

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
)

// Registry is asked for what CLIP's archives leave out.
type Registry interface {
	// Fetcher returns a fetcher for the repository of an image reference.
	Fetcher(ctx context.Context, ref string) (remotes.Fetcher, error)
	// Resolve returns what a reference names now.
	Resolve(ctx context.Context, ref string) (ocispec.Descriptor, error)
}

// Upstream fetches the manifest and config of the image of which CLIP wrote the
// archive at path: from the repository of ref, or of the archive's own storage
// reference if that is empty. The image has the layers that the archive lists;
// it is the one that the archive names by digest, if it does. Layers are not
// among what is returned.
func Upstream(ctx context.Context, registry Registry, path, ref string) (*archive.Image, error) {
	u, err := archive.OpenUpstreamFile(path)
	if err != nil {
		return nil, err
	}
	defer u.Close()
	of, ok := u.Image()
	if !ok {
		return nil, fmt.Errorf("archive %s holds data instead of an image; clipctl mount shows it: %w", path, errdefs.ErrInvalidArgument)
	}
	stored, err := reference.ParseNormalizedNamed(of.Ref) // CLIP spells docker.io in another way
	if err != nil {
		return nil, fmt.Errorf("storage reference %q: %w: %w", of.Ref, err, errdefs.ErrInvalidArgument)
	}
	switch {
	case ref == "":
		ref = stored.String()
	case of.Manifest == "" && !archive.SameRef(ref, of.Ref):
		return nil, fmt.Errorf("archive %s says of its image only that it is %s, and not its digest: it is that or none: %w", path, stored, errdefs.ErrFailedPrecondition)
	}
	fetcher, err := registry.Fetcher(ctx, ref)
	if err != nil {
		return nil, err
	}
	manifests := []digest.Digest{of.Manifest}
	if of.Manifest == "" {
		if manifests, err = resolved(ctx, registry, fetcher, ref); err != nil {
			return nil, err
		}
	}
	for _, manifest := range manifests {
		img, m, err := describe(ctx, fetcher, ref, manifest)
		if err != nil {
			return nil, fmt.Errorf("image %s in the repository of %s: %w", manifest, ref, err)
		}
		if listsLayers(of, m) {
			return img, nil
		}
	}
	return nil, fmt.Errorf("archive %s and image %s: %w", path, ref, errOtherLayers)
}

// resolved returns the manifests that ref names now, one for each platform.
func resolved(ctx context.Context, registry Registry, fetcher remotes.Fetcher, ref string) ([]digest.Digest, error) {
	ctx, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	desc, err := registry.Resolve(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	if !images.IsIndexType(desc.MediaType) {
		return []digest.Digest{desc.Digest}, nil
	}
	raw, err := fetchSmall(ctx, fetcher, desc)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	var manifests []digest.Digest
	for _, m := range index.Manifests {
		if m.Platform != nil && m.Platform.OS != "unknown" && len(manifests) < maxReferrers {
			manifests = append(manifests, m.Digest)
		}
	}
	return manifests, nil
}
