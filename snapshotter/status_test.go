package snapshotter

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/snapshotter/control"
)

// TestFind tells whoever asks of the archive that a pull would use, and of the layers that are not lazy.
func TestFind(t *testing.T) {
	dir := t.TempDir()
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	image := control.Image{Ref: ref, Manifest: img.Descriptor.Digest}
	found, err := sn.Find(t.Context(), image)
	require.NoError(t, err)
	require.Equal(t, control.Archive{Layers: 2, Lazy: 2}, found)
	_, err = sn.Find(t.Context(), control.Image{Ref: ref, Manifest: digest.FromString("another")})
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	file := filepath.Join(dir, "archives", "a.clip")
	require.NoError(t, os.Remove(file))
	_, err = sn.Find(t.Context(), image)
	require.ErrorIs(t, err, errdefs.ErrNotFound, "what was found is not remembered")
	x, err := layer.Build(t.Context(), bytes.NewReader(img.Blobs[img.Layers[0].Digest]), img.Layers[0], layer.Options{})
	require.NoError(t, err)
	_, err = archive.WriteFile(file, &archive.Image{
		StorageRef: ref, Platform: img.Platform, Descriptor: img.Descriptor, Manifest: img.Manifest, Config: img.Config,
		Layers: []archive.Layer{{Index: x}, {Reason: "zstd window"}},
	})
	require.NoError(t, err)
	found, err = sn.Find(t.Context(), image)
	require.NoError(t, err)
	require.Equal(t, control.Archive{Layers: 2, Lazy: 1, NotLazy: "zstd window"}, found)
}
