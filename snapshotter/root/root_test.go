package root

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/erofs"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/snapshotter/layerfs"
)

func newFS(t *testing.T) *layerfs.FS {
	t.Helper()
	files, err := layerfs.New(t.Context())
	require.NoError(t, err, "this test needs root and /dev/fuse")
	t.Cleanup(func() { require.NoError(t, files.Close()) })
	return files
}

// mounts lists the mount points below dir.
func mounts(t *testing.T, dir string) []string {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	require.NoError(t, err)
	var points []string
	for _, m := range infos {
		points = append(points, m.Mountpoint)
	}
	return points
}

// testLayer is a layer of one block with one file, in files.
func testLayer(t *testing.T, files *layerfs.FS, name, content string) *layer.Index {
	t.Helper()
	block := bytes.Repeat([]byte{0}, 512)
	copy(block, content)
	id := digest.FromBytes(block)
	require.NoError(t, files.Add(id, probeFile{bytes.NewReader(block)}))
	t.Cleanup(func() { files.Remove(id) })
	return &layer.Index{DiffID: id, OutSize: 512, Entries: []layer.Entry{
		{Name: name, Type: layer.TypeReg, Mode: 0o644, Size: int64(len(content))},
	}}
}

func TestProbe(t *testing.T) {
	files, dir := newFS(t), t.TempDir()
	require.NoError(t, Probe(t.Context(), dir, files))
	require.Empty(t, mounts(t, dir))
	_, err := os.Stat(files.Path(digest.FromBytes(probeBlock)))
	require.Error(t, err, "the probe's layer is gone")
	require.Error(t, Probe(t.Context(), "/proc", files))
}

func TestMount(t *testing.T) {
	files, dir := newFS(t), t.TempDir()
	image, target := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	layers := []*layer.Index{testLayer(t, files, "low", "of the lower layer"), testLayer(t, files, "high", "of the upper layer")}
	require.NoError(t, Build(image, layers))
	require.NoError(t, os.Mkdir(target, 0o755))
	devices := []string{files.Path(layers[0].DiffID), files.Path(layers[1].DiffID)}
	require.NoError(t, Mount(t.Context(), image, target, devices))
	require.Equal(t, []string{target}, mounts(t, dir))
	for name, want := range map[string]string{"low": "of the lower layer", "high": "of the upper layer"} {
		got, err := os.ReadFile(filepath.Join(target, erofs.RootDir, name))
		require.NoError(t, err)
		require.Equal(t, want, string(got))
	}
	require.Error(t, os.WriteFile(filepath.Join(target, erofs.RootDir, "new"), nil, 0o644), "a root is read-only")

	// Somebody still has a file open.
	f, err := os.Open(filepath.Join(target, erofs.RootDir, "low"))
	require.NoError(t, err)
	require.NoError(t, Unmount(target))
	require.Empty(t, mounts(t, dir))
	require.NoError(t, f.Close())
	require.NoError(t, Unmount(target), "nothing is mounted")
	require.NoError(t, Unmount(filepath.Join(dir, "nowhere")))
}

func TestDamage(t *testing.T) {
	files, dir := newFS(t), t.TempDir()
	x := testLayer(t, files, "file", "content")
	whole := filepath.Join(dir, "whole")
	require.NoError(t, Build(whole, []*layer.Index{x}))
	raw, err := os.ReadFile(whole)
	require.NoError(t, err)
	const superblock = 1024
	altered := bytes.Clone(raw)
	altered[superblock+4] ^= 1 // its checksum
	noMagic := bytes.Clone(raw)
	copy(noMagic[superblock:], "none")

	target := filepath.Join(dir, "mnt")
	require.NoError(t, os.Mkdir(target, 0o755))
	device := files.Path(x.DiffID)
	for name, c := range map[string]struct {
		image   []byte
		devices []string
		is      error
	}{
		"checksum":          {altered, []string{device}, unix.EBADMSG},
		"magic":             {noMagic, []string{device}, unix.EINVAL},
		"too many devices":  {raw, []string{device, device}, unix.EINVAL},
		"device is no file": {raw, []string{"/nowhere"}, unix.ENOENT},
		"empty":             {nil, []string{device}, unix.EINVAL},
	} {
		t.Run(name, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "image")
			require.NoError(t, os.WriteFile(image, c.image, 0o600))
			err := Mount(t.Context(), image, target, c.devices)
			require.ErrorIs(t, err, c.is)
			require.ErrorContains(t, err, image)
			require.Empty(t, mounts(t, dir))
		})
	}
	require.Error(t, Mount(t.Context(), filepath.Join(dir, "nowhere"), target, nil))
	require.Error(t, Mount(t.Context(), whole, filepath.Join(dir, "nowhere"), []string{device}), "no mount point")
	require.Empty(t, mounts(t, dir))
	require.NoError(t, Mount(t.Context(), whole, target, []string{device}))
	require.NoError(t, Unmount(target))
}

// TestKernelSays uses an option that no kernel knows.
func TestKernelSays(t *testing.T) {
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(fd)
	err = unix.FsconfigSetString(fd, "nonsense", "1")
	require.ErrorIs(t, err, unix.EINVAL)
	said := kernelSays(fd, err)
	require.ErrorIs(t, said, unix.EINVAL)
	require.ErrorContains(t, said, "nonsense")
	require.Equal(t, err, kernelSays(fd, err), "it says everything once")
}

func TestBuildFailureLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	bad := &layer.Index{DiffID: digest.FromString("x"), OutSize: 512, Entries: []layer.Entry{
		{Name: "a", Link: "missing", Type: layer.TypeLink},
	}}
	require.Error(t, Build(filepath.Join(dir, "image"), []*layer.Index{bad}))
	require.Error(t, Build(filepath.Join(dir, "no", "image"), nil))
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}
