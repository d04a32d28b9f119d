package e2e

import (
	"os"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
	"github.com/beam-cloud/containerd-clip/tests/internal/rootdiff"
)

var usernsFlags = []string{"--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536"}

// TestUserNamespaces runs containers with user namespaces: with mapped mounts, as CRI has it and ctr with
// --remap-labels, and with the copy that containerd makes otherwise.
func TestUserNamespaces(t *testing.T) {
	t.Parallel()
	w := newMountsWorld(t)
	ref := w.ref(images.OwnersName)
	stock := w.stock()
	w.letThrough(stock)
	w.pull(stock, eager, ref)
	const script = `cat /proc/self/uid_map; stat -c "%u:%g %a %n" / /owners /owners/* /owners/*/*
cat /owners/root; echo more >> /owners/last; chown 5:6 /owners/last; mkdir /owners/made; stat -c "%u:%g" /owners/last /owners/made
id -u; chown 70000 /owners/last`
	labels := append([]string{"--remap-labels"}, usernsFlags...)
	want := requireUserns(w, stock, eager, ref, labels, script)
	mapped := mappedRoot(w, stock, eager, ref)
	w.eachMode(func(w *world) {
		w.letThrough(w.worker)
		require.Empty(w, w.pull(w.worker, lazy, ref).Gets(w.layers(images.OwnersName)...))
		require.Equal(w, want, requireUserns(w, w.worker, lazy, ref, labels, script))
		require.Empty(w, rootdiff.Diff(mapped, mappedRoot(w, w.worker, lazy, ref), w.start))
		require.Equal(w, want, requireUserns(w, w.worker, lazy, ref, usernsFlags, script), "the copy that containerd makes")
		w.removeCapability()
		require.Equal(w, want, requireUserns(w, w.worker, lazy, ref, labels, script), "the same copy, because containerd must not leave it to clip")
	})
}

// removeCapability restarts the worker without the capability remap-ids of the clip snapshotter.
func (w *world) removeCapability() {
	w.Helper()
	file := w.lab.Path(w.worker.Name, "conf.d", "50-clip.toml")
	text, err := os.ReadFile(file)
	require.NoError(w, err)
	const capability = `capabilities = ["remap-ids"]`
	require.Contains(w, string(text), capability)
	require.NoError(w, os.WriteFile(file, []byte(strings.Replace(string(text), capability, "", 1)), 0o600))
	require.NoError(w, w.worker.Stop())
	require.NoError(w, w.lab.RestartContainerd(w.ctx, w.worker))
	// It collects garbage when it has started. The copy of the last container is garbage, and the next container must
	// not begin with it while it goes.
	lease, err := w.worker.Client().LeasesService().Create(w.ctx, leases.WithRandomID())
	require.NoError(w, err)
	require.NoError(w, w.worker.Client().LeasesService().Delete(w.ctx, lease, leases.SynchronousDelete))
}

// letThrough lets everybody pass through a containerd's directory, as runc wants it for user namespaces: their root is
// somebody else outside. The daemon's directory stays closed.
func (w *world) letThrough(c *harness.Containerd) {
	w.Helper()
	require.NoError(w, os.Chmod(w.lab.Dir, 0o711))
	require.NoError(w, os.Chmod(w.lab.Path(c.Name), 0o711))
}

// requireUserns runs a script whose last command fails, because it wants an owner that the namespace does not have.
func requireUserns(w *world, c *harness.Containerd, snapshotter, ref string, flags []string, script string) string {
	w.Helper()
	result, err := w.printedAndFailed(func() (harness.Result, error) {
		return c.RunContainerWith(w.ctx, flags, snapshotter, ref, "e2e-userns", "sh", "-c", script)
	})
	require.Error(w, err)
	require.Contains(w, result.Stderr, "Invalid argument")
	require.Contains(w, result.Stdout, "100000      65536")
	require.Contains(w, result.Stdout, "6:60006 6755 /owners/setuid")
	return result.Stdout
}

// mappedRoot is what the host sees of a container's root with a user namespace.
func mappedRoot(w *world, c *harness.Containerd, snapshotter, ref string) rootdiff.Tree {
	w.Helper()
	tree, err := rootdiff.Read(w.prepare(c, snapshotter, ref, containerd.WithRemapperLabels(0, 100000, 0, 200000, 65536)))
	require.NoError(w, err)
	require.Equal(w, uint32(100006), tree["owners/setuid"].UID)
	require.Equal(w, uint32(260006), tree["owners/setuid"].GID)
	return tree
}
