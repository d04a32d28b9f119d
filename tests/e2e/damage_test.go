package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

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
		w.foundAgain(w.worker)
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

// damage is what may happen below the daemon's root to what a mounted root needs.
type damage struct {
	name, files string // patterns
	do          func(t *testing.T, path string)
}

var (
	indexDamages = []damage{
		{"spans altered", "layers/*/spans", flipBits},
		{"entries altered", "layers/*/entries", flipBits},
		{"all of an index", "layers/*/spans layers/*/entries", remove},
		{"chains and layers", "snapshots/*/chain layers/*", remove},
	}
	imageDamages = []damage{
		{"image cut", "roots/*/image", cutHalf},
		{"image and index", "roots/*/image layers/*/entries", flipBits},
	}
)

func cutHalf(t *testing.T, path string)  { require.NoError(t, os.Truncate(path, sizeOf(t, path)/2)) }
func flipBits(t *testing.T, path string) { flipEvery(t, path, 97) }
func remove(t *testing.T, path string)   { require.NoError(t, os.RemoveAll(path)) }

// TestDamageBelowContainers damages what a mounted root needs while there is no daemon: containers go on with the next
// one.
func TestDamageBelowContainers(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			w := newWorldWith(t, "[mount]\nmode = '"+mode+"'\n[fill]\nmode = 'off'\n")
			r := newReaders(w)
			w.pull(w.worker, lazy, r.ref)
			require.NoError(t, w.worker.StartContainer(w.ctx, lazy, r.ref, "container", "sleep", "1000"))
			root := fmt.Sprintf("/proc/%d/root", w.pid("container"))
			if mode != "loop" { // which is as file
				r.start(1)
				r.requireUndamaged(root, indexDamages)
				r.end() // it would see what the kernel reads of damaged images
				r.requireServedInPart(root, mode)
			}
			switch mode {
			case "file":
				r.requireUndamaged(root, imageDamages)
			case "loop":
				r.requireUndamaged(root, imageDamages[:1])
			}
			require.NoError(t, w.worker.RemoveContainer(w.ctx, "container"))
			w.requireCleanEnd(r.ref)
		})
	}
}

// requireUndamaged has a container read everything after each damage. What is not in the kernel's memory is fetched.
func (r *readers) requireUndamaged(root string, all []damage) {
	r.Helper()
	for _, d := range all {
		r.Log(d.name)
		_, err := r.worker.Clipctl(r.ctx, "cache", "prune", "--all")
		require.NoError(r, err)
		r.daemon.Kill()
		r.damage(d)
		require.NoError(r, r.lab.RestartDaemon(r.ctx, r.daemon), d.name)
		require.Empty(r, r.unread(root), d.name)
	}
}

// requireServedInPart damages things while the registry is away: what they are not needed for is read, and all of it when
// the registry is back.
func (r *readers) requireServedInPart(root, mode string) {
	r.Helper()
	image, err := r.worker.Client().GetImage(r.ctx, r.ref)
	require.NoError(r, err)
	diffIDs, err := image.RootFS(r.ctx)
	require.NoError(r, err)
	config, err := os.ReadFile(r.daemon.Config)
	require.NoError(r, err)
	// Many reads wait for so long. What is to be read when the registry is back is tried again.
	r.setConfig(string(config) + "[registry]\ngive_up = '2s'\n")
	defer r.setConfig(string(config))
	for _, d := range []damage{
		{"a layer's spans", "layers/" + diffIDs[0].Encoded() + "/spans", flipBits},
		{"entries", "layers/*/entries", flipBits},
		{"chains and layers", "snapshots/*/chain layers/*", remove},
	} {
		if mode == "file" && strings.Contains(d.files, "entries") {
			continue // nobody needs them
		}
		r.Log("without the registry: " + d.name)
		require.NoError(r, r.daemon.Stop()) // what was read is recorded
		require.NoError(r, r.registry.SwitchOff())
		r.damage(d)
		require.NoError(r, r.lab.RestartDaemon(r.ctx, r.daemon), d.name)
		unread := r.unread(root)
		if strings.Contains(d.files, "spans") {
			require.Contains(r, unread, "/bin/busybox")
			require.Less(r, len(unread), len(r.sums))
		}
		require.NoError(r, r.registry.SwitchOn())
		r.eventually(d.name+" are repaired", func() bool { return len(r.unread(root)) == 0 })
	}
}

// damage damages files of the daemon.
func (w *world) damage(d damage) {
	w.Helper()
	for pattern := range strings.FieldsSeq(d.files) {
		files, err := filepath.Glob(filepath.Join(w.daemon.Root, pattern))
		require.NoError(w, err)
		require.NotEmpty(w, files, pattern)
		for _, file := range files {
			d.do(w.T, file)
		}
	}
}

// unread lists the files that cannot be read below root. Nothing but an input/output error is allowed.
func (r *readers) unread(root string) (files []string) {
	r.Helper()
	require.NoError(r, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o200)) // what was learned of names, too
	for path, want := range r.sums {
		got, err := sumOf(filepath.Join(root, path))
		if errors.Is(err, unix.EIO) {
			files = append(files, path)
			continue
		}
		require.NoError(r, err, path)
		require.Equal(r, want, got, path)
	}
	return files
}
