package harness

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A test that hangs is failed by its guard, which says where everything stands and then takes away what it may be
// waiting for. Else a run of the suite ends with go test's own timeout, which knows nothing of the kernel and of other
// processes, and cleans nothing up.
//
// The test's process has a guard, and so has a process beside it: Go's collector stops all of a process for as long as a
// thread of it is in a page fault or between vfork and exec, and both may wait for a file system.
const (
	// Limit is how long a test may take with its lab. The longest take a third of it on a slow machine.
	Limit = 10 * time.Minute
	// guardGrace is how long a test may take to end without its lab. Then the whole run ends. After half of it the
	// process beside begins.
	guardGrace = 3 * time.Minute
)

// guard watches over a test.
type guard struct {
	test         string
	dir          string // of its lab
	pid          int    // of its process
	limit, grace time.Duration
	ended        chan struct{} // closed when the test has ended
}

// startGuard starts the guards of a test and returns what ends them.
func startGuard(t testing.TB, l *Lab, limit, grace time.Duration) (stop func()) {
	t.Helper()
	if os.Getenv(guardEnv) != "" {
		t.Fatal("this package's TestMain does not call harness.Main")
	}
	g := &guard{test: t.Name(), dir: l.Dir, pid: os.Getpid(), limit: limit, grace: grace, ended: make(chan struct{})}
	var watch sync.WaitGroup
	watch.Go(func() {
		ended := g.run(func() {
			fmt.Fprint(os.Stderr, goroutines())
			t.Errorf("it hangs: it went on after %v, and its lab was taken from it; where it stood is on stderr", limit)
		})
		if ended {
			return
		}
		within(30*time.Second, func() { sweepOwn(l.opts.Parent) })
		os.Exit(1)
	})
	beside, err := g.beside()
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		close(g.ended)
		watch.Wait()
		if err := beside(); err != nil {
			t.Errorf("the process beside, see stderr, had to end what the test waited for: %v", err)
		}
	}
}

// over says whether the test ends within d.
func (g *guard) over(d time.Duration) bool {
	select {
	case <-g.ended:
		return true
	case <-time.After(d):
		return false
	}
}

// run returns when the test has ended, or, with false, when it goes on although its lab was taken from it. It calls hangs
// before it takes that.
func (g *guard) run(hangs func()) (ended bool) {
	if g.over(g.limit) {
		return true
	}
	// To stderr, which is seen also if the test never ends.
	fmt.Fprintf(os.Stderr, "%s hangs: it goes on after %v\n%s", g.test, g.limit, g.stacks())
	hangs()
	for deadline := time.Now().Add(g.grace); time.Now().Before(deadline); {
		g.takeAway() // again and again: the test may start what it expects to run
		if g.over(time.Second) {
			return true
		}
	}
	fmt.Fprintf(os.Stderr, "%s hangs for good: it goes on without its lab, so the run ends\n%s", g.test, g.stacks())
	return false
}

func (g *guard) takeAway() {
	within(30*time.Second, func() {
		if err := abortConnections(g.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		for _, pid := range processesOf(g.dir) {
			_ = unix.Kill(pid, unix.SIGKILL) // gone is as good
		}
	})
}

// guardEnv has a test's program be the process beside another: which test, lab and process, and how long.
const guardEnv = "CLIP_GUARD"

// beside starts the process that does what the guard does if the test's process cannot, and returns what ends it.
func (g *guard) beside() (stop func() error, err error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %d %d %d", guardEnv, g.test, g.dir, g.pid, g.limit+g.grace/2, g.grace))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true} // it outlives an interrupt of the test
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return func() error { return errors.Join(in.Close(), cmd.Wait()) }, nil
}

// Main runs the tests of a package that uses ForTest and returns the exit code; its TestMain calls it before anything
// else. In the process beside a test it watches over that, and fails if there was something to do.
func Main(run func() int) int {
	job := os.Getenv(guardEnv)
	if job == "" {
		return run()
	}
	g := &guard{ended: make(chan struct{})}
	if _, err := fmt.Sscanf(job, "%s %s %d %d %d", &g.test, &g.dir, &g.pid, &g.limit, &g.grace); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // it ends with the test, or with its process
		close(g.ended)
	}()
	code := 0
	if ended := g.run(func() { code = 1 }); !ended {
		_ = unix.Kill(g.pid, unix.SIGKILL) // gone is as good
		<-g.ended
		if err := sweep(g.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	return code
}

// within waits for f, but no longer than d, and says whether it has ended.
func within(d time.Duration, f func()) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
		return true
	case <-time.After(d):
		return false
	}
}

// goroutines says where those of this process stand.
func goroutines() string {
	all := make([]byte, 4<<20)
	return fmt.Sprintf("--- goroutines\n%s\n", all[:runtime.Stack(all, true)])
}

// stacks says where in the kernel the threads are of the test's process, of those that it started, and of the lab's.
func (g *guard) stacks() string {
	var b strings.Builder
	for _, pid := range withDescendants(append(processesOf(g.dir), g.pid)...) {
		fmt.Fprintf(&b, "--- process %d (%s)\n%s", pid, commandLine(pid), KernelStacks(pid))
	}
	return b.String()
}

// KernelStacks says where the threads of a process are in the kernel: those that are in the same place together.
func KernelStacks(pid int) string {
	places := map[string][]string{}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid)) // none: it has ended
	for _, task := range tasks {
		comm, _ := os.ReadFile(task + "/comm")
		wchan, _ := os.ReadFile(task + "/wchan")
		stack, err := os.ReadFile(task + "/stack")
		if err != nil {
			continue
		}
		place := fmt.Sprintf("in %s\n%s", wchan, stack)
		places[place] = append(places[place], fmt.Sprintf("%s (%s)", filepath.Base(task), strings.TrimSpace(string(comm))))
	}
	var b strings.Builder
	for _, place := range slices.Sorted(maps.Keys(places)) {
		fmt.Fprintf(&b, "%s %s", strings.Join(places[place], ", "), place)
	}
	return b.String()
}
