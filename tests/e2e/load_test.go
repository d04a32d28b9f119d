package e2e

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestLoad makes an image out of its archive alone. It is the image that was built, nothing was asked of the registry
// before the first read, and containerd keeps and collects it like one that was pulled.
func TestLoad(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, fillLate)
	ref := w.ref(images.SmallName)
	file := w.lab.Path("app.clip")
	_, err := w.builder.Clipctl(w.ctx, "index", ref, "-o", file)
	require.NoError(t, err)
	server := httptest.NewServer(http.FileServer(http.Dir(w.lab.Dir)))
	t.Cleanup(server.Close)
	for _, source := range []string{file, server.URL + "/app.clip"} {
		w.registry.Reset()
		result, err := w.worker.Clipctl(w.ctx, "load", source)
		require.NoError(t, err)
		require.Contains(t, result.Stdout, ref)
		require.Empty(t, w.registry.Requests(), "nothing was read yet")
		require.Equal(t, w.subject(ref, "amd64").Digest, w.image(w.worker, ref).Target.Digest)
		require.NoError(t, w.worker.StartContainer(w.ctx, lazy, ref, "loaded", "sleep", "1000"))
		require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
		requests := w.registry.Requests()
		require.NotEmpty(t, requests.Gets(w.layers(images.SmallName)...))
		require.Less(t, requests.Sent(), w.size(images.SmallName)/2, "a part of the image is fetched to run it")
		for _, r := range requests {
			require.Contains(t, r.Path, "/blobs/", "no manifest is asked for, and no archive")
		}
		require.NoError(t, w.worker.RemoveContainer(w.ctx, "loaded"))
		left, err := filepath.Glob(filepath.Join(w.daemon.Root, "archives", "*"))
		require.NoError(t, err)
		require.Empty(t, left)

		// Garbage collection: it stays while the image is there, and goes with it.
		w.ctr(w.worker, "content", "prune", "references")
		require.NotEmpty(t, w.snapshots(w.ctx, w.worker, lazy))
		require.NoError(t, w.daemon.Stop())
		require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
		w.foundAgain(w.worker)
		require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
		w.removeImage(w.worker, ref)
		w.eventually("no snapshots", func() bool { return len(w.snapshots(w.ctx, w.worker, lazy)) == 0 })
	}

	// From another repository than the archive says.
	elsewhere := w.registry.Ref("elsewhere/copy:1")
	w.ctr(w.builder, "image", "tag", ref, elsewhere)
	w.ctr(w.builder, "image", "push", elsewhere)
	w.registry.Reset()
	_, err = w.worker.Clipctl(w.ctx, "load", file, "--from", elsewhere)
	require.NoError(t, err)
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, elsewhere, "sh", "/app/run.sh"))
	require.NotEmpty(t, w.registry.Requests())
	for _, r := range w.registry.Requests() {
		require.Contains(t, r.Path, "/elsewhere/copy/blobs/")
	}

	_, err = w.worker.Clipctl(w.ctx, "load", file)
	require.NoError(t, err)
	stock := w.stock()
	w.pull(stock, eager, ref)
	requireSameRoot(w, stock, ref)

	// Another name, another namespace, and then all that needs the layers.
	ctx := namespaces.WithNamespace(w.ctx, "other")
	_, err = w.worker.Clipctl(ctx, "load", file, "--name", "example.com/mine:1")
	require.NoError(t, err)
	_, err = w.worker.Clipctl(ctx, "load", file, "--name", "example.com/mine:1")
	require.NoError(t, err, "a second time changes nothing")
	_, err = w.worker.Clipctl(ctx, "content", "ensure", "example.com/mine:1", "--from", ref)
	require.NoError(t, err)
	w.exportTar(ctx, w.worker, w.lab.Path("mine.tar"), "example.com/mine:1")
}

// TestLoadRefused loads what is no archive, or not lazy, and where there is no snapshotter.
func TestLoadRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	window := w.ref(images.WindowName)
	w.publish(images.WindowName)
	for _, name := range []string{w.ref(images.SmallName), window} {
		_, err := w.builder.Clipctl(w.ctx, "index", name, "-o", w.lab.Path(images.ShortName(name)+".clip"))
		require.NoError(t, err)
	}
	good := w.lab.Path("busybox.clip")
	text, err := os.ReadFile(good)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(w.lab.Path("cut.clip"), text[:len(text)/2], 0o600))
	server := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(server.Close)
	for source, says := range map[string]string{
		"/no/such.clip":             "/no/such.clip",
		w.lab.Path("cut.clip"):      "archive",
		w.lab.Path("window.clip"):   "zstd window",
		server.URL + "/none.clip":   "404",
		"http://127.0.0.1:1/a.clip": "127.0.0.1:1",
	} {
		result, err := w.worker.Clipctl(w.ctx, "load", source)
		require.Error(t, err)
		requireClear(t, result.Stderr, says)
	}
	result, err := w.builder.Clipctl(w.ctx, "load", good)
	require.Error(t, err)
	requireClear(t, result.Stderr, `no snapshotter "clip"`)
	require.Empty(t, w.snapshots(w.ctx, w.worker, lazy))
	require.NotContains(t, w.ctr(w.worker, "image", "ls", "-q"), "busybox")
}
