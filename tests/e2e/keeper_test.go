package e2e

import (
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// checkScript is what a container runs: it checks the files that are listed in sums over and over. What it writes is
// in memory.
const checkScript = `cd /dev/shm; while [ ! -e sums ]; do sleep 0.1; done
n=0; while [ ! -e stop ]; do md5sum -c sums >out 2>&1 || cp out failed; n=$((n+1)); echo $n >rounds.new; mv rounds.new rounds; done`

// checkFile is a file of a container that runs checkScript.
func checkFile(root, name string) string { return filepath.Join(root, "dev/shm", name) }

// readers are containers that check what they read, from inside, and processes that do it from outside.
type readers struct {
	*world
	ref     string
	sums    map[string]string // MD5 by path
	all     []*reader
	longest atomic.Int64 // nanoseconds
	stop    chan struct{}
	halt    func() // closes stop
	running sync.WaitGroup

	mu   sync.Mutex // guards bad and slow
	bad  []string
	slow []slowRead
}

// reader is a container that checks what it reads, and who reads its root from outside.
type reader struct {
	id, root string
	reads    atomic.Int64 // files outside
}

// slowRead is a read that took longer than slowest.
type slowRead struct {
	began time.Time
	took  time.Duration
}

const slowest = 100 * time.Millisecond

// newReaders indexes the small image.
func newReaders(w *world) *readers {
	w.Helper()
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	r := &readers{world: w, ref: ref, sums: map[string]string{}, stop: make(chan struct{})}
	r.halt = sync.OnceFunc(func() { close(r.stop) })
	w.Cleanup(r.halt) // of a test that failed: they would read what is gone, as fast as they can
	stock := w.stock()
	w.pull(stock, eager, ref)
	// Runtimes mount over files in /etc; names in /names have line breaks.
	text := w.run(stock, eager, ref, "find", "/", "-xdev", "-type", "f", "-size", "+0", "!", "-path", "/etc/*", "!", "-path", "/names/*", "-exec", "md5sum", "{}", "+")
	for line := range strings.Lines(text) {
		sum, path, ok := strings.Cut(strings.TrimSpace(line), "  ")
		if ok && !strings.HasPrefix(path, "\\") {
			r.sums[path] = sum
		}
	}
	require.Greater(w, len(r.sums), 50)
	return r
}

// start runs n more containers, each with a reader outside.
func (r *readers) start(n int) {
	r.Helper()
	var list strings.Builder
	for path, sum := range r.sums {
		fmt.Fprintf(&list, "%s  %s\n", sum, path)
	}
	for range n {
		id := fmt.Sprint("reader", len(r.all))
		require.NoError(r, r.worker.StartContainer(r.ctx, lazy, r.ref, id, "sh", "-c", checkScript))
		root := fmt.Sprintf("/proc/%d/root", r.pid(id))
		require.NoError(r, os.WriteFile(checkFile(root, "sums.new"), []byte(list.String()), 0o600))
		require.NoError(r, os.Rename(checkFile(root, "sums.new"), checkFile(root, "sums")))
		one := &reader{id: id, root: root}
		r.all = append(r.all, one)
		r.running.Go(func() { r.readOutside(one) })
	}
}

// readOutside reads whole files, in the order of a map.
func (r *readers) readOutside(one *reader) {
	for {
		for path, want := range r.sums {
			select {
			case <-r.stop:
				return
			default:
			}
			began := time.Now()
			got, err := sumOf(filepath.Join(one.root, path))
			if err != nil || got != want {
				r.mu.Lock()
				r.bad = append(r.bad, fmt.Sprintf("%s of %s: %s instead of %s, %v", path, one.id, got, want, err))
				r.mu.Unlock()
			}
			one.reads.Add(1)
			took := time.Since(began).Nanoseconds()
			if time.Duration(took) > slowest {
				r.mu.Lock()
				r.slow = append(r.slow, slowRead{began, time.Duration(took)})
				r.mu.Unlock()
			}
			for old := r.longest.Load(); took > old && !r.longest.CompareAndSwap(old, took); old = r.longest.Load() {
			}
		}
	}
}

func sumOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := md5.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// rounds is how often the container went through all files.
func (one *reader) rounds() int {
	text, _ := os.ReadFile(checkFile(one.root, "rounds")) // there is none in the first round
	n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return n
}

// reads is how many files were read outside, and rounds how often the containers went through all.
func (r *readers) reads() (n int64) {
	for _, one := range r.all {
		n += one.reads.Load()
	}
	return n
}

func (r *readers) rounds() (n int) {
	for _, one := range r.all {
		n += one.rounds()
	}
	return n
}

// requireEach waits until each reader has done enough, each by itself, and names those that have not.
func (r *readers) requireEach(what string, limit time.Duration, enough func(i int) bool) {
	r.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		var stalled []string
		for i, one := range r.all {
			if !enough(i) {
				stalled = append(stalled, fmt.Sprintf("%s (%d files outside, %d rounds inside)", one.id, one.reads.Load(), one.rounds()))
			}
		}
		if len(stalled) == 0 {
			return
		}
		if time.Now().After(deadline) {
			r.Fatalf("%s: not in %v: %s; what waits in the kernel:\n%s", what, limit, strings.Join(stalled, ", "), r.blocked())
		}
	}
}

// requireAllRead has each reader outside read more files.
func (r *readers) requireAllRead(after string, more int64) {
	r.Helper()
	var before []int64
	for _, one := range r.all {
		before = append(before, one.reads.Load())
	}
	r.requireEach("reads go on after: "+after, 2*time.Minute, func(i int) bool { return r.all[i].reads.Load() >= before[i]+more })
}

// requireGoOn has each reader read everything once more, outside and inside.
func (r *readers) requireGoOn() {
	r.Helper()
	dropCaches(r.T)
	var before []int64
	var rounds []int
	for _, one := range r.all {
		before, rounds = append(before, one.reads.Load()), append(rounds, one.rounds())
	}
	r.requireEach("all is read once more", 3*time.Minute, func(i int) bool {
		return r.all[i].reads.Load() > before[i]+int64(len(r.sums)) && r.all[i].rounds() > rounds[i]+1
	})
}

// requireNothingBad says that nobody outside read anything wrong, or failed, so far.
func (r *readers) requireNothingBad() {
	r.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	require.Empty(r, r.bad)
}

var inFileSystem = regexp.MustCompile(`fuse_|erofs_|ovl_|folio_`)

// blocked says where in the kernel threads of this process and of the lab's wait for a file system.
func (w *world) blocked() string {
	var all strings.Builder
	for _, pid := range append(w.processes(""), os.Getpid()) {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		for _, thread := range threads {
			name, _ := os.ReadFile(thread + "/comm")
			if stack, err := os.ReadFile(thread + "/stack"); err == nil && inFileSystem.Match(stack) {
				fmt.Fprintf(&all, "%s %s%s", thread, name, stack)
			}
		}
	}
	return all.String()
}

// end stops the readers: none read anything wrong, and no container ended.
func (r *readers) end() {
	r.Helper()
	r.halt()
	r.soon("readers end", r.running.Wait)
	r.requireNothingBad()
	for _, one := range r.all {
		_, err := os.Stat(checkFile(one.root, "sums"))
		require.NoError(r, err, "%s ended by itself", one.id)
		failed, err := os.ReadFile(checkFile(one.root, "failed"))
		require.ErrorIs(r, err, os.ErrNotExist, "in %s:\n%s", one.id, failed)
	}
	r.Logf("%d files read outside, longest %v, %d rounds inside", r.reads(), time.Duration(r.longest.Load()).Round(time.Millisecond), r.rounds())
	for _, one := range r.all {
		require.NoError(r, r.worker.RemoveContainer(r.ctx, one.id))
	}
}

// dropCaches makes the kernel ask again.
func dropCaches(t *testing.T) {
	t.Helper()
	dropped := make(chan error, 1)
	go func() { dropped <- os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0o200) }()
	select {
	case err := <-dropped:
		require.NoError(t, err)
	case <-time.After(time.Minute):
		t.Fatalf("the kernel drops no caches, for a minute:\n%s", harness.KernelStacks(os.Getpid()))
	}
}

// slow has blobs come after a while.
func slow(w http.ResponseWriter, r *http.Request, next http.Handler) {
	time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
	next.ServeHTTP(w, r)
}

// keepers are the keeper processes of the lab.
func (w *world) keepers() []int { return w.processes("containerd-clip-grpc keeper)") }

// keeper waits until there is one keeper, and no other.
func (w *world) keeper() (pid int) {
	w.Helper()
	w.eventually("there is one keeper", func() bool {
		pids := w.keepers()
		if len(pids) == 1 {
			pid = pids[0]
		}
		return len(pids) == 1
	})
	return pid
}

// processes are those of the lab whose command line, which ends in a parenthesis, has a text.
func (w *world) processes(text string) (pids []int) {
	for _, left := range harness.Leftovers(w.lab.Dir) {
		var pid int
		if strings.HasPrefix(left, "process ") && strings.Contains(left, text) {
			_, err := fmt.Sscanf(left, "process %d", &pid)
			require.NoError(w, err)
			pids = append(pids, pid)
		}
	}
	return pids
}

// requireSecluded says that nothing takes a keeper along, and that it takes little itself.
func (w *world) requireSecluded(keeper int) {
	w.Helper()
	session, err := unix.Getsid(keeper)
	require.NoError(w, err)
	require.Equal(w, keeper, session, "it has a session of its own")
	score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", keeper))
	require.NoError(w, err)
	lowest, err := exec.CommandContext(w.ctx, "sh", "-c", "echo -1000 >/proc/self/oom_score_adj; cat /proc/self/oom_score_adj").Output()
	require.NoError(w, err)
	require.Equal(w, string(lowest), string(score), "-1000, where root may say so")
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", keeper))
	require.NoError(w, err)
	var own int
	_, after, _ := strings.Cut(string(status), "RssAnon:")
	_, err = fmt.Sscanf(after, "%d kB", &own)
	require.NoError(w, err)
	w.Logf("the keeper has %d KiB of its own", own)
	require.Less(w, own, 16<<10)
}

// requireCleanEnd removes the image and stops the daemon.
func (w *world) requireCleanEnd(ref string) {
	w.Helper()
	w.foundAgain(w.worker)
	w.removeImage(w.worker, ref)
	w.eventually("roots are removed", func() bool { return len(harness.MountsUnder(w.daemon.Root)) == 0 })
	require.NoError(w, w.daemon.Stop())
	w.eventually("the keeper ends", func() bool { return len(w.keepers()) == 0 })
	require.Empty(w, harness.MountsUnder(w.daemon.Root))
}

const kills = 25

// TestKills kills the daemon at random moments while containers read a lazy root, cold at first, through a slow
// registry: they wait, and go on.
func TestKills(t *testing.T) {
	for name, config := range map[string]string{
		"file": "[mount]\nmode = 'file'\n",
		"loop": "[mount]\nmode = 'loop'\n",
		"fuse": "[mount]\nmode = 'fuse'\n",
		// What was fetched is soon given up again: reads stay cold.
		"small cache": "[cache]\nmax_size = '6MiB'\n",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorldWith(t, config+"[fill]\nmode = 'off'\n[registry]\nconfig_path = []\n")
			r := newReaders(w)
			w.registry.Misbehave(onBlobs(-1, slow))
			w.pull(w.worker, lazy, r.ref)
			w.registry.Reset()
			r.start(3)
			for range kills {
				if rand.IntN(2) == 0 {
					dropCaches(t)
				}
				time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
				w.daemon.Kill()
				time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
				require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
			}
			w.keeper()
			r.requireGoOn()
			t.Logf("%d requests to the registry", len(w.registry.Requests()))
			r.end()
			w.requireCleanEnd(r.ref)
		})
	}
}

// replaceable is a program of the lab's own for the daemon, and what replaces it by another version.
func (w *world) replaceable() (program string, install func(version string)) {
	w.Helper()
	product, err := w.lab.Look("containerd-clip-grpc")
	require.NoError(w, err)
	content, err := os.ReadFile(product)
	require.NoError(w, err)
	program = w.lab.Path("containerd-clip-grpc")
	install = func(version string) {
		w.Helper()
		writeProgram(w, program+".new", append(slices.Clone(content), version...))
		require.NoError(w, os.Rename(program+".new", program))
	}
	install("0")
	return program, install
}

// requireRuns says that a process runs a program as it is now.
func (w *world) requireRuns(pid int, program string) {
	w.Helper()
	want, err := os.Stat(program)
	require.NoError(w, err)
	got, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	require.NoError(w, err)
	require.True(w, os.SameFile(want, got), "process %d runs another program", pid)
}

// longestPause is what may pass while the daemon is restarted or replaced, and how often that is tried: what else the
// machine does takes time, too.
const (
	longestPause = 2 * time.Second
	pauseTries   = 3
)

// requireShortPause does something below readers, which get no error and wait less than longestPause, the best of
// pauseTries.
func (r *readers) requireShortPause(what string, do func()) {
	r.Helper()
	best := time.Duration(math.MaxInt64)
	for try := 0; try < pauseTries && best >= longestPause; try++ {
		r.longest.Store(0)
		dropCaches(r.T)
		do()
		r.requireAllRead(what, 2) // what they were reading, and more
		r.requireNothingBad()
		best = min(best, time.Duration(r.longest.Load()))
	}
	r.Logf("%s: longest pause of a read %v", what, best.Round(time.Millisecond))
	require.Less(r, best, longestPause, what)
}

// TestUpgrade replaces the daemon's program below 20 busy containers, and stops and starts it.
func TestUpgrade(t *testing.T) {
	w := newWorld(t)
	program, install := w.replaceable()
	w.daemon.Program = program
	var away time.Duration
	restart := func() {
		began := time.Now()
		require.NoError(t, w.daemon.Stop())
		require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
		away = max(away, time.Since(began))
		w.requireRuns(w.daemon.Pid(), program)
	}
	restart()
	r := newReaders(w)
	w.pull(w.worker, lazy, r.ref)
	r.start(20)
	keeper := w.keeper()
	away = 0
	for version := range 5 {
		r.requireShortPause(fmt.Sprint("version ", version), func() {
			install(fmt.Sprint(version))
			restart()
		})
	}
	require.Equal(t, keeper, w.keeper(), "it is still that of the first version")
	r.requireGoOn()
	t.Logf("from the daemon's stop to its being ready again at most %v", away.Round(time.Millisecond))
	r.end()
	w.requireCleanEnd(r.ref)
}

// TestStopped has a reader wait for a daemon that was stopped in an orderly way, and a container start meanwhile.
func TestStopped(t *testing.T) {
	w := newWorld(t)
	r := newReaders(w)
	w.pull(w.worker, lazy, r.ref)
	r.start(1)
	require.NoError(t, w.daemon.Stop())
	require.NotEmpty(t, harness.MountsUnder(w.daemon.Root), "the container's root")
	dropCaches(t)
	before := r.reads()
	w.eventually("the reader waits", func() bool {
		was := r.reads()
		time.Sleep(300 * time.Millisecond)
		return r.reads() == was
	})
	require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
	r.requireGoOn()
	require.Greater(t, r.reads(), before)
	w.runAfterRestart(r.ref)
	r.end()
	w.requireCleanEnd(r.ref)
}

// TestKeeperKilled kills the keeper: beside a daemon it is replaced, and without one what it held ends. Readers then get
// errors and do not hang, and the next daemon cleans up. Then nothing is left but what is on disk.
func TestKeeperKilled(t *testing.T) {
	for _, mode := range []string{"file", "loop", "fuse"} {
		t.Run(mode, func(t *testing.T) {
			w := newWorldWith(t, "[mount]\nmode = '"+mode+"'\n[fill]\nmode = 'off'\n")
			r := newReaders(w)
			w.pull(w.worker, lazy, r.ref)
			r.start(1)
			killKeeper := func() int {
				pid := w.keeper()
				require.NoError(t, unix.Kill(pid, unix.SIGKILL))
				return pid
			}
			w.requireSecluded(w.keeper())
			old := killKeeper()
			w.eventually("another keeper", func() bool { pids := w.keepers(); return len(pids) == 1 && pids[0] != old })
			w.eventually("it has all", func() bool { return strings.Contains(w.daemon.Log(), "has everything") })
			w.daemon.Kill()
			require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
			r.requireGoOn()
			r.end()

			w.foundAgain(w.worker)
			require.NoError(t, w.worker.StartContainer(w.ctx, lazy, r.ref, "doomed", "sleep", "1000"))
			root := fmt.Sprintf("/proc/%d/root", r.pid("doomed"))
			w.daemon.Kill()
			killKeeper()
			dropCaches(t)
			var err error
			w.soon("a read without keeper and daemon", func() { _, err = sumOf(filepath.Join(root, noise)) })
			require.Error(t, err)
			require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
			w.foundAgain(w.worker)
			require.NoError(t, w.worker.RemoveContainer(w.ctx, "doomed"))
			w.runAfterRestart(r.ref)
			w.requireSurvivesReboot(r.ref)
			w.requireCleanEnd(r.ref)
		})
	}
}
