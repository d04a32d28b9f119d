package plugin

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/containerd/v2/core/transfer/plugins"
	containerdplugins "github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/containerd/typeurl/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/plugin/export"
)

// TestRegistered finds in containerd's registries what importing the package puts there.
func TestRegistered(t *testing.T) {
	wired, err := typeurl.MarshalAny(&wire{Layout: "/layout"})
	require.NoError(t, err)
	require.Equal(t, "cloud.beam.clip/transfer.v1/Export", wired.GetTypeUrl())
	made, err := plugins.ResolveType(wired)
	require.NoError(t, err)
	require.IsType(t, &Export{}, made)
	var types []plugin.Type
	for _, r := range registry.Graph(func(*plugin.Registration) bool { return false }) {
		types = append(types, r.Type)
	}
	require.Contains(t, types, containerdplugins.InternalPlugin)
	require.NotContains(t, types, containerdplugins.TransferPlugin, "never a second transferrer")
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	t.Cleanup(func() { settings.Store(nil) })
	ic := &plugin.InitContext{Properties: map[string]string{containerdplugins.PropertyRootDir: filepath.Join(dir, "root")}, Config: &Config{Workers: 3}}
	_, err := load(ic)
	require.NoError(t, err)
	require.DirExists(t, filepath.Join(dir, "root"))
	require.Equal(t, 3, settings.Load().Workers)
	ic.Config = &Config{CacheDir: filepath.Join(dir, "cache")}
	_, err = load(ic)
	require.NoError(t, err)
	require.DirExists(t, filepath.Join(dir, "cache"))
	require.Zero(t, settings.Load().Workers, "the default")
	ic.Config = &Config{CacheDir: "/proc/self/exe"}
	_, err = load(ic)
	require.Error(t, err)
}

// TestExport exports out of a content store, as containerd calls it.
func TestExport(t *testing.T) {
	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "a", Data: "1"}), testutil.Tar(t, testutil.File{Name: "b", Data: "2"}))
	store, err := local.NewStore(filepath.Join(t.TempDir(), "store"))
	require.NoError(t, err)
	for d, b := range img.Blobs {
		require.NoError(t, content.WriteBlob(t.Context(), store, d.String(), strings.NewReader(string(b)), ocispec.Descriptor{Digest: d, Size: int64(len(b))}))
	}
	record := images.Image{Name: "example.com/app:1", Target: img.Descriptor}
	var b bytes.Buffer
	var events []transfer.Progress
	layout := filepath.Join(t.TempDir(), "layout")
	e := NewExport(ExportOptions{Archive: &b, Layout: layout, StorageRef: "registry.example.com/app:1", Progress: func(p transfer.Progress) { events = append(events, p) }})
	require.NoError(t, e.Export(t.Context(), store, []images.Image{record}))
	require.NoError(t, e.Wait())
	a, err := archive.Open(bytes.NewReader(b.Bytes()), int64(b.Len()))
	require.NoError(t, err)
	require.Equal(t, img.Descriptor.Digest, a.Info().Descriptor.Digest)
	require.Equal(t, "registry.example.com/app:1", a.Info().StorageRef)
	s, err := export.FromLayout(layout, "1")
	require.NoError(t, err)
	require.Equal(t, img.Descriptor.Digest, s.Target.Digest)

	var indexed []string
	for _, p := range events {
		if p.Event == "indexed" {
			indexed = append(indexed, p.Name)
			require.Equal(t, []string{"example.com/app:1"}, p.Parents)
			require.Equal(t, p.Total, p.Progress)
			require.Equal(t, p.Desc.Size, p.Total)
		}
	}
	require.ElementsMatch(t, []string{img.Layers[0].Digest.String(), img.Layers[1].Digest.String()}, indexed)
	last := events[len(events)-1]
	require.Equal(t, "complete", last.Event)
	require.Equal(t, int64(b.Len()), last.Total)

	for _, imgs := range [][]images.Image{nil, {record, record}} {
		require.ErrorIs(t, NewExport(ExportOptions{Archive: &b}).Export(t.Context(), store, imgs), errdefs.ErrInvalidArgument)
	}
}
