package publish

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
)

// nowhere is a platform that no machine is of. Containerd pulls what an index
// lists for its platform or for none; with this one an artifact is part of an
// image and is pulled only by those who copy all of it.
var nowhere = ocispec.Platform{OS: "unknown", Architecture: "unknown"}

// Convertible is an image of one platform and its archive.
type Convertible struct {
	Manifest []byte // verbatim
	Platform ocispec.Platform
	Archive  *Artifact
}

// Convert makes, in containerd's content store, an image whose layers name
// their archive, and returns its index. Config and layers stay as they are and
// must be in the store; the manifests are new ones. The index lists the
// archives, too, so that whoever copies all of the image copies them.
//
// The caller holds a lease until an image leads to the index.
func Convert(ctx context.Context, store content.Store, all []Convertible) (ocispec.Descriptor, error) {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	var archives []ocispec.Descriptor
	for _, c := range all {
		m, err := link(c.Manifest, c.Archive.Descriptor.Digest)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		desc, err := write(ctx, store, ocispec.MediaTypeImageManifest, m)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		desc.Platform = &c.Platform
		index.Manifests = append(index.Manifests, desc)
		if err := c.Archive.store(ctx, store); err != nil {
			return ocispec.Descriptor{}, err
		}
		listed := c.Archive.Descriptor
		listed.Platform = &nowhere
		archives = append(archives, listed)
	}
	// Behind the images, for those who take the first of a list.
	index.Manifests = append(index.Manifests, archives...)
	return write(ctx, store, ocispec.MediaTypeImageIndex, index)
}

// link returns the manifest raw with the artifact's digest in its layers. Media
// types become those of OCI: Docker's have no annotations.
func link(raw []byte, artifact digest.Digest) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("manifest: %w", err)
	}
	m.MediaType = ocispec.MediaTypeImageManifest
	m.Config.MediaType = converter.ConvertDockerMediaTypeToOCI(m.Config.MediaType)
	m.Layers = slices.Clone(m.Layers)
	for i := range m.Layers {
		l := &m.Layers[i]
		l.MediaType = converter.ConvertDockerMediaTypeToOCI(l.MediaType)
		l.Annotations = maps.Clone(l.Annotations)
		if l.Annotations == nil {
			l.Annotations = map[string]string{}
		}
		l.Annotations[archive.AnnotationLink] = artifact.String()
	}
	return m, nil
}

// store writes the artifact to a content store.
func (a *Artifact) store(ctx context.Context, store content.Store) error {
	var m ocispec.Manifest
	if err := json.Unmarshal(a.manifest, &m); err != nil {
		return err
	}
	for _, b := range []struct {
		desc ocispec.Descriptor
		data []byte
	}{{m.Layers[0], a.blob}, {m.Config, m.Config.Data}, {a.Descriptor, a.manifest}} {
		if err := writeBlob(ctx, store, b.desc, b.data); err != nil {
			return err
		}
	}
	return labelChildren(ctx, store, a.Descriptor)
}

// write stores a document that refers to others.
func write(ctx context.Context, store content.Store, mediaType string, document any) (ocispec.Descriptor, error) {
	raw, err := json.Marshal(document)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	if err := writeBlob(ctx, store, desc, raw); err != nil {
		return desc, err
	}
	return desc, labelChildren(ctx, store, desc)
}
