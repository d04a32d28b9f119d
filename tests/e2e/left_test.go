package e2e

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// leftEnv has TestLeft leave what it made.
const leftEnv = "CLIP_TEST_LEFT"

// TestKilledSuite kills a run of the suite and its processes in the middle: the next one removes what is left, mounts
// alone, or mounts with a keeper and somebody who waits for a daemon that will never answer.
func TestKilledSuite(t *testing.T) {
	t.Parallel()
	need.Root(t)
	for mode, keeps := range map[string]bool{"file": false, "fuse": true} {
		t.Run(mode, func(t *testing.T) {
			parent, err := os.MkdirTemp("", "clip-left-") // no other test's labs are there
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, os.Remove(parent)) })
			cmd := exec.Command("/proc/self/exe", "-test.run", "^TestLeft$")
			cmd.Env = append(os.Environ(), leftEnv+"="+mode, "TMPDIR="+parent)
			cmd.Stderr = os.Stderr
			out, err := cmd.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			var root string
			for lines := bufio.NewScanner(out); root == "" && lines.Scan(); {
				_, root, _ = strings.Cut(lines.Text(), "left: ")
			}
			lab := filepath.Dir(root)
			require.NotEmpty(t, root, "it did not get that far")
			var said []string
			sweep := func() {
				require.NoError(t, harness.SweepStale(parent, func(args ...any) { said = append(said, fmt.Sprint(args...)) }))
			}
			sweep()
			require.Empty(t, said, "it is running")

			require.NoError(t, cmd.Process.Kill())
			require.Error(t, cmd.Wait())
			for _, left := range harness.Leftovers(lab) {
				var pid int
				if _, err := fmt.Sscanf(left, "process %d", &pid); err == nil && !(keeps && strings.Contains(left, "containerd-clip-grpc keeper)")) {
					_ = unix.Kill(pid, unix.SIGKILL) // gone is as good
				}
			}
			reader := exec.Command("md5sum", filepath.Join(root, noise))
			require.NoError(t, reader.Start())
			ended := make(chan error, 1)
			go func() { ended <- reader.Wait() }()
			if keeps {
				select {
				case <-ended:
					t.Fatal("nobody waits: the keeper has ended")
				case <-time.After(time.Second):
				}
			}
			require.NotEmpty(t, harness.MountsUnder(lab))

			sweep()
			require.Len(t, said, 1)
			require.Contains(t, said[0], lab)
			require.Contains(t, said[0], "mount: ")
			require.Empty(t, harness.Leftovers(lab))
			require.NoDirExists(t, lab)
			select {
			case err := <-ended:
				require.Error(t, err, "it read what was not there")
			case <-time.After(time.Minute):
				t.Fatalf("a reader still waits:\n%s", harness.KernelStacks(reader.Process.Pid))
			}
		})
	}
}

// TestLeft is what TestKilledSuite runs and kills.
func TestLeft(t *testing.T) {
	mode := os.Getenv(leftEnv)
	if mode == "" {
		return
	}
	w := newWorldWith(t, "[mount]\nmode = '"+mode+"'\n[fill]\nmode = 'off'\n")
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	w.pull(w.worker, lazy, ref)
	require.NoError(t, w.worker.StartContainer(w.ctx, lazy, ref, "left", "sleep", "1000"))
	fmt.Println("left: " + w.view(w.worker, lazy, ref))
	time.Sleep(harness.Limit)
}
