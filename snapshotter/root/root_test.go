package root

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/snapshotter/layerfs"
)

func newFS(t *testing.T) *layerfs.FS {
	t.Helper()
	files, err := layerfs.New(t.Context(), nil)
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

// streams are the layers of the running test.
var streams = map[digest.Digest]probeFile{}

// testLayer is a layer of one block with one file, in files.
func testLayer(t *testing.T, files *layerfs.FS, name, content string) *layer.Index {
	t.Helper()
	block := bytes.Repeat([]byte{0}, 512)
	copy(block, content)
	id := digest.FromBytes(block)
	streams[id] = probeFile{bytes.NewReader(block)}
	require.NoError(t, files.Add(id, streams[id]))
	t.Cleanup(func() {
		files.Remove(id)
		delete(streams, id)
	})
	return &layer.Index{DiffID: id, OutSize: 512, Entries: []layer.Entry{
		{Name: name, Type: layer.TypeReg, Mode: 0o644, Size: int64(len(content))},
	}}
}

// modes are all ways to mount roots. This machine must know each.
var modes = []Mode{File, Loop, FUSE}

func TestProbe(t *testing.T) {
	for _, m := range modes {
		t.Run(string(m), func(t *testing.T) {
			files, dir := newFS(t), t.TempDir()
			can, err := probe(t.Context(), m, dir, files, nil)
			require.NoError(t, err)
			require.Equal(t, Ability{Mode: m}, can, "everything works")
			require.Empty(t, mounts(t, dir))
			left, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Empty(t, left)
			_, err = os.Stat(files.Path(digest.FromBytes(probeBlock)))
			require.Error(t, err, "the probe's layer is gone")
			_, err = probe(t.Context(), m, "/proc", files, nil)
			require.Error(t, err)
		})
	}
}

// TestChoose has directories on which not every mode works.
func TestChoose(t *testing.T) {
	files, disk, memory := newFS(t), t.TempDir(), t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", memory, "tmpfs", 0, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(memory, 0)) })
	for _, c := range []struct {
		dir        string
		want, mode Mode
		err        string
	}{
		{disk, Auto, File, ""},
		{disk, File, File, ""},
		{disk, Loop, Loop, ""},
		{disk, FUSE, FUSE, ""},
		{memory, Auto, Loop, ""}, // EROFS takes no image that lies on tmpfs
		{memory, File, "", "mode file: "},
		{"/nowhere", Auto, "", "mode fuse: "},
	} {
		can, err := Choose(t.Context(), c.want, c.dir, files, nil)
		if c.err != "" {
			require.ErrorContains(t, err, c.err)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, c.mode, can.Mode, "%s in %s", c.want, c.dir)
	}
}

func TestParseMode(t *testing.T) {
	for _, m := range append(modes, Auto) {
		got, err := ParseMode(string(m))
		require.NoError(t, err)
		require.Equal(t, m, got)
	}
	for _, bad := range []string{"", "File", "erofs"} {
		_, err := ParseMode(bad)
		require.ErrorContains(t, err, "auto, file, loop, fuse")
	}
}

// testRoot is a root of layers that are in files.
func testRoot(dir string, files *layerfs.FS, layers ...*layer.Index) Root {
	r := Root{Dir: filepath.Join(dir, "root"), Indexes: func() ([]*layer.Index, error) { return layers, nil }}
	for _, x := range layers {
		r.Layers = append(r.Layers, Layer{Device: files.Path(x.DiffID), Stream: streams[x.DiffID]})
	}
	return r
}

// read reads a file of a root that this process serves.
func read(t *testing.T, path string) string {
	t.Helper()
	b, err := testutil.ReadFile(path)
	require.NoError(t, err)
	return string(b)
}

func TestMount(t *testing.T) {
	for _, m := range modes {
		t.Run(string(m), func(t *testing.T) {
			files, dir := newFS(t), t.TempDir()
			r := testRoot(dir, files, testLayer(t, files, "low", "of the lower layer"), testLayer(t, files, "high", "of the upper layer"))
			require.NoError(t, r.Mount(t.Context(), m))
			require.Equal(t, []string{filepath.Join(r.Dir, "mnt")}, mounts(t, dir))
			for name, want := range map[string]string{"low": "of the lower layer", "high": "of the upper layer"} {
				require.Equal(t, want, read(t, filepath.Join(r.Path(), name)))
			}
			_, err := unix.Open(filepath.Join(r.Path(), "new"), unix.O_CREAT|unix.O_WRONLY, 0o644)
			require.ErrorIs(t, err, unix.EROFS, "a root is read-only")

			// Somebody still has a file open.
			fd, err := unix.Open(filepath.Join(r.Path(), "low"), unix.O_RDONLY, 0)
			require.NoError(t, err)
			require.NoError(t, r.Unmount())
			require.Empty(t, mounts(t, dir))
			got := make([]byte, 3)
			_, err = unix.Pread(fd, got, 0)
			require.NoError(t, err)
			require.Equal(t, "of ", string(got))
			require.NoError(t, unix.Close(fd))
			require.NoError(t, r.Unmount(), "nothing is mounted")
			require.NoError(t, Unmount(filepath.Join(dir, "nowhere")))
			requireNoLoops(t, "loop devices end with the mount")
		})
	}
}

// loops lists the loop devices that stand on files of a layer file system.
func loops(t *testing.T) []string {
	t.Helper()
	var found []string
	infos, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	require.NoError(t, err)
	for _, info := range infos {
		text, err := os.ReadFile(info)
		if err != nil {
			continue // it has just ended
		}
		name := strings.TrimSpace(string(text))
		for id := range streams {
			if filepath.Base(name) == id.Encoded() {
				found = append(found, name)
			}
		}
	}
	return found
}

// requireNoLoops waits for loop devices to end: the kernel lets go of one some time
// after its file system, and whoever looks at new devices, as udev does, holds it, too.
func requireNoLoops(t *testing.T, why string) {
	t.Helper()
	require.Eventually(t, func() bool { return len(loops(t)) == 0 }, time.Minute, 10*time.Millisecond, why)
}

// TestManyLayers has as many layers as an image may have, and one more.
func TestManyLayers(t *testing.T) {
	for _, m := range modes {
		t.Run(string(m), func(t *testing.T) {
			files, dir := newFS(t), t.TempDir()
			var layers []*layer.Index
			for i := range 128 {
				layers = append(layers, testLayer(t, files, fmt.Sprint("file", i), fmt.Sprint("of layer ", i)))
			}
			r := testRoot(dir, files, layers...)
			require.NoError(t, r.Mount(t.Context(), m))
			for i := range layers {
				require.Equal(t, fmt.Sprint("of layer ", i), read(t, filepath.Join(r.Path(), fmt.Sprint("file", i))))
			}
			require.NoError(t, r.Unmount())
		})
	}
}

// mergedImage writes the metadata image of layers.
func mergedImage(path string, layers ...*layer.Index) error {
	merged, err := tree.Merge(layers)
	if err != nil {
		return err
	}
	return writeImage(path, layers, merged)
}

func TestDamage(t *testing.T) {
	files, dir := newFS(t), t.TempDir()
	x := testLayer(t, files, "file", "content")
	whole := filepath.Join(dir, "whole")
	require.NoError(t, mergedImage(whole, x))
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
	type mounter func(image, target string, devices []string) error
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
		for mode, mount := range map[Mode]mounter{File: mountFile, Loop: mountLoop} {
			t.Run(name+" "+string(mode), func(t *testing.T) {
				image := filepath.Join(t.TempDir(), "image")
				require.NoError(t, os.WriteFile(image, c.image, 0o600))
				err := mount(image, target, c.devices)
				require.ErrorIs(t, err, c.is)
				require.ErrorContains(t, err, map[Mode]string{File: image, Loop: "loop device"}[mode])
				require.Empty(t, mounts(t, dir))
			})
		}
	}
	for _, mount := range []mounter{mountFile, mountLoop} {
		require.Error(t, mount(filepath.Join(dir, "nowhere"), target, nil))
		require.Error(t, mount(whole, filepath.Join(dir, "nowhere"), []string{device}), "no mount point")
		require.Empty(t, mounts(t, dir))
		require.NoError(t, mount(whole, target, []string{device}))
		require.NoError(t, Unmount(target))
	}
	requireNoLoops(t, "those of failed mounts are gone, too")
}

// TestMend damages the metadata image of a root that is mounted.
func TestMend(t *testing.T) {
	flip := func(path string) error {
		raw, err := os.ReadFile(path)
		for i := 1024 + 128; i < len(raw); i++ {
			raw[i] ^= 0x5a
		}
		return errors.Join(err, os.WriteFile(path, raw, 0o600))
	}
	for name, c := range map[string]struct {
		file   string
		damage func(path string) error
		err    string
	}{
		"nothing":        {"image", func(string) error { return nil }, ""},
		"cut":            {"image", func(path string) error { return os.Truncate(path, 1024) }, ""},
		"emptied":        {"image", func(path string) error { return os.Truncate(path, 0) }, ""},
		"altered":        {"image", flip, ""},
		"digest altered": {"image.sha256", func(path string) error { return os.WriteFile(path, []byte("digest"), 0o600) }, ""},
		"both": {"image", func(path string) error {
			return errors.Join(flip(path), os.WriteFile(proofOf(path), []byte("digest"), 0o600))
		}, "is another"},
	} {
		for _, m := range []Mode{File, Loop} {
			t.Run(name+" "+string(m), func(t *testing.T) {
				files, dir := newFS(t), t.TempDir()
				r := testRoot(dir, files, testLayer(t, files, "low", "of the lower layer"), testLayer(t, files, "high", "of the upper layer"))
				require.NoError(t, r.Mount(t.Context(), m))
				t.Cleanup(func() { require.NoError(t, r.Unmount()) })
				pristine, err := os.ReadFile(r.Image())
				require.NoError(t, err)
				require.NoError(t, c.damage(filepath.Join(r.Dir, c.file)))
				_, _ = testutil.ReadFile(filepath.Join(r.Path(), "low")) // who reads it now misreads it

				err = r.Mend(t.Context())
				if c.err != "" {
					require.ErrorContains(t, err, c.err)
					return
				}
				require.NoError(t, err)
				now, err := os.ReadFile(r.Image())
				require.NoError(t, err)
				require.Equal(t, pristine, now)
				require.NoError(t, proven(r.Image()))
				for name, want := range map[string]string{"low": "of the lower layer", "high": "of the upper layer"} {
					require.Equal(t, want, read(t, filepath.Join(r.Path(), name)))
				}
				left, err := os.ReadDir(r.Dir)
				require.NoError(t, err)
				require.Len(t, left, 3, "image, digest and mount point: %v", left)
			})
		}
	}
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
	require.Error(t, mergedImage(filepath.Join(dir, "image"), bad))
	require.Error(t, mergedImage(filepath.Join(dir, "no", "image")))
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}
