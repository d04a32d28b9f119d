package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/transfer"
	transferimage "github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/plugin"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// custom starts the containerd of examples/containerd, with the small images in it. Its cache of layer indexes is what
// config.toml.example shows.
func (w *world) custom() *harness.Containerd {
	w.Helper()
	c, err := w.lab.StartCustomContainerd(w.ctx, "custom", w.buildCustom(), "[debug]\n  level = 'info'\n"+w.pluginSection())
	require.NoError(w, err)
	w.ctr(c, "image", "import", "--no-unpack", "--all-platforms", w.lab.Path("small.tar"))
	return c
}

// buildCustom builds the containerd of examples/containerd.
func (w *world) buildCustom() string {
	w.Helper()
	top, err := harness.Top()
	require.NoError(w, err)
	binary := w.lab.Path("containerd-with-clip")
	// As the parts are built, so that most of it comes out of Go's cache.
	build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-tags", "no_btrfs no_zfs no_devmapper", "-o", binary, ".")
	build.Dir = filepath.Join(top, "examples", "containerd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(w, err, string(out))
	return binary
}

// pluginSection is the plugin's section in config.toml.example, which is commented out there.
func (w *world) pluginSection() string {
	w.Helper()
	top, err := harness.Top()
	require.NoError(w, err)
	text, err := os.ReadFile(filepath.Join(top, "config.toml.example"))
	require.NoError(w, err)
	_, section, found := strings.Cut(string(text), "# [plugins.'io.containerd.internal.v1.clip']\n")
	require.True(w, found)
	section = strings.ReplaceAll("[plugins.'io.containerd.internal.v1.clip']\n"+section, "\n# ", "\n")
	return strings.ReplaceAll(section, "/var/cache/containerd-clip", w.lab.Path("custom-cache"))
}

// plugins are a containerd's plugins, and how they are.
func (w *world) plugins(c *harness.Containerd) map[string]string {
	w.Helper()
	found := map[string]string{}
	for line := range strings.Lines(w.ctr(c, "plugins", "ls")) {
		if fields := strings.Fields(line); len(fields) > 3 {
			found[fields[0]+" "+fields[1]] = fields[len(fields)-1]
		}
	}
	return found
}

// events collects the progress of an export.
type events struct {
	mu  sync.Mutex
	all []transfer.Progress
}

func (e *events) add(p transfer.Progress) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, p)
}

// counts says how often each event came.
func (e *events) counts() map[string]int {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := map[string]int{}
	for _, p := range e.all {
		n[p.Event]++
	}
	return n
}

// TestTransferInside has a containerd with the plugin export and index by itself: image store to our destination,
// through the transfer service that everybody uses.
func TestTransferInside(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.custom()
	inside, err := plugin.Installed(w.ctx, c.Client())
	require.NoError(t, err)
	require.True(t, inside)
	listed := w.plugins(c)
	require.Equal(t, "ok", listed["io.containerd.internal.v1 clip"])
	delete(listed, "io.containerd.internal.v1 clip")
	require.Equal(t, "ok", listed["io.containerd.snapshotter.v1 clip"])
	delete(listed, "io.containerd.snapshotter.v1 clip")
	require.Equal(t, w.plugins(w.builder), listed, "all else is as in a stock containerd: there is no second transferrer")

	want := w.lab.Path("want.clip")
	_, err = w.builder.Clipctl(w.ctx, "index", images.SmallName, "-o", want)
	require.NoError(t, err)
	wanted, err := os.ReadFile(want)
	require.NoError(t, err)
	for round, outcome := range []string{"indexed", "cached"} {
		var archive bytes.Buffer
		var progress, standard events
		layout := w.lab.Path("layout-" + outcome)
		e := plugin.NewExport(plugin.ExportOptions{Archive: &archive, Layout: layout, Progress: progress.add})
		require.NoError(t, c.Client().Transfer(w.ctx, transferimage.NewStore(images.SmallName), e, transfer.WithProgress(standard.add)))
		require.NoError(t, e.Wait())
		require.True(t, bytes.Equal(wanted, archive.Bytes()), "the archive that clipctl makes")
		requireLayout(t, layout)
		w.requireShared(c, layout)
		got := progress.counts()
		require.Equal(t, 5, got[outcome], "%v", got)
		require.Equal(t, 1, got["exported"])
		require.Equal(t, 1, got["complete"])
		require.Equal(t, round+1, strings.Count(c.Log(), indexing), "containerd does it")
		w.eventually("it says so as of any transfer", func() bool { return len(standard.counts()) > 0 })
	}
	require.DirExists(t, w.lab.Path("custom-cache"), "the section of config.toml.example is read")

	// What containerd does else it does as before.
	w.exportTar(w.ctx, c, w.lab.Path("again.tar"), images.SmallName)
	w.pull(c, eager, w.ref(images.SmallName))
	require.Equal(t, "hello from clip\n", w.run(c, eager, w.ref(images.SmallName), "sh", "/app/run.sh"))
}

// TestSnapshotterInside has a containerd that knows the snapshotter by its import alone, also before the daemon is there.
func TestSnapshotterInside(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	require.NoError(t, w.daemon.Stop())
	c, err := w.lab.StartCustomContainerd(w.ctx, "custom", w.buildCustom(), fmt.Sprintf(`[plugins.'io.containerd.snapshotter.v1.clip']
  address = %q
  root = %q
[plugins.'io.containerd.transfer.v1.local']
  [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
    platform = "linux"
    snapshotter = "clip"
    differ = "walking"
`, w.daemon.Socket, w.daemon.Root))
	require.NoError(t, err)
	require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
	w.foundAgain(c)
	require.Empty(t, w.pull(c, lazy, ref).Gets(w.layers(images.SmallName)...), "no layer is pulled")
	require.Equal(t, "hello from clip\n", w.run(c, lazy, ref, "sh", "/app/run.sh"))
}

// TestTransferRefused has exports that cannot be. Run returns, whatever containerd did to its streams, and containerd
// goes on.
func TestTransferRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	custom := w.custom()
	stock := w.stock()
	w.ctr(stock, "image", "import", "--no-unpack", "--all-platforms", w.lab.Path("small.tar"))
	for name, c := range map[string]*harness.Containerd{"inside": custom, "stock": stock} {
		layer := w.manifest(c, images.SiblingName).Layers[3].Digest
		require.NoError(t, c.Client().ContentStore().Delete(w.ctx, layer))
		for what, x := range map[string]struct {
			image string
			opts  plugin.ExportOptions
			is    error
			says  string
		}{
			"no such image":    {image: "example.com/none:1", is: errdefs.ErrNotFound, says: "example.com/none:1"},
			"missing layer":    {image: images.SiblingName, is: errdefs.ErrNotFound, says: layer.String()},
			"missing platform": {image: images.SmallName, opts: plugin.ExportOptions{Platform: "windows/amd64"}, is: errdefs.ErrNotFound, says: "windows/amd64"},
			"bad platform":     {image: images.SmallName, opts: plugin.ExportOptions{Platform: "a/b/c/d"}, is: errdefs.ErrInvalidArgument, says: "a/b/c/d"},
			"relative layout":  {image: images.SmallName, opts: plugin.ExportOptions{Layout: "layout"}, is: errdefs.ErrInvalidArgument, says: "absolute"},
			"bad reference":    {image: images.SmallName, opts: plugin.ExportOptions{StorageRef: "Not A Ref"}, says: "Not A Ref"},
			"broken writer":    {image: images.SmallName, opts: plugin.ExportOptions{Archive: broken{}}, is: errBroken},
		} {
			t.Run(name+" "+what, func(t *testing.T) {
				var progress events
				x.opts.Progress = progress.add
				if x.opts.Archive == nil {
					x.opts.Archive = new(bytes.Buffer)
				}
				err := plugin.Run(w.ctx, c.Client(), x.image, plugin.NewExport(x.opts))
				require.Error(t, err)
				require.ErrorContains(t, err, x.says)
				if x.is != nil {
					require.ErrorIs(t, err, x.is)
				}
			})
		}
		var archive bytes.Buffer
		require.NoError(t, plugin.Run(w.ctx, c.Client(), images.SmallName, plugin.NewExport(plugin.ExportOptions{Archive: &archive})))
		require.NotZero(t, archive.Len())
	}
}

var errBroken = errors.New("disk full")

// broken is a writer that fails.
type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, errBroken }

// TestTransferStock exports from a containerd that knows nothing of us: the same object works in this process.
func TestTransferStock(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.stock()
	w.ctr(c, "image", "import", "--no-unpack", "--all-platforms", w.lab.Path("small.tar"))
	inside, err := plugin.Installed(w.ctx, c.Client())
	require.NoError(t, err)
	require.False(t, inside)
	err = c.Client().Transfer(w.ctx, transferimage.NewStore(images.SmallName), plugin.NewExport(plugin.ExportOptions{Layout: w.lab.Path("no")}))
	require.Error(t, err, "stock containerd does not know the type")

	want := w.lab.Path("want.clip")
	_, err = w.builder.Clipctl(w.ctx, "index", images.SmallName, "-o", want, "--storage-ref", w.ref(images.SmallName))
	require.NoError(t, err)
	wanted, err := os.ReadFile(want)
	require.NoError(t, err)
	var archive bytes.Buffer
	var progress events
	layout := w.lab.Path("layout")
	e := plugin.NewExport(plugin.ExportOptions{Archive: &archive, Layout: layout, StorageRef: w.ref(images.SmallName), Progress: progress.add})
	require.NoError(t, plugin.Run(w.ctx, c.Client(), images.SmallName, e))
	require.True(t, bytes.Equal(wanted, archive.Bytes()))
	require.Equal(t, 5, progress.counts()["indexed"])
	requireLayout(t, layout)
	require.NotContains(t, c.Log(), indexing)
}
