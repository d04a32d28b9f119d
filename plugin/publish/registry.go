// Package publish puts archives where workers look for them.
package publish

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/beam-cloud/containerd-clip/archive"
)

// Push stores the archive at path beside its image in the repository of ref,
// as an OCI artifact whose subject is the image's manifest. It returns the
// artifact's digest and the bytes of the compressed archive. Pushing the same
// archive again changes nothing. Registries without the referrers API get the
// fallback tag that the OCI distribution spec describes.
//
// The image must be in the repository already, manifest and layers: an archive
// is of no use without them. Nothing is written before that is certain.
// Credentials come from docker's config.
func Push(ctx context.Context, path, ref string) (digest.Digest, int64, error) {
	parsed, err := name.ParseReference(ref)
	if err != nil {
		return "", 0, fmt.Errorf("reference %q: %w", ref, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	repo := parsed.Context()
	a, err := NewArtifact(path)
	if err != nil {
		return "", 0, err
	}
	opts := []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)}
	if err := checkImage(ctx, repo, a, opts); err != nil {
		return "", 0, err
	}
	blob := static.NewLayer(a.blob, archive.MediaType)
	config := static.NewLayer(ocispec.DescriptorEmptyJSON.Data, types.MediaType(ocispec.MediaTypeEmptyJSON))
	for _, l := range []v1.Layer{blob, config} {
		if err := remote.WriteLayer(repo, l, opts...); err != nil {
			return "", 0, fmt.Errorf("uploading to %s: %w", repo, registryError(err))
		}
	}
	if err := remote.Put(repo.Digest(a.Descriptor.Digest.String()), manifest(a.manifest), opts...); err != nil {
		return "", 0, fmt.Errorf("uploading to %s: %w", repo, registryError(err))
	}
	return a.Descriptor.Digest, int64(len(a.blob)), nil
}

// headsAtOnce is how many layers are asked for at the same time.
const headsAtOnce = 8

// checkImage makes sure that the image of an archive is in repo: its manifest
// and every layer, each of the size that the manifest says. The error names all
// layers that are not.
func checkImage(ctx context.Context, repo name.Repository, a *Artifact, opts []remote.Option) error {
	puller, err := remote.NewPuller(opts...)
	if err != nil {
		return err
	}
	if _, err := puller.Head(ctx, repo.Digest(a.Subject.Digest.String())); err != nil {
		return fmt.Errorf("image %s must be in %s before its archive; push the image first: %w", a.Subject.Digest, repo, registryError(err))
	}
	wrong := make([]string, len(a.layers))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(headsAtOnce)
	for i, l := range a.layers {
		g.Go(func() error {
			size, err := blobSize(ctx, puller, repo, l.Digest)
			switch err = registryError(err); {
			case errdefs.IsNotFound(err):
				wrong[i] = l.Digest.String()
			case err != nil:
				return fmt.Errorf("layer %s of image %s in %s: %w", l.Digest, a.Subject.Digest, repo, err)
			case size >= 0 && size != l.Size: // some registries do not say
				wrong[i] = fmt.Sprintf("%s (it has %d bytes there instead of %d)", l.Digest, size, l.Size)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if wrong = slices.DeleteFunc(wrong, func(s string) bool { return s == "" }); len(wrong) > 0 {
		return fmt.Errorf("image %s is not whole in %s, it lacks %s; push the image again before its archive: %w",
			a.Subject.Digest, repo, strings.Join(wrong, ", "), errdefs.ErrNotFound)
	}
	return nil
}

// blobSize asks how large a blob is; -1 if the registry has it and does not say.
func blobSize(ctx context.Context, puller *remote.Puller, repo name.Repository, d digest.Digest) (int64, error) {
	l, err := puller.Layer(ctx, repo.Digest(d.String()))
	if err != nil {
		return 0, err
	}
	return l.Size()
}

// manifest is a serialized artifact manifest.
type manifest []byte

// RawManifest implements remote.Taggable.
func (m manifest) RawManifest() ([]byte, error) { return m, nil }

// MediaType tells remote.Put what the manifest is.
func (m manifest) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

// registryError gives a registry's answer its errdefs kind.
func registryError(err error) error {
	if err == nil {
		return nil
	}
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
