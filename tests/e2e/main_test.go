package e2e

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
	"github.com/beam-cloud/containerd-clip/tests/internal/rootdiff"
)

// TestDemoImage goes the whole way with a real image: indexed without the registry, pulled without its layers, run with
// a fraction of its bytes, and the same as an ordinary image in every respect.
func TestDemoImage(t *testing.T) {
	t.Parallel()
	w := newDemoWorld(t)
	ref, layers, size := w.ref(images.DemoName), w.layers(images.DemoName), w.size(images.DemoName)

	w.registry.Reset()
	file := w.lab.Path("demo.clip")
	result, err := w.builder.Clipctl(w.ctx, "index", ref, "-o", file)
	require.NoError(t, err)
	require.Empty(t, w.registry.Requests(), "indexing asks the registry nothing")
	requireIndexingLine(t, result, ref, "3")
	require.Contains(t, result.Stdout, file)
	info, err := os.Stat(file)
	require.NoError(t, err)
	require.Less(t, info.Size(), size/10, "an archive is small")
	t.Logf("indexed %d MB in %v: archive of %d kB", size>>20, result.Took, info.Size()>>10)

	w.index(images.DemoName)
	require.Empty(t, w.registry.Requests().Gets(layers...), "pushing the archive reads no layer")

	requests := w.pull(w.worker, lazy, ref)
	require.Empty(t, requests.Gets(layers...), "a pull downloads no layer:\n%s", requests)

	command := []string{"python3", "-c", "import numpy; print(numpy.arange(6).sum())"}
	w.registry.Reset()
	require.Equal(t, "15\n", w.run(w.worker, lazy, ref, command...))
	requests = w.registry.Requests()
	fetched := requests.Gets(layers...)
	require.NotEmpty(t, fetched, "it did come from the registry")
	for _, r := range fetched {
		require.NotEmpty(t, r.Range, "layers are read in ranges: %s", r)
	}
	require.Less(t, requests.Sent(), size*2/5, "bytes fetched are well under the image's size")
	t.Logf("run fetched %.1f of %.1f MB in %d requests", float64(requests.Sent())/1e6, float64(size)/1e6, len(requests))

	stock := w.stock()
	requests = w.pull(stock, eager, ref)
	require.Equal(t, size, requests.Gets(layers...).Sent())
	require.Equal(t, "15\n", w.run(stock, eager, ref, command...))
	requireSameRoot(w, stock, ref)
}

// TestSmallImage has one of everything that a layer can say.
func TestSmallImage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	require.Empty(t, w.pull(w.worker, lazy, ref).Gets(w.layers(images.SmallName)...))
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))

	stock := w.stock()
	w.pull(stock, eager, ref)
	require.Equal(t, "hello from clip\n", w.run(stock, eager, ref, "sh", "/app/run.sh"))
	requireSameRoot(w, stock, ref)
	require.Empty(t, w.snapshots(w.ctx, w.worker, eager), "nothing was unpacked")
}

// TestWritableContainer checks that a container can change what is in its image, and that the image stays as it is.
func TestWritableContainer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	w.pull(w.worker, lazy, ref)
	script := "echo more >> /app/name && rm /data/a && mkdir /opaque/sub/dir && chmod 700 /many && cat /app/name && ls /data/a /opaque/sub"
	result, err := w.printedAndFailed(func() (harness.Result, error) {
		return w.worker.RunContainer(w.ctx, lazy, ref, "writer", "sh", "-c", script)
	})
	require.Error(t, err, "ls does not find /data/a")
	require.Equal(t, 1, result.Code)
	require.Equal(t, "clip\nmore\n/opaque/sub:\ndir\nnew\n", result.Stdout)
	require.Equal(t, "clip\nthree names\n", w.run(w.worker, lazy, ref, "sh", "-c", "cat /app/name /data/a"))
}

// stock starts a containerd that knows nothing of the project.
func (w *world) stock() *harness.Containerd {
	w.Helper()
	c, err := w.lab.StartContainerd(w.ctx, "stock", nil)
	require.NoError(w, err)
	return c
}

// requireSameRoot compares an image's root on the worker with what a stock containerd made of it.
func requireSameRoot(w *world, stock *harness.Containerd, ref string) {
	w.Helper()
	want, err := rootdiff.Read(w.view(stock, eager, ref))
	require.NoError(w, err)
	got, err := rootdiff.Read(w.view(w.worker, lazy, ref))
	require.NoError(w, err)
	diffs := rootdiff.Diff(want, got, w.start)
	const shown = 50
	require.Empty(w, diffs, "%d differences among %d names, the first:\n%s", len(diffs), len(want),
		strings.Join(diffs[:min(shown, len(diffs))], "\n"))
	w.Logf("%d names are the same", len(want))
}

// requireIndexingLine checks the one line of the log that other programs may look for.
func requireIndexingLine(t *testing.T, result harness.Result, image, layers string) {
	t.Helper()
	var found string
	for line := range strings.Lines(result.Stderr) {
		if strings.Contains(line, indexing) {
			found = line
		}
	}
	require.NotEmpty(t, found, "no line %q in:\n%s", indexing, result.Stderr)
	for _, field := range []string{"image=", "source=", "storage-ref=", "platform=", "layers=" + layers, image} {
		require.Contains(t, found, field)
	}
}
