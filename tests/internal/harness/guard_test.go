package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
)

// hangEnv has TestHang hang: where, and below which directory its lab is.
const hangEnv = "CLIP_TEST_HANG"

func TestMain(m *testing.M) { os.Exit(Main(m.Run)) }

// TestGuard runs tests that hang, in processes of their own: in a file system that never answers, which the lab's end
// answers, between vfork and exec, which stops all of the process, and for good, one of them with all of the process.
func TestGuard(t *testing.T) {
	need.Root(t)
	waits := []string{"TestHang hangs: it goes on after", "(sleep 1000)\n", "nanosleep"}
	for where, says := range map[string][]string{
		"mount":    {"cleanups run", "--- goroutines", "harness.TestHang(", "fuse_"},
		"exec":     {"cleanups run", "fuse_", "the process beside, see stderr"},
		"for good": {"hangs for good", "--- goroutines", "harness.TestHang("},
		"frozen":   {"hangs for good"},
	} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			parent := shortDir(t)
			began := time.Now()
			out, err := hang(where, parent).CombinedOutput()
			require.Error(t, err)
			require.Less(t, time.Since(began), Limit/2, "%s", out)
			for _, text := range append(waits, says...) {
				require.Contains(t, string(out), text)
			}
			require.Equal(t, !slices.Contains(says, "hangs for good"), !strings.Contains(string(out), "hangs for good"))
			requireNothingBelow(t, parent)
		})
	}
}

// TestKilledRun kills a run in the middle: what it left is swept by the next one, which says so, and not while it lives.
func TestKilledRun(t *testing.T) {
	need.Root(t)
	parent := shortDir(t)
	cmd := hang("until killed", parent)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	var dir string
	_, err = fmt.Fscanln(out, &dir)
	require.NoError(t, err)
	var said []string
	sweep := func() {
		require.NoError(t, SweepStale(parent, func(args ...any) { said = append(said, fmt.Sprint(args...)) }))
	}
	sweep()
	require.Empty(t, said, "it is alive")
	require.Len(t, MountsUnder(dir), 1)
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	sweep()
	require.Len(t, said, 1)
	require.Contains(t, said[0], dir)
	require.Contains(t, said[0], "mount: 1, process: 1")
	requireNothingBelow(t, parent)
}

func requireNothingBelow(t *testing.T, parent string) {
	t.Helper()
	require.Empty(t, MountsUnder(parent))
	left, err := os.ReadDir(parent)
	require.NoError(t, err)
	require.Empty(t, left)
}

// shortDir is a directory in which a lab can be, but none of another test's.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "clip-guard-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.Remove(dir)) })
	return dir
}

func hang(where, parent string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestHang$")
	cmd.Env = append(os.Environ(), hangEnv+"="+where+":"+parent, "GODEBUG=asyncpreemptoff=1")
	return cmd
}

// TestHang is what TestGuard and TestKilledRun run.
func TestHang(t *testing.T) {
	where, parent, ok := strings.Cut(os.Getenv(hangEnv), ":")
	if !ok {
		return
	}
	// Within the first it must come to hang, since what it waits for is told, and within the
	// second go on without its lab, if it can.
	limit, grace := 6*time.Second, 20*time.Second
	switch where {
	case "until killed":
		limit = Limit
	case "for good", "frozen":
		grace = 5 * time.Second // which it waits for
	}
	lab, err := NewLab(Options{Parent: parent})
	require.NoError(t, err)
	lab.endWith(t, limit, grace)
	_, err = lab.start(t.Context(), "server", func(context.Context) error {
		if len(processesOf(lab.Dir)) == 0 {
			return errors.New("its environment is not there yet")
		}
		return nil
	}, "sleep", "1000")
	require.NoError(t, err)
	t.Cleanup(func() { fmt.Println("cleanups run") })
	switch where {
	case "for good":
		select {}
	case "frozen":
		go func() {
			for n := 0; n >= 0; n = (n + 1) & 0xff { // without preemption the collector waits for it
			}
		}()
		for { // until that has begun
			runtime.GC()
		}
	}
	dir := lab.Path("mount")
	require.NoError(t, os.Mkdir(dir, 0o700))
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, unix.Mount("nobody", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)))
	fmt.Println(lab.Dir)
	if where == "exec" {
		go func() {
			for {
				runtime.GC()
				time.Sleep(10 * time.Millisecond)
			}
		}()
		require.NoError(t, exec.Command(filepath.Join(dir, "file")).Run())
	}
	var st unix.Stat_t
	require.NoError(t, unix.Stat(filepath.Join(dir, "file"), &st)) // nobody reads what the kernel asks
}
