// Package publish puts archives where workers look for them.
package publish

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
)

// Push stores the archive at path beside its image in the repository of ref,
// as an OCI artifact whose subject is the image's manifest. It returns the
// artifact's digest and the bytes of the compressed archive. Pushing the same
// archive again changes nothing. Registries without the referrers API get the
// fallback tag that the OCI distribution spec describes.
//
// The image must be in the repository already: an archive is of no use
// without the layers. Credentials come from docker's config.
func Push(ctx context.Context, path, ref string) (digest.Digest, int64, error) {
	parsed, err := name.ParseReference(ref)
	if err != nil {
		return "", 0, fmt.Errorf("reference %q: %w", ref, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	repo := parsed.Context()
	p, err := load(path)
	if err != nil {
		return "", 0, err
	}
	opts := []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)}
	if _, err := remote.Head(repo.Digest(p.subject.Digest.String()), opts...); err != nil {
		return "", 0, fmt.Errorf("image %s must be in %s before its archive; push the image first: %w", p.subject.Digest, repo, registryError(err))
	}
	blob := static.NewLayer(p.blob, archive.MediaType)
	config := static.NewLayer([]byte("{}"), types.MediaType(ocispec.MediaTypeEmptyJSON))
	for _, l := range []v1.Layer{blob, config} {
		if err := remote.WriteLayer(repo, l, opts...); err != nil {
			return "", 0, fmt.Errorf("uploading to %s: %w", repo, registryError(err))
		}
	}
	m, err := p.artifact()
	if err != nil {
		return "", 0, err
	}
	id := digest.FromBytes(m)
	if err := remote.Put(repo.Digest(id.String()), m, opts...); err != nil {
		return "", 0, fmt.Errorf("uploading to %s: %w", repo, registryError(err))
	}
	return id, int64(len(p.blob)), nil
}

// packed is an archive as it is published.
type packed struct {
	subject  ocispec.Descriptor // the image's manifest
	recorded time.Time          // when its prefetch list was; zero if it has none
	blob     []byte             // zstd'ed
	tail     archive.Tail
}

// load checks the archive at path and packs it.
func load(path string) (p packed, err error) {
	a, err := archive.OpenFile(path)
	if err != nil {
		return p, err
	}
	defer a.Close()
	p.subject = a.Info().Descriptor
	list, err := a.Prefetch()
	if err != nil {
		return p, err
	}
	if list != nil {
		p.recorded = list.Recorded
	}
	p.blob, p.tail, err = a.Compress()
	return p, err
}

// manifest is a serialized artifact manifest.
type manifest []byte

// RawManifest implements remote.Taggable.
func (m manifest) RawManifest() ([]byte, error) { return m, nil }

// MediaType tells remote.Put what the manifest is.
func (m manifest) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

// artifact returns the manifest of an archive's artifact. An image may get
// another archive whenever a start of it is recorded; workers take the newest.
func (p packed) artifact() (manifest, error) {
	var annotations map[string]string
	if !p.recorded.IsZero() {
		annotations = map[string]string{ocispec.AnnotationCreated: p.recorded.UTC().Format(time.RFC3339)}
	}
	tail, err := json.Marshal(p.tail)
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
			MediaType:   archive.MediaType,
			Digest:      digest.FromBytes(p.blob),
			Size:        int64(len(p.blob)),
			Annotations: map[string]string{ocispec.AnnotationTitle: "image.clip", archive.AnnotationTail: string(tail)},
		}},
		Subject: &ocispec.Descriptor{MediaType: p.subject.MediaType, Digest: p.subject.Digest, Size: p.subject.Size},
	})
}

// registryError gives a registry's answer its errdefs kind.
func registryError(err error) error {
	var answer *transport.Error
	if !errors.As(err, &answer) {
		return errors.Join(err, errdefs.ErrUnavailable)
	}
	switch answer.StatusCode {
	case http.StatusNotFound:
		return fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%w (log in with docker or nerdctl login): %w", errdefs.ErrPermissionDenied, err)
	}
	return err
}
