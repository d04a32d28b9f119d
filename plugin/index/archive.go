package index

import (
	"context"
	"fmt"

	"github.com/containerd/log"
	"github.com/containerd/platforms"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/plugin/export"
)

// Of is m with its storage reference, as indexers take it.
func Of(m export.Manifest, ref string) Image {
	return Image{
		StorageRef: ref, Platform: m.Platform, Descriptor: m.Descriptor,
		Manifest: m.Raw, Config: m.Config, Layers: m.Layers,
	}
}

// WriteArchive indexes m, an image of source, and writes its archive to path.
// ref is the remote reference to store. Layers that cannot be read lazily are
// logged with the reason.
func WriteArchive(ctx context.Context, source *export.Source, m export.Manifest, ref, path string, opts Options) (archive.Stats, error) {
	logger := log.G(ctx).WithField("image", source.Name).WithField("platform", platforms.Format(m.Platform))
	logger.WithField("source", source.Kind).WithField("storage-ref", ref).WithField("layers", len(m.Layers)).
		Info("indexing from local OCI layout with remote storage reference")
	img, err := Run(ctx, source.Provider, Of(m, ref), opts)
	if err != nil {
		return archive.Stats{}, fmt.Errorf("indexing %s: %w", source.Name, err)
	}
	for i, l := range img.Layers {
		if l.Index == nil {
			logger.WithField("layer", m.Layers[i].Digest).WithField("reason", l.Reason).Warn("workers will unpack this layer and those above it")
		}
	}
	for _, limit := range img.Limits() {
		logger.Warn(limit)
	}
	st, err := archive.WriteFile(path, img)
	if err != nil {
		return st, fmt.Errorf("writing the archive of %s: %w", source.Name, err)
	}
	return st, nil
}
