package e2e

import (
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestSparseImage has sparse files in a layer, in each form that containerd unpacks: read lazily, and the same.
func TestSparseImage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.requireSameAsStock(images.SparseName)
}

// TestHugeHoles has files that nobody unpacks: 8 GiB and 1 TiB of zeros with a little data.
func TestHugeHoles(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.HugeName)
	w.publish(images.HugeName)
	w.index(images.HugeName)
	require.Empty(t, w.pull(w.worker, lazy, ref).Gets(w.layers(images.HugeName)...))
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	root := w.view(w.worker, lazy, ref)
	const gib, mib = 1 << 30, 1 << 20
	for name, want := range map[string]struct {
		size int64
		at   map[int64]string
	}{
		"huge-8G": {8*gib + 5, map[int64]string{0: "\x00", 8*mib - 1: "\x001234", 9*mib - 4: "5678\x00", 4 * gib: "\x00", 8*gib - 1: "\x00the e"}},
		"huge-1T": {1024 * gib, map[int64]string{0: "\x00", 512*gib - 1: "\x0012", 512*gib + mib - 1: "8\x00", 1024*gib - mib - 1: "\x0012", 1024*gib - 2: "78"}},
	} {
		fd, err := unix.Open(filepath.Join(root, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		defer unix.Close(fd)
		var st unix.Stat_t
		require.NoError(t, unix.Fstat(fd, &st))
		require.Equal(t, want.size, st.Size, name)
		for at, text := range want.at {
			got := make([]byte, len(text))
			n, err := unix.Pread(fd, got, at)
			require.NoError(t, err)
			require.Equal(t, text, string(got[:n]), "%s at %d", name, at)
		}
	}
}

// TestRefusedImages pulls what containerd refuses to unpack: a sound base and a layer on it. It is refused with clip as
// without, in the same words, and the layer is not committed; the base may be, until containerd collects it.
func TestRefusedImages(t *testing.T) {
	t.Parallel()
	w := emptyWorld(t, "")
	layout, refused, err := images.Refused(w.lab.Path("refused"))
	require.NoError(t, err)
	file := w.lab.Path("refused.tar")
	require.NoError(t, layout.WriteTar(file))
	w.ctr(w.builder, "image", "import", "--no-unpack", file)
	stock := w.stock()
	for _, image := range refused {
		t.Run(images.ShortName(image.Name), func(t *testing.T) {
			w := w.in(t)
			ref := w.ref(image.Name)
			w.publish(image.Name)
			indexed, err := w.builder.Clipctl(w.ctx, "index", ref, "--push")
			if err != nil {
				requireClear(t, indexed.Stderr, "layer")
			}
			want, err := stock.Ctr(w.ctx, "image", "pull", "--snapshotter", eager, ref)
			require.Error(t, err, "containerd refuses it")
			require.Contains(t, want.Stderr, image.Why)
			got, err := w.worker.Ctr(w.ctx, "image", "pull", "--snapshotter", lazy, ref)
			require.Error(t, err, "clip refuses it, too")
			require.Equal(t, cause(want.Stderr), cause(got.Stderr))
			require.NotContains(t, w.snapshots(w.ctx, w.worker, lazy), w.chainID(w.builder, ref), "nothing is committed")
			require.NotContains(t, w.daemon.Log(), "panic")
		})
	}
}

// cause is the end of an error. What is before it names paths and keys, which differ.
func cause(text string) string {
	return text[strings.LastIndex(strings.TrimSpace(text), ": ")+1:]
}

// TestStacks runs what people run, lazily, and compares whole roots with containerd's.
func TestStacks(t *testing.T) {
	t.Parallel()
	// They have a layer in common. Making them takes some minutes.
	w := worldIn(t, harness.ForTestWithin(t, 2*harness.Limit), fillLate)
	top, err := harness.Top()
	require.NoError(t, err)
	file, err := images.Stacks(w.ctx, filepath.Join(top, ".cache", "images"))
	require.NoError(t, err)
	w.ctr(w.builder, "image", "import", "--no-unpack", file)
	stock := w.stock()
	for _, s := range images.AllStacks() {
		t.Run(images.ShortName(s.Name), func(t *testing.T) {
			w := w.in(t)
			ref := w.ref(s.Name)
			w.publish(s.Name)
			w.index(s.Name)
			require.Empty(t, w.pull(w.worker, lazy, ref).Gets(w.layers(s.Name)...))
			for c, snapshotter := range map[*harness.Containerd]string{w.worker: lazy, stock: eager} {
				if c == stock {
					w.pull(stock, eager, ref)
				}
				var said string
				w.eventually("ctr has the output", func() bool { // of which it loses some, see printed
					result, err := c.RunContainer(w.ctx, snapshotter, ref, "e2e-stack", s.Command...)
					said = result.Output()
					return err != nil || said != ""
				})
				require.Contains(t, said, s.Says)
			}
			requireSameRoot(w, stock, ref)
		})
	}
}

// in is the world as a subtest sees it: what it mounts goes with it.
func (w *world) in(t *testing.T) *world {
	sub := *w
	sub.T, sub.ctx = t, t.Context()
	return &sub
}

// requireSameAsStock publishes, indexes and pulls one of the small images, and compares its root.
func (w *world) requireSameAsStock(name string) {
	w.Helper()
	ref := w.ref(name)
	w.publish(name)
	w.index(name)
	require.Empty(w, w.pull(w.worker, lazy, ref).Gets(w.layers(name)...), "it is read lazily")
	require.Equal(w, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	stock := w.stock()
	w.pull(stock, eager, ref)
	requireSameRoot(w, stock, ref)
}

// TestByDigest indexes and runs an image that is named by its digest.
func TestByDigest(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tag := w.ref(images.SmallName)
	ref := tag[:strings.LastIndex(tag, ":")] + "@" + w.subject(tag, runtime.GOARCH).Digest.String()
	w.ctr(w.builder, "image", "tag", tag, ref)
	_, err := w.builder.Clipctl(w.ctx, "index", ref, "--push")
	require.NoError(t, err)
	require.Empty(t, w.pull(w.worker, lazy, ref).Gets(w.layers(images.SmallName)...))
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
}

// TestMovedTag has an image's tag moved to another image after it was pulled: what was pulled is still read.
func TestMovedTag(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	w.pull(w.worker, lazy, ref)
	w.ctr(w.builder, "image", "tag", "--force", images.BaseName, ref)
	w.ctr(w.builder, "image", "push", ref)
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	requests := w.registry.Requests()
	require.NotEmpty(t, requests.Gets(w.manifest(w.worker, ref).Layers[0].Digest.String()), "it was not all there")
}
