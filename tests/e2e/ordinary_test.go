package e2e

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestLayersThatCannotBeLazy indexes images one of whose layers cannot be read lazily. The image runs all the same, and
// somebody says which layer it was and why.
func TestLayersThatCannotBeLazy(t *testing.T) {
	t.Parallel()
	for name, why := range map[string]string{
		images.WindowName: "zstd window",
		images.OddName:    "sparse file with data at 100",
	} {
		t.Run(images.ShortName(name), func(t *testing.T) {
			w := newWorld(t)
			ref := w.ref(name)
			w.publish(name)
			w.index(name)
			w.pull(w.worker, lazy, ref)
			require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
			stock := w.stock()
			w.pull(stock, eager, ref)
			requireSameRoot(w, stock, ref)
			w.requireReason(ref, why)

			status, err := w.worker.Clipctl(w.ctx, "status")
			require.NoError(t, err)
			require.Regexp(t, "of . layers .* cannot be read lazily: .*"+why, status.Stdout)
		})
	}
}

// TestOtherKindsOfLayer has images that are lazy like SmallName, and not made of gzip or not called OCI.
func TestOtherKindsOfLayer(t *testing.T) {
	t.Parallel()
	for _, name := range []string{images.DockerName, images.ZstdName} {
		t.Run(images.ShortName(name), func(t *testing.T) {
			w := newWorld(t)
			ref := w.ref(name)
			w.publish(name)
			w.index(name)
			require.Empty(t, w.pull(w.worker, lazy, ref).Gets(w.layers(name)...))
			require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
			stock := w.stock()
			w.pull(stock, eager, ref)
			requireSameRoot(w, stock, ref)
		})
	}
}

// TestOtherSnapshotterIsDefault pulls without --snapshotter on a containerd that has clip: it stays overlayfs, as
// config.toml.example promises.
func TestOtherSnapshotterIsDefault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	w.ctr(w.worker, "image", "pull", ref)
	require.Empty(t, w.snapshots(w.ctx, w.worker, lazy))
	require.Equal(t, "hello from clip\n", w.run(w.worker, eager, ref, "sh", "/app/run.sh"))
}

// TestBothSnapshotters has one image in both snapshotters of one containerd.
func TestBothSnapshotters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref, layers := w.ref(images.SmallName), w.layers(images.SmallName)
	w.index(images.SmallName)
	require.Empty(t, w.pull(w.worker, lazy, ref).Gets(layers...))
	require.NotEmpty(t, w.pull(w.worker, eager, ref).Gets(layers...), "overlayfs needs the layers")
	requireSameRoot(w, w.worker, ref)
}

// TestLayersInStore runs an image with clip whose layers are in containerd's store: it was imported, and the unpacking
// has no labels. The snapshotter is an ordinary one then.
func TestLayersInStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.ctr(w.worker, "image", "import", "--no-unpack", "--all-platforms", w.lab.Path("small.tar"))
	w.registry.Reset()
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, images.SmallName, "sh", "/app/run.sh"))
	w.ctr(w.worker, "image", "pull", "--local", "--snapshotter", lazy, w.ref(images.SiblingName))
	require.Equal(t, "another top\n", w.run(w.worker, lazy, w.ref(images.SiblingName), "cat", "/sibling"))
}
