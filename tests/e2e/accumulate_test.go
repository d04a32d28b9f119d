package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// footprint is what a daemon has of what could become more and more.
type footprint struct{ files, goroutines, connections, mounts, loops, snapshots, layers, roots int }

var goroutineTotal = regexp.MustCompile(`goroutine profile: total (\d+)`)

func (w *world) footprint() footprint {
	w.Helper()
	goroutines, err := strconv.Atoi(goroutineTotal.FindStringSubmatch(w.ask(w.lab.Path("debug"), "/debug/pprof/goroutine?debug=1"))[1])
	require.NoError(w, err)
	entries := func(dir string) int {
		found, err := os.ReadDir(filepath.Join(w.daemon.Root, dir))
		require.NoError(w, err)
		return len(found)
	}
	return footprint{
		files: w.openFiles(), goroutines: goroutines, connections: len(harness.FUSEConnections(w.lab.Dir)),
		mounts: len(harness.MountsUnder(w.lab.Dir)), loops: len(loopsOf(w.T, w.daemon.Root)),
		snapshots: entries("snapshots"), layers: entries("layers"), roots: entries("roots"),
	}
}

// settled is the footprint without images when it has stayed the same for a while. Other tests may make mount namespaces
// meanwhile, which keep what was mounted until they end.
func (w *world) settled() (now footprint) {
	w.Helper()
	w.eventually("what ended is gone", func() bool {
		before := w.footprint()
		time.Sleep(200 * time.Millisecond)
		now = w.footprint()
		held := max(now.mounts, now.loops, now.connections-1) // the daemon has one for all layers
		return now == before && now.snapshots == 0 && now.roots == 0 && now.layers == 0 && held == 0
	})
	return now
}

// TestNothingAccumulates has an image pulled, run and removed again and again on one daemon, which has no more in the end
// than after the first rounds.
func TestNothingAccumulates(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			w := newWorldWith(t, "[mount]\nmode = '"+mode+"'\n[debug]\naddress = 'unix://LAB/debug'\n")
			ref := w.ref(images.SmallName)
			w.index(images.SmallName)
			const warmUp, rounds = 3, 9
			var most footprint
			for round := range rounds {
				w.pull(w.worker, lazy, ref)
				require.NoError(t, w.worker.StartContainer(w.ctx, lazy, ref, "stays", "sleep", "1000"))
				w.run(w.worker, lazy, ref, "md5sum", "/"+noise)
				used := w.footprint()
				require.Positive(t, used.connections)
				require.Positive(t, used.roots)
				require.NoError(t, w.worker.RemoveContainer(w.ctx, "stays"))
				w.removeImage(w.worker, ref)
				now := w.settled()
				t.Logf("round %d: %+v", round, now)
				if round < warmUp { // connections to the registry and their goroutines stay for a while
					most.files, most.goroutines = max(most.files, now.files), max(most.goroutines, now.goroutines)
					now.files, now.goroutines = most.files, most.goroutines
					most = now
				}
			}
			var now footprint
			w.eventually(fmt.Sprintf("no more than after %d rounds, %+v", warmUp, most), func() bool {
				now = w.footprint()
				few := now.files <= most.files && now.goroutines <= most.goroutines
				now.files, now.goroutines = most.files, most.goroutines
				return few && now == most
			})
		})
	}
}
