package e2e

import (
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
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
	roots   []string          // of the running containers
	reads   atomic.Int64
	longest atomic.Int64 // nanoseconds
	stop    chan struct{}
	halt    func() // closes stop
	running sync.WaitGroup

	mu   sync.Mutex // guards bad and slow
	bad  []string
	slow []slowRead
	next int
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
		id := fmt.Sprint("reader", r.next)
		r.next++
		require.NoError(r, r.worker.StartContainer(r.ctx, lazy, r.ref, id, "sh", "-c", checkScript))
		root := fmt.Sprintf("/proc/%d/root", r.pid(id))
		require.NoError(r, os.WriteFile(checkFile(root, "sums.new"), []byte(list.String()), 0o600))
		require.NoError(r, os.Rename(checkFile(root, "sums.new"), checkFile(root, "sums")))
		r.roots = append(r.roots, root)
		r.running.Go(func() { r.readOutside(root) })
	}
}

// readOutside reads whole files, in the order of a map.
func (r *readers) readOutside(root string) {
	for {
		for path, want := range r.sums {
			select {
			case <-r.stop:
				return
			default:
			}
			began := time.Now()
			got, err := sumOf(filepath.Join(root, path))
			if err != nil || got != want {
				r.mu.Lock()
				r.bad = append(r.bad, fmt.Sprintf("%s: %s instead of %s, %v", path, got, want, err))
				r.mu.Unlock()
			}
			r.reads.Add(1)
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

// rounds is how often the containers went through all files.
func (r *readers) rounds() (total int) {
	for _, root := range r.roots {
		text, err := os.ReadFile(checkFile(root, "rounds"))
		if err == nil {
			n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
			total += n
		}
	}
	return total
}

// requireGoOn has all readers read everything once more.
func (r *readers) requireGoOn() {
	r.Helper()
	dropCaches(r.T)
	before, inside := r.reads.Load(), r.rounds()
	if !assert.Eventually(r, func() bool {
		return r.reads.Load() > before+int64(len(r.sums)*len(r.roots)) && r.rounds() > inside+len(r.roots)
	}, 3*time.Minute, 100*time.Millisecond) {
		r.Fatalf("%d files read outside, %d rounds inside; what waits in the kernel:\n%s", r.reads.Load()-before, r.rounds()-inside, r.blocked())
	}
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
	require.Empty(r, r.bad)
	for _, root := range r.roots {
		_, err := os.Stat(checkFile(root, "sums"))
		require.NoError(r, err, "a container ended by itself")
		failed, err := os.ReadFile(checkFile(root, "failed"))
		require.ErrorIs(r, err, os.ErrNotExist, "in a container:\n%s", failed)
	}
	r.Logf("%d files read outside, longest %v, %d rounds inside", r.reads.Load(), time.Duration(r.longest.Load()).Round(time.Millisecond), r.rounds())
	for i := range r.roots {
		require.NoError(r, r.worker.RemoveContainer(r.ctx, fmt.Sprint("reader", i)))
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
			require.Len(t, w.keepers(), 1)
			r.requireGoOn()
			t.Logf("%d requests to the registry", len(w.registry.Requests()))
			r.end()
			w.requireCleanEnd(r.ref)
		})
	}
}

// installer has the daemon started from a program of its own, and returns what replaces that by another version.
func (w *world) installer() func(version string) {
	w.Helper()
	options, err := harness.Installed()
	require.NoError(w, err)
	program, err := os.ReadFile(filepath.Join(options.Product, w.daemon.Program))
	require.NoError(w, err)
	w.daemon.Program = w.lab.Path("containerd-clip-grpc")
	return func(version string) {
		file := w.daemon.Program + ".new"
		require.NoError(w, os.WriteFile(file, append(program, version...), 0o700))
		require.NoError(w, os.Rename(file, w.daemon.Program))
	}
}

// TestUpgrade replaces the daemon's program below 20 busy containers, and stops and starts it.
func TestUpgrade(t *testing.T) {
	w := newWorld(t)
	install := w.installer()
	var away time.Duration
	restart := func() {
		began := time.Now()
		require.NoError(t, w.daemon.Stop())
		require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
		away = max(away, time.Since(began))
	}
	install("1")
	restart()
	r := newReaders(w)
	w.pull(w.worker, lazy, r.ref)
	r.start(20)
	keepers := w.keepers()
	away = 0
	r.longest.Store(0)
	for version := range 5 {
		install(fmt.Sprint(version))
		dropCaches(t)
		restart()
	}
	require.Equal(t, keepers, w.keepers(), "it is still that of the first version")
	r.requireGoOn()
	longest := time.Duration(r.longest.Load())
	t.Logf("longest pause of a read %v; from the daemon's stop to its being ready again at most %v", longest.Round(time.Millisecond), away.Round(time.Millisecond))
	// The aim is two seconds, on a machine that does nothing else.
	require.Less(t, longest, 10*time.Second)
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
	before := r.reads.Load()
	w.eventually("the reader waits", func() bool {
		was := r.reads.Load()
		time.Sleep(300 * time.Millisecond)
		return r.reads.Load() == was
	})
	require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
	r.requireGoOn()
	require.Greater(t, r.reads.Load(), before)
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
				pids := w.keepers()
				require.Len(t, pids, 1)
				require.NoError(t, unix.Kill(pids[0], unix.SIGKILL))
				return pids[0]
			}
			w.requireSecluded(w.keepers()[0])
			old := killKeeper()
			w.eventually("another keeper", func() bool { pids := w.keepers(); return len(pids) == 1 && pids[0] != old })
			w.eventually("it has all", func() bool { return strings.Contains(w.daemon.Log(), "has everything") })
			w.daemon.Kill()
			require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
			r.requireGoOn()
			r.end()

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
