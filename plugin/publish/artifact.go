package publish

import (
	"encoding/json"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
)

// Artifact is an archive in the form in which registries and containerd keep
// it: a manifest whose subject is the image's manifest, and the zstd'ed archive
// as its only layer.
type Artifact struct {
	Descriptor ocispec.Descriptor // of the artifact's manifest
	Subject    ocispec.Descriptor // of the image's manifest

	layers   []ocispec.Descriptor // of the image
	manifest []byte
	blob     []byte
}

// NewArtifact makes the artifact of the archive at path. The same archive
// becomes the same artifact.
func NewArtifact(path string) (*Artifact, error) {
	opened, err := archive.OpenFile(path)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	list, err := opened.Prefetch()
	if err != nil {
		return nil, err
	}
	var recorded time.Time // zero if nothing was
	if list != nil {
		recorded = list.Recorded
	}
	image, _ := opened.Manifest()
	desc := opened.Info().Descriptor
	a := &Artifact{layers: image.Layers, Subject: ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}}
	var parts archive.Parts
	if a.blob, parts, err = opened.Compress(); err != nil {
		return nil, err
	}
	if a.manifest, err = artifactManifest(a.Subject, recorded, a.blob, parts); err != nil {
		return nil, err
	}
	a.Descriptor = ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, ArtifactType: archive.ArtifactType,
		Digest: digest.FromBytes(a.manifest), Size: int64(len(a.manifest)),
	}
	return a, nil
}

// Size returns the bytes of the compressed archive.
func (a *Artifact) Size() int64 { return int64(len(a.blob)) }

// artifactManifest returns the manifest of an archive's artifact. An image may
// get another archive whenever a start of it is recorded; workers take the newest.
func artifactManifest(subject ocispec.Descriptor, recorded time.Time, blob []byte, parts archive.Parts) ([]byte, error) {
	var annotations map[string]string
	if !recorded.IsZero() {
		annotations = map[string]string{ocispec.AnnotationCreated: recorded.UTC().Format(time.RFC3339)}
	}
	where, err := json.Marshal(parts)
	if err != nil {
		return nil, err
	}
	return json.Marshal(ocispec.Manifest{
		Annotations:  annotations,
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: archive.ArtifactType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers: []ocispec.Descriptor{{
			MediaType: archive.MediaType,
			Digest:    digest.FromBytes(blob),
			Size:      int64(len(blob)),
			Annotations: map[string]string{
				ocispec.AnnotationTitle: "image.clip", archive.AnnotationParts: string(where), archive.AnnotationRevision: strconv.Itoa(archive.Revision),
			},
		}},
		Subject: &subject,
	})
}
