package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestSharedLayers has two images with the same lower layers, only one of which has an archive. containerd knows
// snapshots by chain ID, so what the first pull left is what the second finds.
func TestSharedLayers(t *testing.T) {
	t.Parallel()
	for _, order := range [][]string{
		{images.SmallName, images.SiblingName},
		{images.SiblingName, images.SmallName},
	} {
		t.Run(strings.Split(order[0], "/")[2]+" first", func(t *testing.T) {
			w := newWorld(t)
			w.index(images.SmallName)
			stock := w.stock()
			for _, name := range order {
				w.pull(w.worker, lazy, w.ref(name))
				w.pull(stock, eager, w.ref(name))
			}
			require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, w.ref(images.SmallName), "sh", "/app/run.sh"))
			require.Equal(t, "another top\n", w.run(w.worker, lazy, w.ref(images.SiblingName), "cat", "/sibling"))
			for _, name := range order {
				requireSameRoot(w, stock, w.ref(name))
			}
		})
	}
}

// TestLowerChainIsAnImage runs an image whose top chain is a chain in the middle of the one that was indexed.
func TestLowerChainIsAnImage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.index(images.SmallName)
	stock := w.stock()
	w.pull(w.worker, lazy, w.ref(images.SmallName))
	w.pull(w.worker, lazy, w.ref(images.BaseName))
	w.pull(stock, eager, w.ref(images.BaseName))
	requireSameRoot(w, stock, w.ref(images.BaseName))
}

// TestNamespaces pulls one image in two namespaces: what the first fetched serves the second, and each can go without
// the other.
func TestNamespaces(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, fillLate)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	run := func(ns string) {
		ctx := namespaces.WithNamespace(w.ctx, ns)
		result, err := w.printed(func() (harness.Result, error) {
			return w.worker.RunContainer(ctx, lazy, ref, "in-"+ns, "sh", "/app/run.sh")
		})
		require.NoError(t, err)
		require.Equal(t, "hello from clip\n", result.Stdout)
	}
	for _, ns := range []string{"one", "two"} {
		w.registry.Reset()
		w.ctrIn(namespaces.WithNamespace(w.ctx, ns), w.worker, "image", "pull", "--snapshotter", lazy, ref)
		run(ns)
		if ns == "two" {
			require.Empty(t, w.registry.Requests().Gets(w.layers(images.SmallName)...), "it is in the cache")
		}
	}
	one := namespaces.WithNamespace(w.ctx, "one")
	w.ctrIn(one, w.worker, "image", "rm", "--sync", ref)
	require.Empty(t, w.snapshots(one, w.worker, lazy))
	run("two")
}

// TestRemoval checks that an image which is gone left nothing: no snapshot, no mount, no file that the daemon holds.
func TestRemoval(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.index(images.SmallName)
	before := w.held()
	for range 2 {
		for _, name := range []string{images.SmallName, images.SiblingName} {
			w.pull(w.worker, lazy, w.ref(name))
			require.NoError(t, w.worker.StartContainer(w.ctx, lazy, w.ref(name), "stays", "sleep", "1000"))
			w.run(w.worker, lazy, w.ref(name), "cat", "/sizes/noise-3M+1")
			require.NoError(t, w.worker.RemoveContainer(w.ctx, "stays"))
		}
		w.removeImage(w.worker, w.ref(images.SmallName))
		w.removeImage(w.worker, w.ref(images.SiblingName))
		w.eventually("snapshots are collected", func() bool { return len(w.snapshots(w.ctx, w.worker, lazy)) == 0 })
		w.eventually("mounts and files are released", func() bool { return slices.Equal(before, w.held()) })
	}
}

// TestImageRemovedWhileRunning keeps a container's root while the container runs, whatever becomes of its image.
func TestImageRemovedWhileRunning(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	w.pull(w.worker, lazy, ref)
	require.NoError(t, w.worker.StartContainer(w.ctx, lazy, ref, "stays", "sleep", "1000"))
	w.removeImage(w.worker, ref)
	require.Contains(t, w.exec(w.worker, "stays", "md5sum", "/sizes/text-1M"), "/sizes/text-1M")
	require.NoError(t, w.worker.RemoveContainer(w.ctx, "stays"))
	w.eventually("snapshots are collected", func() bool { return len(w.snapshots(w.ctx, w.worker, lazy)) == 0 })
}

// held lists what the daemon holds: the mounts below its root, and the files there that it has open.
func (w *world) held() []string {
	held := harness.MountsUnder(w.daemon.Root)
	fds, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(w.daemon.Pid()), "fd", "*"))
	require.NoError(w, err)
	for _, fd := range fds {
		if file, err := os.Readlink(fd); err == nil && strings.HasPrefix(file, w.daemon.Root) {
			held = append(held, file)
		}
	}
	slices.Sort(held)
	return held
}
