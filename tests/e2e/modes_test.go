package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestFileModes has everything be for root alone, whatever the umask that the daemon is started with. What a container
// sees of itself below snapshots/*/fs has the modes that the image and the container give it; the directories on the way
// are closed.
//
// It runs alone: all of the process has this umask meanwhile, and so has what other tests start.
func TestFileModes(t *testing.T) {
	old := syscall.Umask(0)
	restore := func() { syscall.Umask(old) }
	defer restore()
	k := newKubelet(t, fillLate+`
[metrics]
address = "unix://LAB/open/metrics"
[debug]
address = "unix://LAB/open/debug"
[watch]
containerd = "LAB/worker/containerd.sock"
namespaces = ["k8s.io"]
cache_dir = "LAB/indexes"
[[watch.rules]]
names = ["*/*", "*/*/*"]
action = "index"
`)
	ref := k.ref(images.SmallName)
	secret := &private{user: "u", password: "p"}
	require.NoError(t, k.pullImage(k.ref(images.PauseName), secret.auth()))
	require.NoError(t, k.pullImage(ref, secret.auth()))
	k.pull(k.worker, lazy, ref)
	require.NoError(t, k.worker.StartContainer(k.ctx, lazy, ref, "web", "sleep", "1000"))
	_, err := k.worker.Clipctl(k.ctx, "record", ref, "-o", k.lab.Path("recorded.clip"), "--", "cat", "/app/name")
	require.NoError(t, err)
	beside := filepath.Dir(k.daemon.Socket)
	k.eventually("an archive is kept", func() bool {
		found, err := filepath.Glob(filepath.Join(k.daemon.Root, "archives", "*.clip"))
		require.NoError(t, err)
		return len(found) > 0
	})
	restore()

	seen := map[string]bool{}
	for _, top := range []string{k.daemon.Root, k.lab.Path("indexes"), k.lab.Path("open")} {
		require.NoError(t, filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			var info fs.FileInfo
			if err == nil {
				info, err = d.Info()
			}
			if errors.Is(err, fs.ErrNotExist) && path != top {
				return nil // the daemon, which goes on indexing, has just removed it
			}
			require.NoError(t, err)
			name, err := filepath.Rel(k.lab.Dir, path)
			require.NoError(t, err)
			if parts := strings.Split(name, "/"); len(parts) > 4 && (parts[2] == "snapshots" && parts[4] != "chain" || parts[2] == "roots" && parts[4] == "mnt") {
				return fs.SkipDir
			}
			requireOwn(t, info, name)
			seen[filepath.Ext(name)+" in "+filepath.Base(filepath.Dir(path))] = true
			seen[filepath.Base(path)] = true
			return nil
		}))
	}
	for _, path := range []string{"credentials.json", filepath.Base(k.daemon.Socket)} {
		info, err := os.Lstat(filepath.Join(beside, path))
		require.NoError(t, err)
		requireOwn(t, info, path)
	}
	for _, name := range []string{
		"metadata.db", "metadata.db.copy", "lock", "keeper.sock", "chain", "data", "spans", "entries", "have", "sources", "image", "image.sha256", "metrics", "debug", "recordings", ".clip in archives",
	} {
		require.Contains(t, seen, name)
	}
}

// requireOwn says that nobody but root has anything of a file; of a socket, root's group may, and an archive may be read.
func requireOwn(t *testing.T, info fs.FileInfo, name string) {
	t.Helper()
	others := fs.FileMode(0o077)
	switch {
	case info.Mode().Type() == fs.ModeSocket:
		others = 0o007
	case filepath.Ext(name) == ".clip":
		others = 0o033 // archives are files to be handed on; the directory is closed
	}
	require.Zero(t, info.Mode().Perm()&others, "%s is %v", name, info.Mode())
	owner := info.Sys().(*syscall.Stat_t)
	require.Equal(t, "0:0", fmt.Sprintf("%d:%d", owner.Uid, owner.Gid), name)
}
