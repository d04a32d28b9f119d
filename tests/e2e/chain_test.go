package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	testimages "github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestOrdinaryOnLazy unpacks images that have no archive on top of a lazy base, in each way that containerd unpacks.
func TestOrdinaryOnLazy(t *testing.T) {
	t.Parallel()
	for name, unpack := range map[string]func(w *world, ref string){
		"pull":         func(w *world, ref string) { w.pull(w.worker, lazy, ref) },
		"pull --local": func(w *world, ref string) { w.ctr(w.worker, "image", "pull", "--local", "--snapshotter", lazy, ref) },
		"run":          func(w *world, ref string) { w.ctr(w.worker, "content", "fetch", ref) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.index(testimages.BaseName)
			base, ref := w.ref(testimages.BaseName), w.ref(testimages.SiblingName)
			require.Empty(t, w.pull(w.worker, lazy, base).Gets(w.layers(testimages.BaseName)...))
			unpack(w, ref)
			require.Equal(t, "another top\n", w.run(w.worker, lazy, ref, "cat", "/sibling"))
			info, err := w.worker.Client().SnapshotService(lazy).Stat(w.ctx, w.chainID(w.worker, ref))
			require.NoError(t, err)
			require.Equal(t, w.chainID(w.worker, base), info.Parent, "it stands on the lazy base")

			stock := w.stock()
			for _, ref := range []string{base, ref} {
				w.pull(stock, eager, ref)
				requireSameRoot(w, stock, ref)
			}
		})
	}
}

// TestLazyOnOrdinary has a base that was unpacked before its archive came, and then an image with one on top of it.
func TestLazyOnOrdinary(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	base, ref := w.ref(testimages.BaseName), w.ref(testimages.SmallName)
	require.NotEmpty(t, w.pull(w.worker, lazy, base).Gets(w.layers(testimages.BaseName)...))
	w.index(testimages.SmallName)
	require.Empty(t, w.pull(w.worker, lazy, ref).Gets(w.layers(testimages.SmallName)...))
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	stock := w.stock()
	for _, ref := range []string{base, ref} {
		w.pull(stock, eager, ref)
		requireSameRoot(w, stock, ref)
	}
}

// changes is what a container does to its root in the tests of diffs.
const changes = `echo changed >> /etc/passwd && rm -r /many && rm /data/a && mkdir /opaque/made && echo new > /opaque/made/file &&
	chmod 700 /names && mv /sizes/text-1M /moved && ln -s moved /link && touch -d "2020-01-02 03:04:05" /app/name && rm -r /data/shared && mkdir /data/shared`

// TestCommit makes an image of what a container has changed, with containerd's own differ: the layer holds just the
// changes, the same as on overlayfs, and runs with either snapshotter.
func TestCommit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(testimages.SmallName)
	w.index(testimages.SmallName)
	w.pull(w.worker, lazy, ref)
	stock := w.stock()
	w.pull(stock, eager, ref)
	diffs := map[*harness.Containerd]map[string]string{}
	for c, snapshotter := range map[*harness.Containerd]string{w.worker: lazy, stock: eager} {
		require.NoError(t, c.StartContainer(w.ctx, snapshotter, ref, "changed", "sh", "-c", changes+" && touch /made && sleep 1000"))
		w.eventually("the container has made its changes", func() bool {
			_, err := c.Ctr(w.ctx, "task", "exec", "--exec-id", fmt.Sprint("e", time.Now().UnixNano()), "changed", "ls", "/made")
			return err == nil
		})
		diffs[c] = w.commit(c, snapshotter, ref, "changed", "example.com/commit/"+snapshotter+":1")
	}
	require.Equal(t, diffs[stock], diffs[w.worker])
	require.Contains(t, diffs[w.worker], ".wh.many")
	require.NotContains(t, diffs[w.worker], "bin/busybox")

	for c, snapshotter := range map[*harness.Containerd]string{w.worker: lazy, stock: eager} {
		name := "example.com/commit/" + snapshotter + ":1"
		require.Equal(t, "clip\nnew\n", w.run(c, snapshotter, name, "cat", "/app/name", "/opaque/made/file"))
	}
}

// commit makes an image of a container's changes, as `nerdctl commit` does, and returns the changes by name.
func (w *world) commit(c *harness.Containerd, snapshotter, ref, container, name string) map[string]string {
	w.Helper()
	client := c.Client()
	ctx, done, err := client.WithLease(w.ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour))
	require.NoError(w, err)
	defer func() { require.NoError(w, done(ctx)) }()
	store := client.ContentStore()
	desc, err := rootfs.CreateDiff(ctx, container, client.SnapshotService(snapshotter), client.DiffService())
	require.NoError(w, err)
	info, err := store.Info(ctx, desc.Digest)
	require.NoError(w, err)

	base, err := client.GetImage(ctx, ref)
	require.NoError(w, err)
	manifest := w.manifest(c, ref)
	spec, err := base.Spec(ctx)
	require.NoError(w, err)
	spec.RootFS.DiffIDs = append(spec.RootFS.DiffIDs, digest.Digest(info.Labels["containerd.io/uncompressed"]))
	manifest.Layers = append(manifest.Layers, desc)
	manifest.Config = w.putJSON(ctx, c, ocispec.MediaTypeImageConfig, spec, nil)
	labels := map[string]string{"containerd.io/gc.ref.content.config": manifest.Config.Digest.String()}
	for i, l := range manifest.Layers {
		labels[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = l.Digest.String()
	}
	_, err = client.ImageService().Create(ctx, images.Image{Name: name, Target: w.putJSON(ctx, c, ocispec.MediaTypeImageManifest, manifest, labels)})
	require.NoError(w, err)

	ra, err := store.ReaderAt(ctx, desc)
	require.NoError(w, err)
	defer ra.Close()
	return w.listLayer(content.NewReader(ra))
}

func (w *world) putJSON(ctx context.Context, c *harness.Containerd, mediaType string, v any, labels map[string]string) ocispec.Descriptor {
	w.Helper()
	text, err := json.Marshal(v)
	require.NoError(w, err)
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(text), Size: int64(len(text))}
	require.NoError(w, content.WriteBlob(ctx, c.Client().ContentStore(), d.Digest.String(), bytes.NewReader(text), d, content.WithLabels(labels)))
	return d
}

// listLayer says what is in a layer: everything but the times at which containers ran.
func (w *world) listLayer(blob io.Reader) map[string]string {
	w.Helper()
	stream, err := compression.DecompressStream(blob)
	require.NoError(w, err)
	defer stream.Close()
	entries := map[string]string{}
	tr := tar.NewReader(stream)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return entries
		}
		require.NoError(w, err)
		body, err := io.ReadAll(tr)
		require.NoError(w, err)
		entries[h.Name] = fmt.Sprintf("%c %o %d:%d %d:%d %q %s", h.Typeflag, h.Mode, h.Uid, h.Gid, h.Devmajor, h.Devminor, h.Linkname, digest.FromBytes(body))
	}
}

// TestBuildkit builds an image from a lazy one, on this snapshotter and on overlayfs: both builds give the same root,
// and it runs. The build itself stands on a base of its own, which BuildKit downloads and unpacks.
func TestBuildkit(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, fillLate)
	base := w.ref(testimages.SmallName)
	w.index(testimages.SmallName)
	w.pull(w.worker, lazy, base)
	dir := w.lab.Path("context")
	require.NoError(t, os.Mkdir(dir, 0o755))
	for name, text := range map[string]string{
		"Dockerfile": "FROM " + base + "\n" +
			"RUN echo built > /app/name && rm -r /many /data/a && mv /sizes/text-1M /moved\n" +
			"COPY copied /opaque/\n" +
			"RUN cat /opaque/copied >> /app/name && rm /opaque/before && touch -d '2020-01-02 03:04:05' /app/name\n",
		"copied": "copied\n",
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	stock := w.stock()
	const built = "example.com/built/app:1"
	for c, snapshotter := range map[*harness.Containerd]string{w.worker: lazy, stock: eager} {
		b, err := w.lab.StartBuildkit(w.ctx, "buildkit-"+snapshotter, c, snapshotter, w.registry)
		require.NoError(t, err)
		w.registry.Reset()
		_, err = b.Build(w.ctx, dir, built)
		require.NoError(t, err)
		requests := w.registry.Requests()
		for _, l := range w.layers(testimages.SmallName) {
			require.Len(t, requests.Gets(l), 1, "BuildKit downloads bases whole, whatever the snapshotter has")
			require.Empty(t, requests.Gets(l)[0].Range)
		}
		require.Equal(t, "hello from built copied\n", w.run(c, snapshotter, built, "sh", "/app/run.sh"))
		require.NoError(t, b.Stop())
	}
	below := w.chainID(w.worker, built)
	for range 3 { // RUN, COPY, RUN
		info, err := w.worker.Client().SnapshotService(lazy).Stat(w.ctx, below)
		require.NoError(t, err)
		below = info.Parent
	}
	require.Equal(t, w.chainID(w.worker, base), below, "what was built stands on the lazy base")
	image, _ := w.root(len(w.layers(testimages.SmallName)))
	require.FileExists(t, image, "which is still lazy")
	requireSameRoot(w, stock, built)
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, base, "sh", "/app/run.sh"), "the base is as it was")
}

// TestParallelUnpack has containerd unpack several layers at once where it can: it cannot with this snapshotter, whose
// chains stay whole.
func TestParallelUnpack(t *testing.T) {
	t.Parallel()
	for _, archived := range []bool{true, false} {
		t.Run(fmt.Sprint("archive ", archived), func(t *testing.T) {
			w := newWorld(t)
			ref := w.ref(testimages.SmallName)
			if archived {
				w.index(testimages.SmallName)
			}
			w.reconfigure("[plugins.'io.containerd.transfer.v1.local']\n  max_concurrent_unpacks = 4\n")
			w.pull(w.worker, lazy, ref)
			require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
			stock := w.stock()
			w.pull(stock, eager, ref)
			requireSameRoot(w, stock, ref)
		})
	}
}

// TestRebaseCapability has an administrator claim for this snapshotter what it cannot do. A chain without parents would
// come of it, or layers without whiteouts: pulls are refused instead, with the remedy.
func TestRebaseCapability(t *testing.T) {
	t.Parallel()
	for _, archived := range []bool{true, false} {
		t.Run(fmt.Sprint("archive ", archived), func(t *testing.T) {
			w := newWorld(t)
			ref := w.ref(testimages.SmallName)
			if archived {
				w.index(testimages.SmallName)
			}
			file := w.lab.Path("worker", "conf.d", "50-clip.toml")
			config, err := os.ReadFile(file)
			require.NoError(t, err)
			claim := strings.Replace(string(config), `capabilities = ["remap-ids"]`, `capabilities = ["remap-ids", "rebase"]`, 1)
			require.NotEqual(t, string(config), claim)
			require.NoError(t, os.WriteFile(file, []byte(claim), 0o600))
			w.reconfigure("[plugins.'io.containerd.transfer.v1.local']\n  max_concurrent_unpacks = 4\n")
			result, err := w.worker.Ctr(w.ctx, "image", "pull", "--snapshotter", lazy, ref)
			require.Error(t, err)
			requireClear(t, result.Stderr, "capabilities", "rebase")
			require.NotContains(t, w.snapshots(w.ctx, w.worker, lazy), w.chainID(w.builder, ref))
		})
	}
}

// reconfigure restarts the worker with more configuration.
func (w *world) reconfigure(config string) {
	w.Helper()
	require.NoError(w, w.worker.Stop())
	require.NoError(w, os.WriteFile(w.lab.Path("worker", "conf.d", "60-test.toml"), []byte("version = 3\n"+config), 0o600))
	require.NoError(w, w.lab.RestartContainerd(w.ctx, w.worker))
}
