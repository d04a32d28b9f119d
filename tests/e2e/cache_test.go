package e2e

import (
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// workerWith starts another daemon with this configuration, and its containerd.
func (w *world) workerWith(config string) (*harness.Daemon, *harness.Containerd) {
	w.Helper()
	daemon, err := w.lab.StartDaemon(w.ctx, "daemon2", config)
	require.NoError(w, err)
	worker, err := w.lab.StartContainerd(w.ctx, "worker2", daemon)
	require.NoError(w, err)
	return daemon, worker
}

// TestFilledImageNeedsNoRegistry has an image completed in the background. It
// works when the registry is gone for good, also after a crash.
func TestFilledImageNeedsNoRegistry(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	stock := w.stock()
	w.pull(stock, eager, ref)
	daemon, worker := w.workerWith("[fill]\ndelay = '0s'\n")
	w.pull(worker, lazy, ref)
	require.NoError(t, worker.StartContainer(w.ctx, lazy, ref, "early", "sleep", "1000"))
	w.eventually("the layers are complete", func() bool {
		files, err := filepath.Glob(filepath.Join(daemon.Root, "layers", "*", "complete"))
		return err == nil && len(files) == len(w.layers(images.SmallName))
	})
	require.NoError(t, w.registry.SwitchOff())
	require.Contains(t, w.exec(worker, "early", "md5sum", "/sizes/noise-3M+1"), "/sizes/noise-3M+1")
	require.NoError(t, worker.RemoveContainer(w.ctx, "early"))
	daemon.Kill()
	require.NoError(t, w.lab.RestartDaemon(w.ctx, daemon))
	w.worker = worker
	w.runAfterRestart(ref)
	requireSameRoot(w, stock, ref)
}

// TestSmallCache reads an image through a cache that it does not fit in.
func TestSmallCache(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	stock := w.stock()
	w.pull(stock, eager, ref)
	daemon, worker := w.workerWith("[cache]\nmax_size = '2MiB'\n[fill]\ndelay = '0s'\n")
	w.pull(worker, lazy, ref)
	w.worker = worker
	requireSameRoot(w, stock, ref)
	var held int64
	require.NoError(t, filepath.WalkDir(filepath.Join(daemon.Root, "layers"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "data" {
			var st os.FileInfo
			st, err = d.Info()
			held += st.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	}))
	require.LessOrEqual(t, held, int64(2<<20))
	require.Positive(t, held)
	require.Equal(t, "hello from clip\n", w.run(worker, lazy, ref, "sh", "/app/run.sh"))
}
