package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestHidden has layers that are served over FUSE and are in no mount table: no path leads to them, and other users reach
// neither them, through the processes that hold them, nor what is mounted for containers.
func TestHidden(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	w.eachMode(func(w *world) {
		w.pull(w.worker, lazy, ref)
		require.NoError(w, w.worker.StartContainer(w.ctx, lazy, ref, "hidden", "sleep", "1000"))
		w.Cleanup(func() { require.NoError(w, w.worker.RemoveContainer(context.WithoutCancel(w.ctx), "hidden")) })
		require.NotEmpty(w, harness.FUSEConnections(w.lab.Dir))
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(w.daemon.Root))
		require.NoError(w, err)
		require.Len(w, mounts, 1, "the container's root")
		require.Equal(w, strings.HasSuffix(w.T.Name(), "/fuse"), strings.HasPrefix(mounts[0].FSType, "fuse"), "%+v", mounts[0])

		// The daemon's directory alone keeps others out.
		for _, dir := range []string{w.lab.Dir, filepath.Dir(w.daemon.Root)} {
			require.NoError(w, os.Chmod(dir, 0o755))
		}
		reached := []string{filepath.Join(w.daemon.Root, "roots"), mounts[0].Mountpoint, mounts[0].Mountpoint + "/fs", filepath.Join(w.daemon.Root, "layers")}
		for _, pid := range append(w.keepers(), w.daemon.Pid()) {
			fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
			require.NoError(w, err)
			for _, fd := range fds { // the device and the mount: others come and go
				if to, err := os.Readlink(fd); err == nil && (to == "/dev/fuse" || to == "/") {
					reached = append(reached, fd)
				}
			}
			reached = append(reached, fmt.Sprintf("/proc/%d/root/", pid), fmt.Sprintf("/proc/%d/cwd/", pid))
		}
		require.Contains(w, strings.Join(reached, "\n"), "/fd/")
		for _, path := range reached {
			require.NoError(w, lookAs(0, path), "root reaches it")
			require.ErrorContains(w, lookAs(65534, path), "Permission denied", path)
		}
		require.NoError(w, lookAs(65534, filepath.Dir(w.daemon.Root)), "others reach what is not hidden")
	})
}

// lookAs has a user look at a path.
func lookAs(uid uint32, path string) error {
	cmd := exec.Command("stat", "--dereference", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}
