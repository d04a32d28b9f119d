package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestWatchProcess has the process that indexes die, and the daemon die: the one is started again, and does not outlive
// the other.
func TestWatchProcess(t *testing.T) {
	t.Parallel()
	w := newWatched(t)
	const first, second = "example.com/kept/first:1", "example.com/kept/second:1"
	w.ctr(w.builder, "image", "tag", images.SmallName, first)
	w.requireKept(first, w.registry.Ref("kept/first:1"))
	child := watchers(t, w.watcher.Pid())
	require.Len(t, child, 1)
	for _, thread := range threads(t, child[0]) {
		nice, err := unix.Getpriority(unix.PRIO_PROCESS, thread)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		require.NoError(t, err)
		require.Equal(t, 20-10, nice, "niceness of every thread is 10")
	}
	score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", child[0]))
	require.NoError(t, err)
	require.Equal(t, "500\n", string(score), "the kernel ends it before containers")
	require.NoError(t, unix.Kill(child[0], unix.SIGKILL))
	w.ctr(w.builder, "image", "tag", w.ref(images.SiblingName), second)
	w.requireKept(second, w.registry.Ref("kept/second:1"))
	require.Equal(t, 1, w.indexed("kept/first"))

	child = watchers(t, w.watcher.Pid())
	require.Len(t, child, 1)
	w.watcher.Kill()
	w.eventually("the end of the process", func() bool { return unix.Kill(child[0], 0) != nil })
}

// watchers are the processes that watch for a daemon, which has a keeper beside them.
func watchers(t *testing.T, daemon int) []int {
	t.Helper()
	return slices.DeleteFunc(children(t, daemon), func(pid int) bool {
		command, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // nothing if it ended
		return !slices.Contains(strings.Split(string(command), "\x00"), "watch")
	})
}

// children are the processes that a process started.
func children(t *testing.T, pid int) (found []int) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	require.NoError(t, err)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread ended
		}
		require.NoError(t, err)
		for _, field := range strings.Fields(string(text)) {
			child, err := strconv.Atoi(field)
			require.NoError(t, err)
			found = append(found, child)
		}
	}
	return found
}

// threads are the ids of a process's threads.
func threads(t *testing.T, pid int) (found []int) {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	require.NoError(t, err)
	for _, e := range entries {
		id, err := strconv.Atoi(e.Name())
		require.NoError(t, err)
		found = append(found, id)
	}
	return found
}
