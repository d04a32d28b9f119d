package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestDamagedStore damages the store of snapshots below a running container, while there is no daemon: the next one has
// every snapshot, and the container goes on.
func TestDamagedStore(t *testing.T) {
	w := newWorldWith(t, "[fill]\nmode = 'off'\n")
	r := newReaders(w)
	w.pull(w.worker, lazy, r.ref)
	r.start(1)
	store := filepath.Join(w.daemon.Root, "metadata.db")
	for name, damage := range map[string]func(){
		"truncated": func() { require.NoError(t, os.Truncate(store, 3*4096)) },
		"altered":   func() { flipEvery(t, store, 97) },
		"removed":   func() { require.NoError(t, os.Remove(store)) },
	} {
		container := "after-" + name
		require.NoError(t, w.worker.StartContainer(w.ctx, lazy, r.ref, container, "sleep", "1000"))
		want := w.snapshots(w.ctx, w.worker, lazy)
		slices.Sort(want)
		w.daemon.Kill()
		damage()
		require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
		require.Contains(t, w.daemon.Log(), "its copy has taken its place", name)
		got := w.snapshots(w.ctx, w.worker, lazy)
		slices.Sort(got)
		require.Equal(t, want, got, name)
		r.requireGoOn()
		require.FileExists(t, fmt.Sprintf("/proc/%d/root/%s", w.pid(container), noise))
		require.NoError(t, w.worker.RemoveContainer(w.ctx, container))
	}
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, w.ref(images.SmallName), "sh", "/app/run.sh"))
	r.end()
	w.requireCleanEnd(r.ref)
}
