package harness

import (
	"fmt"
	"maps"
	"os"
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
const (
	// Limit is how long a test may take with its lab. The longest take a third of it on a slow machine.
	Limit = 10 * time.Minute
	// guardGrace is how long a test may take to end without its lab. Then the whole run ends.
	guardGrace = 3 * time.Minute
)

// guard watches over a test until stop is called.
type guard struct {
	t            testing.TB
	lab          *Lab
	limit, grace time.Duration
	ended        chan struct{}
	watch        sync.WaitGroup
}

func startGuard(t testing.TB, l *Lab, limit, grace time.Duration) *guard {
	g := &guard{t: t, lab: l, limit: limit, grace: grace, ended: make(chan struct{})}
	g.watch.Go(g.run)
	return g
}

func (g *guard) stop() {
	close(g.ended)
	g.watch.Wait()
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

func (g *guard) run() {
	if g.over(g.limit) {
		return
	}
	// To stderr, which is seen also if the test never ends.
	fmt.Fprintf(os.Stderr, "%s hangs: it goes on after %v\n%s", g.t.Name(), g.limit, Stacks(g.lab.Dir))
	g.t.Errorf("it hangs: it went on after %v, and its lab was taken from it; where it stood is on stderr", g.limit)
	for deadline := time.Now().Add(g.grace); time.Now().Before(deadline); {
		g.takeAway() // again and again: the test may start what it expects to run
		if g.over(time.Second) {
			return
		}
	}
	fmt.Fprintf(os.Stderr, "%s hangs for good: it goes on without its lab, so the run ends\n%s", g.t.Name(), Stacks(g.lab.Dir))
	within(30*time.Second, func() { sweepOwn(g.lab.opts.Parent) })
	os.Exit(1)
}

func (g *guard) takeAway() {
	within(30*time.Second, func() {
		if err := abortConnections(g.lab.Dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		for _, pid := range processesOf(g.lab.Dir) {
			_ = unix.Kill(pid, unix.SIGKILL) // gone is as good
		}
	})
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

// Stacks says where everything stands that may hold up a test: the goroutines of this process, and its threads and those
// of the lab's processes in the kernel.
func Stacks(dir string) string {
	goroutines := make([]byte, 4<<20)
	goroutines = goroutines[:runtime.Stack(goroutines, true)]
	var b strings.Builder
	fmt.Fprintf(&b, "--- goroutines\n%s\n", goroutines)
	for _, pid := range append(processesOf(dir), os.Getpid()) {
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
