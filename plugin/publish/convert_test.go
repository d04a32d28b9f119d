package publish

import (
	"encoding/json"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// labels keeps the labels that containerd keeps in its database.
type labels map[digest.Digest]map[string]string

func (l labels) Get(d digest.Digest) (map[string]string, error) { return l[d], nil }

func (l labels) Set(d digest.Digest, m map[string]string) error {
	l[d] = m
	return nil
}

func (l labels) Update(d digest.Digest, m map[string]string) (map[string]string, error) {
	all := maps.Clone(l[d])
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, m)
	l[d] = all
	return all, nil
}

// TestConvert converts an image in Docker's format: what it names stays the same, and what it is called is OCI's.
func TestConvert(t *testing.T) {
	ctx := namespaces.WithNamespace(t.Context(), "test")
	kept := labels{}
	store, err := local.NewLabeledStore(t.TempDir(), kept)
	require.NoError(t, err)
	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "a", Data: "1"}), testutil.Tar(t, testutil.File{Name: "b", Data: "2"}))
	path := filepath.Join(t.TempDir(), "app.clip")
	img.WriteArchive(t, path, "registry.example.com/team/app:1")
	a, err := NewArtifact(path)
	require.NoError(t, err)
	docker := strings.NewReplacer(
		ocispec.MediaTypeImageManifest, images.MediaTypeDockerSchema2Manifest, ocispec.MediaTypeImageConfig, images.MediaTypeDockerSchema2Config,
		ocispec.MediaTypeImageLayerGzip, images.MediaTypeDockerSchema2LayerGzip,
	).Replace(string(img.Manifest))

	all := []Convertible{{Manifest: []byte(docker), Platform: img.Platform, Archive: a}}
	target, err := Convert(ctx, store, all)
	require.NoError(t, err)
	again, err := Convert(ctx, store, all)
	require.NoError(t, err)
	require.Equal(t, target, again)

	read := func(desc ocispec.Descriptor, v any) {
		raw, err := content.ReadBlob(ctx, store, desc)
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(raw, v))
	}
	var index ocispec.Index
	read(target, &index)
	require.Len(t, index.Manifests, 2)
	require.Equal(t, &img.Platform, index.Manifests[0].Platform)
	require.Equal(t, a.Descriptor.Digest, index.Manifests[1].Digest)
	require.Equal(t, &ocispec.Platform{OS: "unknown", Architecture: "unknown"}, index.Manifests[1].Platform)
	var was, is, artifact ocispec.Manifest
	require.NoError(t, json.Unmarshal(img.Manifest, &was))
	read(index.Manifests[0], &is)
	for i := range is.Layers {
		require.Equal(t, map[string]string{archive.AnnotationLink: a.Descriptor.Digest.String()}, is.Layers[i].Annotations)
		is.Layers[i].Annotations = nil
	}
	require.Equal(t, was, is)

	// Garbage collection finds all of it.
	read(index.Manifests[1], &artifact)
	values := func(d digest.Digest) (found []string) {
		for k, v := range kept[d] {
			require.True(t, strings.HasPrefix(k, "containerd.io/gc.ref.content."), k)
			found = append(found, v)
		}
		return found
	}
	require.ElementsMatch(t, []string{index.Manifests[0].Digest.String(), a.Descriptor.Digest.String()}, values(target.Digest))
	require.ElementsMatch(t, []string{was.Config.Digest.String(), was.Layers[0].Digest.String(), was.Layers[1].Digest.String()}, values(index.Manifests[0].Digest))
	require.ElementsMatch(t, []string{artifact.Config.Digest.String(), artifact.Layers[0].Digest.String()}, values(a.Descriptor.Digest))

	_, err = Kept(ctx, store, a.Descriptor.Digest)
	require.NoError(t, err, "the label is the same")
	_, err = Kept(ctx, store, index.Manifests[0].Digest)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorContains(t, err, "pull-archive")
	_, err = Convert(ctx, store, []Convertible{{Manifest: []byte("no manifest"), Archive: a}})
	require.ErrorContains(t, err, "manifest")
}
