package e2e

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// soakTime is set by `make soak`.
var soakTime = flag.Duration("soak", 2*time.Minute, "how long TestSoak goes on at least")

// soakConfigs are what a daemon may be started with. A change of mode is for the roots that are mounted next.
var soakConfigs = []string{
	"[cache]\nmax_size = '6MiB'\n[fill]\nmode = 'off'\n", // reads stay cold
	"[cache]\nmax_size = '1GiB'\n[fill]\nmode = 'off'\n",
	"[cache]\nmax_size = '1GiB'\n[fill]\ndelay = '0s'\n", // layers become devices
	"[mount]\nmode = 'loop'\n[cache]\nmax_size = '6MiB'\n[fill]\ndelay = '0s'\n",
	"[mount]\nmode = 'fuse'\n[cache]\nmax_size = '1GiB'\n[fill]\ndelay = '1s'\n",
}

// soak is a world in which things break at random.
type soak struct {
	*readers
	disk    string // file system that all of the daemon's files are on
	install func(version string)
	version int
	deck    []string // kinds of disturbances that are still to come before any comes again
	happens []happening
	kills   int // of the daemon

	churnMu          sync.Mutex     // guards the fields below
	churned, refused int            // commands of containers that come and go
	whole            map[string]int // pulls, runs and removals in a row that were not refused, by namespace
}

// happening is something that was done to the world.
type happening struct {
	what       string
	began, end time.Time
}

// TestSoak has containers read while everything around them fails, in each way at least once: none reads anything wrong,
// none gets an error, and when all is over nothing is left. `make soak SOAK=1h` does it for longer.
func TestSoak(t *testing.T) {
	s := newSoak(t)
	idle, _ := s.goroutines()
	require.NoError(t, s.lab.RestartDaemon(s.ctx, s.daemon))
	s.foundAgain(s.worker)
	before := s.openFiles()

	s.pull(s.worker, lazy, s.ref)
	s.readers.start(3)
	stop, churn := make(chan struct{}), sync.WaitGroup{}
	churn.Go(func() { s.churn(stop) })
	s.deck = s.shuffled()
	end := time.Now().Add(*soakTime)
	for len(s.deck) > 0 || time.Now().Before(end) || s.fewestWhole() < wholeRounds && time.Now().Before(end.Add(4*time.Minute)) {
		s.disturb()
		time.Sleep(rand.N(2 * time.Second)) // containerd dials again only after a while
	}
	close(stop)
	s.soon("the last command ends", churn.Wait)
	s.requireGoOn()
	s.report()
	require.GreaterOrEqual(t, s.fewestWhole(), wholeRounds, "images were not pulled, run and removed in both namespaces: %v", s.whole)
	s.end()
	s.requireNothingLeft(before, idle)
	s.requireCleanEnd(s.ref)
}

// TestManyContainers has many containers of one image while the daemon is killed.
func TestManyContainers(t *testing.T) {
	const many = 200
	w := worldIn(t, harness.ForTestWithin(t, 2*harness.Limit), fillLate)
	w.addSmall()
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	w.pull(w.worker, lazy, ref)
	want := w.run(w.worker, lazy, ref, "md5sum", "/"+noise)
	files := w.openFiles()
	r := &readers{world: w}
	var roots []string
	for i := range many {
		id := fmt.Sprint("one-of-many-", i)
		require.NoError(t, w.worker.StartContainer(w.ctx, lazy, ref, id, "sleep", "10000"))
		roots = append(roots, fmt.Sprintf("/proc/%d/root", r.pid(id)))
	}
	require.Len(t, slices.DeleteFunc(harness.MountsUnder(w.daemon.Root), func(m string) bool { return !strings.Contains(m, "/roots/") }), 1,
		"they share a root")
	require.LessOrEqual(t, w.openFiles(), files+8)
	w.daemon.Kill()
	dropCaches(t)
	time.AfterFunc(300*time.Millisecond, func() { _ = w.lab.RestartDaemon(w.ctx, w.daemon) })
	var waiting sync.WaitGroup
	sums := make([]string, many)
	for i, root := range roots {
		waiting.Go(func() { sums[i], _ = sumOf(filepath.Join(root, noise)) })
	}
	w.soon("readers of all containers", waiting.Wait)
	for i, sum := range sums {
		require.Equal(t, strings.Fields(want)[0], sum, "container %d", i)
	}
	w.foundAgain(w.worker)
	require.Len(t, w.snapshots(w.ctx, w.worker, lazy), many+len(w.layers(images.SmallName)), "one each, and the image's")
	for i := range many {
		require.NoError(t, w.worker.RemoveContainer(w.ctx, fmt.Sprint("one-of-many-", i)))
	}
	w.requireCleanEnd(ref)
}

func newSoak(t *testing.T) *soak {
	t.Helper()
	lab := harness.ForTestWithin(t, harness.Limit+*soakTime)
	s := &soak{disk: lab.Path("daemon"), whole: map[string]int{}}
	mountSmallDisk(t, lab, s.disk)
	w := worldIn(t, lab, soakConfigs[0]+soakAlways)
	w.addSmall()
	w.index(images.SiblingName)
	s.readers = newReaders(w)
	w.daemon.Program, s.install = w.replaceable()
	require.NoError(t, w.daemon.Stop())
	require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
	return s
}

const soakAlways = "[registry]\nconfig_path = []\n"

// mountSmallDisk mounts a file system of 256 MiB until the lab ends.
func mountSmallDisk(t *testing.T, lab *harness.Lab, dir string) {
	t.Helper()
	image := lab.Path("disk.img")
	require.NoError(t, os.MkdirAll(dir, 0o700))
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 256<<20))
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-m", "0", image}, {"mount", "-o", "loop", image, dir}} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		require.NoError(t, err, "%s: %s", args, out)
	}
}

// disturbances are what can be done to the world.
func (s *soak) disturbances() map[string]func() {
	return map[string]func(){
		"kill -9":              func() { s.killed(300 * time.Millisecond) },
		"kill -9 at once":      func() { s.killed(0) },
		"killed three times":   func() { s.killed(0); s.killed(0); s.killed(0) },
		"stopped, continued":   s.stopped,
		"restarted":            s.restarted,
		"upgraded":             func() { s.version++; s.install(fmt.Sprint(s.version)); s.restarted() },
		"keeper killed":        s.keeperKilled,
		"containerd killed":    s.containerdKilled,
		"registry cut":         func() { s.cutOff(func() { dropCaches(s.T) }) },
		"registry cut, kill":   func() { s.cutOff(func() { s.killed(0) }) },
		"disk full":            func() { s.full(func() { dropCaches(s.T) }) },
		"disk full, kill":      func() { s.full(func() { s.killed(0) }) },
		"caches dropped":       func() { dropCaches(s.T) },
		"stopped, then killed": func() { s.signal(unix.SIGSTOP); s.killed(0) },
	}
}

// shuffled returns all kinds of disturbances in random order.
func (s *soak) shuffled() []string {
	all := slices.Sorted(maps.Keys(s.disturbances()))
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// disturb does the next thing to the world, after which reads go on.
func (s *soak) disturb() {
	if len(s.deck) == 0 {
		s.deck = s.shuffled()
	}
	what := s.deck[0]
	s.deck = s.deck[1:]
	dropCaches(s.T) // what is read meanwhile, the daemon is asked for
	began := time.Now()
	s.disturbances()[what]()
	s.happens = append(s.happens, happening{what, began, time.Now()})
	s.requireAllRead(what, 1)
}

func (s *soak) signal(signal unix.Signal) { require.NoError(s, unix.Kill(s.daemon.Pid(), signal)) }

func (s *soak) killed(away time.Duration) {
	s.daemon.Kill()
	s.kills++
	if away > 0 {
		time.Sleep(rand.N(away))
	}
	s.configure()
	require.NoError(s, s.lab.RestartDaemon(s.ctx, s.daemon))
}

func (s *soak) restarted() {
	require.NoError(s, s.daemon.Stop())
	s.configure()
	require.NoError(s, s.lab.RestartDaemon(s.ctx, s.daemon))
}

func (s *soak) configure() {
	// In place: there may be no room for another.
	text := soakConfigs[rand.IntN(len(soakConfigs))] + soakAlways
	f, err := os.OpenFile(s.daemon.Config, os.O_WRONLY, 0)
	require.NoError(s, err)
	defer f.Close()
	_, err = f.WriteAt([]byte(text), 0)
	require.NoError(s, err)
	require.NoError(s, f.Truncate(int64(len(text))))
}

func (s *soak) stopped() {
	s.signal(unix.SIGSTOP)
	// The kernel waits for mounts under way, and a mount for the daemon.
	continued := make(chan error, 1)
	time.AfterFunc(rand.N(600*time.Millisecond), func() { continued <- unix.Kill(s.daemon.Pid(), unix.SIGCONT) })
	dropCaches(s.T)
	require.NoError(s, <-continued)
}

func (s *soak) keeperKilled() {
	old, earlier := s.keeper(), len(s.daemon.Log())
	require.NoError(s, unix.Kill(old, unix.SIGKILL))
	s.eventually("another keeper has everything", func() bool {
		now := s.keepers()
		return len(now) == 1 && now[0] != old && strings.Contains(s.daemon.Log()[earlier:], "the new keeper has everything")
	})
}

func (s *soak) containerdKilled() {
	s.worker.Kill()
	require.NoError(s, s.lab.RestartContainerd(s.ctx, s.worker))
}

// cutOff does something while the registry cannot be reached, for less than reads wait.
func (s *soak) cutOff(meanwhile func()) {
	require.NoError(s, s.registry.SwitchOff())
	meanwhile()
	time.Sleep(rand.N(3 * time.Second))
	require.NoError(s, s.registry.SwitchOn())
}

// full does something while the daemon's disk is full.
func (s *soak) full(meanwhile func()) {
	file := filepath.Join(s.disk, "filler")
	f, err := os.Create(file)
	require.NoError(s, err)
	for size := int64(64 << 20); size >= 4096; {
		st, err := f.Stat()
		require.NoError(s, err)
		if err := unix.Fallocate(int(f.Fd()), 0, st.Size(), size); err != nil {
			require.ErrorIs(s, err, unix.ENOSPC)
			size /= 2
		}
	}
	meanwhile()
	time.Sleep(rand.N(2 * time.Second))
	require.NoError(s, f.Close())
	require.NoError(s, os.Remove(file))
}

// churnSpaces are the namespaces in which images come and go, in each of them at least wholeRounds times all the way.
var churnSpaces = []string{harness.Namespace, "other"}

const wholeRounds = 3

// fewestWhole is how many whole rounds there were in the namespace that had the fewest.
func (s *soak) fewestWhole() int {
	s.churnMu.Lock()
	defer s.churnMu.Unlock()
	return min(s.whole[churnSpaces[0]], s.whole[churnSpaces[1]])
}

// churn has images and containers come and go in two namespaces. Commands may be refused while the daemon or containerd
// is away; those that are not do what they should.
func (s *soak) churn(stop chan struct{}) {
	names := slices.DeleteFunc(slices.Sorted(maps.Keys(s.sums)), func(name string) bool {
		return strings.HasPrefix(name, "/app/") // the sibling has another top
	})
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		ns := churnSpaces[i%len(churnSpaces)]
		ctx := namespaces.WithNamespace(s.ctx, ns)
		ref := s.world.ref([]string{images.SmallName, images.SiblingName}[rand.IntN(2)])
		pulled := s.ended(s.churnCtr(ctx, "image", "pull", "--snapshotter", lazy, ref))
		ran := s.ended(s.runOnce(ctx, ref, fmt.Sprint("churn", i), names[rand.IntN(len(names))]))
		if rand.IntN(2) == 0 {
			continue
		}
		removed := s.ended(s.churnCtr(ctx, "image", "rm", "--sync", ref)) // the readers run on it
		if pulled && ran && removed {
			s.churnMu.Lock()
			s.whole[ns]++
			s.churnMu.Unlock()
		}
	}
}

func (s *soak) churnCtr(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	_, err := s.worker.Ctr(ctx, args...)
	return err
}

// ended counts a command, and says whether it was not refused.
func (s *soak) ended(err error) bool {
	s.churnMu.Lock()
	defer s.churnMu.Unlock()
	s.churned++
	if err != nil {
		s.refused++
	}
	return err == nil
}

// runOnce has a new container compare a file. It says so by its exit code: what it prints, ctr may lose on a busy
// machine, since it closes the pipe when the container has ended.
func (s *soak) runOnce(ctx context.Context, ref, id, name string) error {
	script := `sum=$(md5sum "$0") && [ "${sum%% *}" = "$1" ] || exit 99`
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	result, err := s.worker.RunContainer(ctx, lazy, ref, id, "sh", "-c", script, name, s.sums[name])
	if result.Code > 1 { // with 1 ctr says that there was no container
		s.mu.Lock()
		s.bad = append(s.bad, fmt.Sprintf("%s in a new container: code %d: %s", name, result.Code, result.Output()))
		s.mu.Unlock()
	}
	return err
}

// report prints what happened, and how long reads took meanwhile.
func (s *soak) report() {
	s.mu.Lock()
	defer s.mu.Unlock()
	times, pauses := map[string]int{}, map[string]time.Duration{}
	for _, h := range s.happens {
		times[h.what]++
		for _, r := range s.slow {
			if r.began.Before(h.end) && h.began.Before(r.began.Add(r.took)) {
				pauses[h.what] = max(pauses[h.what], r.took)
			}
		}
	}
	for _, what := range slices.Sorted(maps.Keys(times)) {
		s.Logf("%-21s %4d times, longest read %v", what, times[what], pauses[what].Round(time.Millisecond))
	}
	s.Logf("%d disturbances, %d kills of the daemon survived, %d files read outside and %d inside, %d wrong or failed, longest pause %v; %d commands of other containers, %d refused, whole rounds %v",
		len(s.happens), s.kills, s.reads(), s.rounds()*len(s.sums), len(s.bad), time.Duration(s.longest.Load()).Round(time.Millisecond), s.churned, s.refused, s.whole)
}

// requireNothingLeft removes all containers and images: the running daemon has nothing of them any more.
func (s *soak) requireNothingLeft(files, idle int) {
	s.Helper()
	s.foundAgain(s.worker)
	require.NoError(s, s.worker.RemoveContainers(s.ctx))
	for _, ns := range churnSpaces {
		ctx := namespaces.WithNamespace(s.ctx, ns)
		s.removeLeases(ctx)
		for _, name := range []string{images.SmallName, images.SiblingName} {
			_, _ = s.worker.Ctr(ctx, "image", "rm", "--sync", s.world.ref(name)) // it may be gone
		}
		// Removing something is what has containerd collect.
		s.eventually("no snapshots in "+ns, func() bool { return len(s.snapshots(ctx, s.worker, lazy)) == 0 })
	}
	for _, dir := range []string{"roots", "snapshots", "layers"} {
		s.eventually(dir+" is empty", func() bool {
			left, err := os.ReadDir(filepath.Join(s.daemon.Root, dir))
			return err == nil && len(left) == 0
		})
	}
	require.Empty(s, harness.MountsUnder(filepath.Join(s.daemon.Root, "roots")))
	s.eventually(fmt.Sprintf("no more than %d files are open, and a few connections", files), func() bool { return s.openFiles() <= files+8 })
	s.Logf("%d files open at first, %d at the end", files, s.openFiles())
	end, by := s.goroutines()
	s.Logf("%d goroutines at first, %d at the end", idle, end)
	require.LessOrEqual(s, end, idle+8, "by what started them: %v", by)
	require.NoError(s, s.lab.RestartDaemon(s.ctx, s.daemon))
}

// removeLeases removes what pulls left that were killed; they would hold snapshots for a day.
func (s *soak) removeLeases(ctx context.Context) {
	service := s.worker.Client().LeasesService()
	all, err := service.List(ctx)
	require.NoError(s, err)
	for _, l := range all {
		require.NoError(s, service.Delete(ctx, l, leases.SynchronousDelete))
	}
}

var goroutine = regexp.MustCompile(`(?m)^(?:created by (\S+)|goroutine \d+ .*)`)

// goroutines ends the daemon with a list of its goroutines and counts them by what started them.
func (s *soak) goroutines() (n int, by map[string]int) {
	s.Helper()
	earlier := len(s.daemon.Log()) // of all processes before
	s.signal(syscall.SIGQUIT)
	s.eventually("the daemon ends", func() bool { return !s.daemon.Running() })
	by = map[string]int{}
	for _, m := range goroutine.FindAllStringSubmatch(s.daemon.Log()[earlier:], -1) {
		if m[1] == "" {
			n++
		} else {
			by[m[1]]++
		}
	}
	require.Positive(s, n)
	return n, by
}
