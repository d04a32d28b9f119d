package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/image-spec/identity"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// modes are the ways to mount roots. This machine must know each.
var modes = []string{"file", "loop", "fuse"}

// eachMode runs a test on a worker whose daemon mounts roots in each of the ways.
func (w *world) eachMode(test func(w *world)) {
	for _, mode := range modes {
		w.Run(mode, func(t *testing.T) {
			sub := *w
			sub.T, sub.ctx = t, t.Context()
			sub.startMode(mode)
			test(&sub)
		})
	}
}

func (w *world) startMode(mode string) {
	var err error
	w.daemon, err = w.lab.StartDaemon(w.ctx, "daemon-"+mode, fillLate+"[mount]\nmode = '"+mode+"'\n")
	require.NoError(w, err)
	if mode != "auto" {
		require.Contains(w, w.daemon.Log(), "mode="+mode)
	}
	require.NotContains(w, w.daemon.Log(), "level=warning", "this machine can do everything in each mode")
	w.worker, err = w.lab.StartContainerd(w.ctx, "worker-"+mode, w.daemon)
	require.NoError(w, err)
}

// newMountsWorld has the images of images.Mounts, indexed.
func newMountsWorld(t *testing.T) *world {
	w := emptyWorld(t, "")
	layout, err := images.Mounts(w.lab.Path("mounts"))
	require.NoError(t, err)
	file := w.lab.Path("mounts.tar")
	require.NoError(t, layout.WriteTar(file))
	w.ctr(w.builder, "image", "import", "--no-unpack", file)
	for _, name := range []string{images.OwnersName, images.LayersName} {
		w.publish(name)
		w.index(name)
	}
	w.start = time.Now()
	return w
}

// prepare mounts an unpacked image's root writable, as for a container, until the test ends.
func (w *world) prepare(c *harness.Containerd, snapshotter, ref string, opts ...snapshots.Opt) string {
	w.Helper()
	image, err := c.Client().GetImage(w.ctx, ref)
	require.NoError(w, err)
	diffIDs, err := image.RootFS(w.ctx)
	require.NoError(w, err)
	dir, err := os.MkdirTemp(w.lab.Dir, "prepared-")
	require.NoError(w, err)
	ctx, done, err := c.Client().WithLease(context.WithoutCancel(w.ctx))
	require.NoError(w, err)
	service, key := c.Client().SnapshotService(snapshotter), filepath.Base(dir)
	mounts, err := service.Prepare(ctx, key, identity.ChainID(diffIDs).String(), opts...)
	require.NoError(w, err)
	require.NoError(w, mount.All(mounts, dir))
	w.Cleanup(func() {
		require.NoError(w, mount.UnmountAll(dir, 0))
		require.NoError(w, service.Remove(ctx, key))
		require.NoError(w, done(ctx))
	})
	return dir
}

// runWith runs a command in a container with more of ctr's flags.
func (w *world) runWith(c *harness.Containerd, flags []string, snapshotter, ref string, command ...string) string {
	w.Helper()
	result, err := w.printed(func() (harness.Result, error) {
		return c.RunContainerWith(w.ctx, flags, snapshotter, ref, "e2e-run", command...)
	})
	require.NoError(w, err)
	return result.Stdout
}

// TestMountModes has one root, the same in each mode.
func TestMountModes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref, sparse := w.ref(images.SmallName), w.ref(images.SparseName)
	w.publish(images.SparseName)
	w.index(images.SmallName)
	w.index(images.SparseName)
	stock := w.stock()
	w.pull(stock, eager, ref)
	w.pull(stock, eager, sparse)
	w.eachMode(func(w *world) {
		w.Cleanup(func() { requireNothingLeft(w, ref, sparse) })
		require.Empty(w, w.pull(w.worker, lazy, ref).Gets(w.layers(images.SmallName)...))
		requireSameCold(w, stock, ref)
		require.Empty(w, w.pull(w.worker, lazy, sparse).Gets(w.layers(images.SparseName)...))
		requireSameRoot(w, stock, sparse)
		require.Equal(w, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
		requireSameRoot(w, stock, ref)
		requireSameBehaviour(w, stock, ref)
	})
}

// requireNothingLeft removes images that nobody uses any more, and what there was of them.
func requireNothingLeft(w *world, refs ...string) {
	w.Helper()
	w.ctx = context.WithoutCancel(w.ctx)
	for _, ref := range refs {
		w.removeImage(w.worker, ref)
	}
	w.eventually("the image's layers are gone", func() bool {
		layers, err := os.ReadDir(filepath.Join(w.daemon.Root, "layers"))
		return err == nil && len(layers) == 0
	})
	w.requireNoLoops()
	require.NoError(w, w.daemon.Stop())
}

// TestModeChanges has a daemon that dies and comes back with another mode: roots that are mounted go on as they are, what
// is mounted from then on is mounted in the new mode.
func TestModeChanges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	w.startMode("auto")
	w.pull(w.worker, lazy, ref)
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	for _, mode := range []string{"loop", "fuse", "file", "fuse", "loop"} {
		require.Len(t, mountsOf(t, w.daemon.Root), 1)
		w.daemon.Kill()
		require.NoError(t, os.WriteFile(w.daemon.Config, []byte("[mount]\nmode = '"+mode+"'\n"), 0o600))
		require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
		require.Len(t, mountsOf(t, w.daemon.Root), 1, "the root that the daemon that died had mounted")
		w.runAfterRestart(ref)
		w.removeImage(w.worker, ref)
		w.eventually("its root is removed", func() bool { return len(mountsOf(t, w.daemon.Root)) == 0 })
		w.requireNoLoops()
		w.pull(w.worker, lazy, ref)
		require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
		require.Equal(t, mode == "loop", len(loopsOf(t, w.daemon.Root)) > 0)
	}
	w.removeImage(w.worker, ref) // and the last container's snapshot, for which its root would stay
	w.eventually("its root is removed", func() bool { return len(mountsOf(t, w.daemon.Root)) == 0 })
	require.NoError(t, w.daemon.Stop())
	require.Empty(t, mountsOf(t, w.daemon.Root))
	w.requireNoLoops()
}

// mountsOf lists what is mounted below dir.
func mountsOf(t *testing.T, dir string) []string {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	require.NoError(t, err)
	var points []string
	for _, m := range infos {
		points = append(points, m.Mountpoint)
	}
	return points
}

// TestDemoImageModes is a real image in the modes that are not the usual one.
func TestDemoImageModes(t *testing.T) {
	t.Parallel()
	w := newDemoWorld(t)
	ref := w.ref(images.DemoName)
	w.index(images.DemoName)
	stock := w.stock()
	w.pull(stock, eager, ref)
	// Programs that stay in one file system do so by device numbers, of which overlayfs shows several.
	const oneFilesystem = `find / -xdev | sort | md5sum; tar --one-file-system --sort=name -cf - /etc /usr/bin | md5sum
cp -ax /etc /root/etc && diff -r --no-dereference /etc /root/etc && ln /etc/passwd /root/passwd && chmod 600 /etc/passwd && stat -c "%h %a" /root/passwd`
	want := w.run(stock, eager, ref, "sh", "-c", oneFilesystem)
	require.Contains(t, want, "2 600\n")
	w.eachMode(func(w *world) {
		w.pull(w.worker, lazy, ref)
		require.Equal(w, want, w.run(w.worker, lazy, ref, "sh", "-c", oneFilesystem))
		require.Equal(w, "15\n", w.run(w.worker, lazy, ref, "python3", "-c", "import numpy; print(numpy.arange(6).sum())"))
		requireSameRoot(w, stock, ref)
	})
}

// requireNoLoops says that loop devices end with the roots. The kernel ends them when the last who holds them lets go,
// which is soon after the root is not mounted any more.
func (w *world) requireNoLoops() {
	w.Helper()
	w.eventually("loop devices end with the roots", func() bool { return len(loopsOf(w.T, w.daemon.Root)) == 0 })
}

// loopsOf lists the files below dir that loop devices stand on.
func loopsOf(t *testing.T, dir string) []string {
	t.Helper()
	var found []string
	infos, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	require.NoError(t, err)
	for _, info := range infos {
		text, err := os.ReadFile(info)
		if err == nil && strings.HasPrefix(string(text), dir) { // else it has just ended
			found = append(found, strings.TrimSpace(string(text)))
		}
	}
	return found
}

// TestManyLayers runs an image of 127 layers, all of them lazy.
func TestManyLayers(t *testing.T) {
	t.Parallel()
	w := newMountsWorld(t)
	ref := w.ref(images.LayersName)
	require.Len(t, w.layers(images.LayersName), images.ManyLayers)
	stock := w.stock()
	w.pull(stock, eager, ref)
	// It is written at once: all of it comes, or nothing, see printed.
	script := `all=$(cat $(find /layers -type f | sort)) && echo "$all"`
	want := w.run(stock, eager, ref, "sh", "-c", script)
	require.Contains(t, want, "last changed by layer 126\n")
	w.eachMode(func(w *world) {
		require.Empty(w, w.pull(w.worker, lazy, ref).Gets(w.layers(images.LayersName)...))
		require.Equal(w, want, w.run(w.worker, lazy, ref, "sh", "-c", script))
		requireSameRoot(w, stock, ref)
	})
}

// TestReadOnlyContainers cannot write, wherever they try.
func TestReadOnlyContainers(t *testing.T) {
	t.Parallel()
	w := newMountsWorld(t)
	ref := w.ref(images.OwnersName)
	w.eachMode(func(w *world) {
		w.pull(w.worker, lazy, ref)
		script := "cat /owners/file; echo new > /owners/file; echo new > /new; mkdir /owners/new; chown 1 /owners/root; ls /owners | wc -l"
		result, err := w.printed(func() (harness.Result, error) {
			return w.worker.RunContainerWith(w.ctx, []string{"--read-only"}, lazy, ref, "e2e-ro", "sh", "-c", script)
		})
		require.NoError(w, err)
		require.Equal(w, "a file\n9\n", result.Stdout)
		require.Equal(w, 4, strings.Count(result.Stderr, "Read-only file system"), result.Stderr)
	})
}

// TestContainersInContainers mounts an overlay whose lower directory is a container's root, and runs a program in it.
func TestContainersInContainers(t *testing.T) {
	t.Parallel()
	w := newMountsWorld(t)
	ref := w.ref(images.OwnersName)
	const script = `set -e
mount -t tmpfs tmpfs /tmp
mkdir /tmp/u /tmp/w /tmp/m
mount -t overlay inner -o lowerdir=/,upperdir=/tmp/u,workdir=/tmp/w /tmp/m
echo changed >> /tmp/m/owners/file
chroot /tmp/m sh -c 'cat /owners/file; stat -c "%u:%g %a %n" /owners/*; mkdir /owners/made; chown 7:8 /owners/link /owners/setuid'
cat /owners/file
stat -c "%u:%g" /tmp/m/owners/setuid /owners/setuid
umount /tmp/m`
	stock := w.stock()
	w.pull(stock, eager, ref)
	want := w.runWith(stock, []string{"--privileged"}, eager, ref, "sh", "-c", script)
	require.Contains(t, want, "a file\nchanged\n")
	w.eachMode(func(w *world) {
		w.pull(w.worker, lazy, ref)
		require.Equal(w, want, w.runWith(w.worker, []string{"--privileged"}, lazy, ref, "sh", "-c", script))
	})
}
