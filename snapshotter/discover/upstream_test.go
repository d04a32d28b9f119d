package discover

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

// rewrite changes what CLIP's archive at path says of its image.
func rewrite(t *testing.T, path string, change func(*common.OCIStorageInfo)) {
	t.Helper()
	m, err := clip.NewClipArchiver().ExtractMetadata(path)
	require.NoError(t, err)
	info := m.StorageInfo.(common.OCIStorageInfo)
	change(&info)
	require.NoError(t, clip.NewClipArchiver().CreateRemoteArchive(info, m, path))
}

// TestUpstream fetches manifest and config for archives that know their image by digest, and for those that do not: the
// layers tell which platform's they are.
func TestUpstream(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	s := startServer(t, true)
	f, registry := s.finder(t), remote.New(remote.Options{})
	img := s.pushed(t)
	foreign := testutil.NewPlatformImage(t, ocispec.Platform{OS: "linux", Architecture: "s390x"}, testutil.Tar(t, testutil.File{Name: "c", Data: "third"}))
	foreign.Push(t, s.host, repo)
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	index.SchemaVersion = 2
	for _, p := range []*testutil.Image{foreign, img} {
		d := p.Descriptor
		d.Platform = &p.Platform
		index.Manifests = append(index.Manifests, d)
	}
	testutil.PutManifest(t, s.host, repo, "both", index.MediaType, testutil.JSON(t, index))
	path := upstreamArchive(t, f, s.ref(), "")
	nameless := func(info *common.OCIStorageInfo) { info.ImageMetadata = nil }
	elsewhere := func(info *common.OCIStorageInfo) { info.RegistryURL = "registry.invalid" }
	both := func(info *common.OCIStorageInfo) { info.Reference = "both" }
	for name, c := range map[string]struct {
		change []func(*common.OCIStorageInfo)
		from   string
	}{
		"by digest":             {},
		"by reference":          {[]func(*common.OCIStorageInfo){nameless}, ""},
		"by reference to index": {[]func(*common.OCIStorageInfo){nameless, both}, ""},
		"digest, moved":         {[]func(*common.OCIStorageInfo){elsewhere}, s.ref()},
		"reference, spelled":    {[]func(*common.OCIStorageInfo){nameless}, s.ref()},
	} {
		upstreamArchive(t, f, s.ref(), "")
		for _, change := range c.change {
			rewrite(t, path, change)
		}
		before := s.gets()
		got, err := Upstream(t.Context(), registry, path, c.from)
		require.NoError(t, err, name)
		require.Equal(t, img.Manifest, got.Manifest, name)
		require.Equal(t, img.Config, got.Config, name)
		require.Equal(t, img.Descriptor.Digest, got.Descriptor.Digest, name)
		require.Equal(t, img.Descriptor.MediaType, got.Descriptor.MediaType, name)
		require.Equal(t, runtime.GOARCH, got.Platform.Architecture)
		require.Contains(t, got.StorageRef, s.host)
		require.LessOrEqual(t, s.gets()-before, 2, "configs, and no layer")
	}

	for name, c := range map[string]struct {
		change func(*common.OCIStorageInfo)
		from   string
		says   string
		is     error
	}{
		"other layers":    {func(info *common.OCIStorageInfo) { info.Layers = info.Layers[:1] }, "", "other layers", errdefs.ErrInvalidArgument},
		"not there":       {func(info *common.OCIStorageInfo) { info.ImageMetadata.Digest = digest.FromString("none").String() }, "", "not found", errdefs.ErrNotFound},
		"no such tag":     {func(info *common.OCIStorageInfo) { info.ImageMetadata, info.Reference = nil, "none" }, "", s.host, errdefs.ErrNotFound},
		"moved, nameless": {nameless, s.host + "/team/copy:1", "not its digest", errdefs.ErrFailedPrecondition},
		"not a reference": {func(info *common.OCIStorageInfo) { info.Repository = "Not A Name" }, "", "Not A Name", errdefs.ErrInvalidArgument},
	} {
		upstreamArchive(t, f, s.ref(), "")
		rewrite(t, path, c.change)
		_, err := Upstream(t.Context(), registry, path, c.from)
		require.ErrorIs(t, err, c.is, name)
		require.ErrorContains(t, err, c.says, name)
	}

	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("data"), 0o600))
	require.NoError(t, clip.CreateArchive(clip.CreateOptions{InputPath: dir, OutputPath: path}))
	_, err := Upstream(t.Context(), registry, path, "")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "clipctl mount")
}
