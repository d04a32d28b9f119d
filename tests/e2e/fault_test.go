package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// faultConfig gives up sooner than usual, so that errors can be waited for, and late enough for a slow machine: a request
// has a quarter of that to be answered. The kernel asks again for a page whose read-ahead failed, so a process waits twice.
const (
	faultConfig = fillLate + "[registry]\nconfig_path = ['LAB/certs.d']\ngive_up = '15s'\n"
	giveUp      = 15 * time.Second
	within      = 3 * giveUp

	// hurry is how long a read may take that follows one which gave up: a fifth of a host's silence.
	hurry = giveUp / 4 / 5
)

// noise is a file that needs several requests' worth of bytes, of which nothing is known before it is read.
const noise = "sizes/noise-3M+1"

// faultWorld is a world in which an image can be made cold again and again.
type faultWorld struct {
	*world
	ref  string
	want string // MD5 of noise
}

// newFaultWorld may take twice as long as others: every fault has a daemon of its own, and many wait for giveUp.
func newFaultWorld(t *testing.T) *faultWorld {
	w := &faultWorld{world: worldIn(t, harness.ForTestWithin(t, 2*harness.Limit), faultConfig)}
	w.addSmall()
	w.ref = w.world.ref(images.SmallName)
	w.index(images.SmallName)
	w.pull(w.worker, lazy, w.ref)
	w.want = strings.Fields(w.run(w.worker, lazy, w.ref, "md5sum", "/"+noise))[0]
	return w
}

// cold returns the world for a subtest, with the image pulled and nothing of its layers here.
func (w *faultWorld) cold(t *testing.T) (*faultWorld, string) {
	t.Helper()
	sub, inner := *w, *w.world
	inner.T, inner.ctx, sub.world = t, t.Context(), &inner
	sub.registry.Misbehave(nil)
	sub.removeImage(sub.worker, sub.ref)
	sub.eventually("layers are removed", func() bool {
		layers, err := os.ReadDir(filepath.Join(sub.daemon.Root, "layers"))
		return err == nil && len(layers) == 0
	})
	// The kernel keeps what it read of a layer file as long as the file system is the same. A daemon that starts also
	// knows nothing of how hosts behaved before.
	require.NoError(t, sub.daemon.Stop())
	require.NoError(t, sub.lab.RestartDaemon(sub.ctx, sub.daemon))
	sub.foundAgain(sub.worker)
	sub.pull(sub.worker, lazy, sub.ref)
	return &sub, sub.view(sub.worker, lazy, sub.ref)
}

// sum has a process read noise below root: its MD5, or what the process says.
func (w *faultWorld) sum(root string) (string, error) {
	out, err := exec.CommandContext(w.ctx, "md5sum", filepath.Join(root, noise)).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return strings.Fields(string(out))[0], nil
}

// requireSum reads noise: it is right.
func (w *faultWorld) requireSum(root string) {
	w.Helper()
	sum, err := w.sum(root)
	require.NoError(w, err)
	require.Equal(w, w.want, sum)
}

// requireEIO reads noise: it is an input/output error, in time.
func (w *faultWorld) requireEIO(root string) {
	w.Helper()
	began := time.Now()
	_, err := w.sum(root)
	require.ErrorContains(w, err, "Input/output error")
	require.Less(w, time.Since(began), within)
}

// requireSumAgain reads noise once the registry is right again: the next read is right. On a machine on which that takes
// longer than hurry, it is the one after it.
func (w *faultWorld) requireSumAgain(root string) {
	w.Helper()
	w.againInTime(func() (string, time.Duration, error) {
		began := time.Now()
		sum, err := w.sum(root)
		return sum, time.Since(began), err
	})
}

// againInTime has a read repeated for as long as its time, and nothing else, is what it lacks.
func (w *faultWorld) againInTime(read func() (sum string, took time.Duration, err error)) {
	w.Helper()
	var sum string
	w.eventually("it reads again when the registry is right again", func() bool {
		var took time.Duration
		var err error
		if sum, took, err = read(); err != nil {
			require.GreaterOrEqual(w, took, hurry, "%v", err)
		}
		return err == nil
	})
	require.Equal(w, w.want, sum)
}

// onBlobs has a fault for reads of blobs alone, n times; -1 is always.
func onBlobs(n int, f harness.Fault) harness.Fault {
	var left atomic.Int64
	left.Store(int64(n))
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") && (n < 0 || left.Add(-1) >= 0) {
			f(w, r, next)
			return
		}
		next.ServeHTTP(w, r)
	}
}

func answer(code int, header ...string) harness.Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
	}
}

// spoil passes an answer on through a writer that spoils it.
func spoil(write func(w http.ResponseWriter, r *http.Request, sent int64, b []byte) (int, error)) harness.Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		next.ServeHTTP(&spoiler{ResponseWriter: w, r: r, write: write}, r)
	}
}

type spoiler struct {
	http.ResponseWriter
	r     *http.Request
	sent  int64
	write func(w http.ResponseWriter, r *http.Request, sent int64, b []byte) (int, error)
}

func (s *spoiler) Write(b []byte) (int, error) {
	n, err := s.write(s.ResponseWriter, s.r, s.sent, b)
	s.sent += int64(n)
	return n, err
}

func (s *spoiler) Unwrap() http.ResponseWriter { return s.ResponseWriter }

const cutAt = 300_000

var (
	cut = spoil(func(w http.ResponseWriter, _ *http.Request, sent int64, b []byte) (int, error) {
		n, err := w.Write(b[:min(int64(len(b)), cutAt-sent)])
		if err == nil && n < len(b) {
			panic(http.ErrAbortHandler)
		}
		return n, err
	})
	stall = spoil(func(w http.ResponseWriter, r *http.Request, sent int64, b []byte) (int, error) {
		n, err := w.Write(b[:min(int64(len(b)), cutAt-sent)])
		if err == nil && n < len(b) {
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			return n, r.Context().Err()
		}
		return n, err
	})
	alter = spoil(func(w http.ResponseWriter, _ *http.Request, sent int64, b []byte) (int, error) {
		b = bytes.Clone(b)
		for i := range b {
			if (sent+int64(i))%50_000 == 49_999 {
				b[i] ^= 0xff
			}
		}
		return w.Write(b)
	})
)

// truncate ends bodies early and properly.
func truncate(w http.ResponseWriter, r *http.Request, next http.Handler) {
	w.Header().Set("Connection", "close")
	next.ServeHTTP(&truncater{ResponseWriter: w}, r)
}

type truncater struct {
	http.ResponseWriter
	sent int64
}

func (s *truncater) WriteHeader(code int) {
	s.Header().Del("Content-Length")
	s.ResponseWriter.WriteHeader(code)
}

func (s *truncater) Write(b []byte) (int, error) {
	keep := b[:max(0, min(int64(len(b)), cutAt-s.sent))]
	s.sent += int64(len(b))
	if _, err := s.ResponseWriter.Write(keep); err != nil {
		return 0, err
	}
	return len(b), nil
}

// whole has the registry ignore ranges.
func whole(w http.ResponseWriter, r *http.Request, next http.Handler) {
	r.Header.Del("Range")
	next.ServeHTTP(w, r)
}

// wrongRange has the registry answer another range than it was asked for.
func wrongRange(w http.ResponseWriter, r *http.Request, next http.Handler) {
	r.Header.Set("Range", "bytes=5-1000")
	next.ServeHTTP(w, r)
}

func late(w http.ResponseWriter, r *http.Request, next http.Handler) {
	time.Sleep(300 * time.Millisecond)
	next.ServeHTTP(w, r)
}

func silent(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
	_, _ = io.Copy(io.Discard, r.Body)
	<-r.Context().Done()
}

func hangUp(http.ResponseWriter, *http.Request, http.Handler) { panic(http.ErrAbortHandler) }

// TestFaults has a registry that misbehaves below a lazy root: what a process reads is right, or an error in time, and
// right again when the registry is.
func TestFaults(t *testing.T) {
	t.Parallel()
	w := newFaultWorld(t)
	for _, c := range []struct {
		name  string
		fault harness.Fault
		fails bool
	}{
		{name: "latency", fault: onBlobs(-1, late)},
		{name: "resets", fault: onBlobs(-1, cut)},
		{name: "hangs up three times", fault: onBlobs(3, hangUp)},
		{name: "hangs up", fault: onBlobs(-1, hangUp), fails: true},
		{name: "stalls once", fault: onBlobs(1, stall)},
		{name: "says nothing once", fault: onBlobs(1, silent)},
		{name: "says nothing", fault: onBlobs(-1, silent), fails: true},
		{name: "truncates", fault: onBlobs(-1, truncate)},
		{name: "alters once", fault: onBlobs(1, alter)},
		{name: "alters", fault: onBlobs(-1, alter), fails: true},
		{name: "200 for 206", fault: onBlobs(-1, whole)},
		{name: "wrong range once", fault: onBlobs(1, wrongRange)},
		{name: "wrong range", fault: onBlobs(-1, wrongRange), fails: true},
		{name: "401", fault: onBlobs(-1, answer(401)), fails: true},
		{name: "403", fault: onBlobs(-1, answer(403)), fails: true},
		{name: "404", fault: onBlobs(-1, answer(404)), fails: true},
		{name: "416", fault: onBlobs(-1, answer(416)), fails: true},
		{name: "429 with a pause", fault: onBlobs(1, answer(429, "Retry-After", "1"))},
		{name: "429", fault: onBlobs(-1, answer(429)), fails: true},
		{name: "500 twice", fault: onBlobs(2, answer(500))},
		{name: "503 with a long pause", fault: onBlobs(1, answer(503, "Retry-After", "30")), fails: true},
		{name: "503", fault: onBlobs(-1, answer(503)), fails: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, root := w.cold(t)
			w.registry.Reset()
			before := w.openFiles()
			w.registry.Misbehave(c.fault)
			if c.fails {
				w.requireEIO(root)
			} else {
				w.requireSum(root)
			}
			require.NotEmpty(t, w.registry.Requests().Gets(w.layers(images.SmallName)...), "the fault was met")
			w.registry.Misbehave(nil)
			if c.name == "503 with a long pause" {
				return // it is still to be left alone
			}
			if c.fails {
				w.requireSumAgain(root)
			} else {
				w.requireSum(root)
			}
			w.eventually("a few connections are kept for the next read, and requests that nobody waits for end soon", func() bool {
				return w.openFiles() <= before+8
			})
		})
	}
}

// openFiles is how many the daemon has.
func (w *world) openFiles() int {
	w.Helper()
	fds, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(w.daemon.Pid()), "fd"))
	require.NoError(w, err)
	return len(fds)
}

// TestManyReaders has 64 readers of a span that is not here: it is fetched once.
func TestManyReaders(t *testing.T) {
	t.Parallel()
	warm := newFaultWorld(t)
	warm.setConfig(fillLate) // what is held here is not asked for again for ten seconds
	w, root := warm.cold(t)
	w.eventually("what every start reads is here", func() bool {
		before, _ := w.registry.Traffic()
		time.Sleep(5 * time.Second)
		asked, _ := w.registry.Traffic()
		return asked == before
	})
	var held atomic.Int64
	release := make(chan struct{})
	letGo := sync.OnceFunc(func() { close(release) })
	defer letGo()
	w.registry.Misbehave(onBlobs(-1, func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
		held.Add(1)
		<-release
		next.ServeHTTP(rw, r)
	}))
	file, err := os.Open(filepath.Join(root, noise))
	require.NoError(w, err)
	defer file.Close()
	off := w.insideSpan(noise)
	pages := make([][]byte, 64)
	var readers errgroup.Group
	for i := range pages {
		pages[i] = make([]byte, 4096)
		readers.Go(func() error {
			_, err := file.ReadAt(pages[i], off)
			return err
		})
	}
	w.eventually("somebody asks for it", func() bool { return held.Load() > 0 })
	require.Never(w, func() bool { return held.Load() > 1 }, time.Second, 50*time.Millisecond)
	letGo()
	w.soon("64 readers", func() { err = readers.Wait() })
	require.NoError(w, err)
	w.requireSum(root)
	want := make([]byte, 4096)
	_, err = file.ReadAt(want, off)
	require.NoError(w, err)
	for _, page := range pages {
		require.Equal(w, want, page)
	}
}

// insideSpan returns where in a file of several spans a page lies such that nothing that the kernel reads ahead with it
// is of another span.
func (w *faultWorld) insideSpan(name string) int64 {
	w.Helper()
	a, err := archive.OpenFile(w.archive(w.ref))
	require.NoError(w, err)
	defer a.Close()
	for i := range a.DiffIDs() {
		x, err := a.Layer(i)
		require.NoError(w, err)
		for _, e := range x.Entries {
			if e.Name == name {
				_, end := x.SpanRange(x.SpanAt(e.Off))
				return int64(end-e.Off) + 4096
			}
		}
	}
	w.Fatalf("no layer has %s", name)
	return 0
}

// TestMirrorFaults has two hosts with the same content.
func TestMirrorFaults(t *testing.T) {
	t.Parallel()
	w := newFaultWorld(t)
	mirror, err := w.lab.StartMirror(w.registry)
	require.NoError(t, err)
	always := func(f harness.Fault) func(*harness.Registry) error {
		return func(r *harness.Registry) error { r.Misbehave(onBlobs(-1, f)); return nil }
	}
	off := (*harness.Registry).SwitchOff
	on := func(*harness.Registry) error { return nil }
	for _, c := range []struct {
		name           string
		origin, mirror func(*harness.Registry) error
		unknown, fails bool
	}{
		{name: "both right", origin: on, mirror: on},
		{name: "mirror refuses", origin: on, mirror: off},
		{name: "origin refuses", origin: off, mirror: on},
		{name: "both refuse", origin: off, mirror: off, fails: true},
		{name: "mirror has no address", origin: on, mirror: on, unknown: true},
		{name: "mirror is silent", origin: on, mirror: always(silent)},
		{name: "mirror stalls", origin: on, mirror: always(stall)},
		{name: "mirror alters", origin: on, mirror: always(alter)},
		{name: "mirror is empty", origin: on, mirror: always(answer(404))},
		{name: "mirror forbids", origin: on, mirror: always(answer(403))},
		{name: "mirror is busy", origin: on, mirror: always(answer(429, "Retry-After", "20"))},
		{name: "mirror sends all", origin: on, mirror: always(whole)},
	} {
		t.Run(c.name, func(t *testing.T) {
			host := mirror.Host()
			if c.unknown {
				host = "mirror.invalid"
			}
			dir := filepath.Join(w.lab.Path("certs.d"), w.registry.Host())
			require.NoError(t, os.MkdirAll(dir, 0o700))
			text := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\"]\n", w.registry.Host(), host)
			require.NoError(t, os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o600))
			w, root := w.cold(t)
			require.NoError(t, c.origin(w.registry))
			require.NoError(t, c.mirror(mirror))
			if c.fails {
				w.requireEIO(root)
			} else {
				w.requireSum(root)
			}
			mirror.Misbehave(nil)
			require.NoError(t, w.registry.SwitchOn())
			require.NoError(t, mirror.SwitchOn())
			w.requireSumAgain(root)
		})
	}
}

// TestOutages is about a container that runs while the registry is away: for less than a read waits, for longer, and for
// ever after everything has come.
func TestOutages(t *testing.T) {
	t.Parallel()
	w := newFaultWorld(t)
	// read returns how long it took, too: of the last try, if ctr lost what the others printed.
	read := func(t *testing.T, w *faultWorld) (sum string, took time.Duration, err error) {
		w.eventually("md5sum says something", func() bool {
			var result harness.Result
			result, err = w.worker.Ctr(w.ctx, "task", "exec", "--exec-id", fmt.Sprint("e", time.Now().UnixNano()), "stays", "md5sum", "/"+noise)
			sum, _, _ = strings.Cut(result.Stdout, " ")
			took = result.Took
			return result.Output() != ""
		})
		return sum, took, err
	}
	start := func(t *testing.T) *faultWorld {
		w, _ := w.cold(t)
		require.NoError(t, w.worker.StartContainer(w.ctx, lazy, w.ref, "stays", "sleep", "1000"))
		w.ctr(w.worker, "task", "exec", "--exec-id", "warm", "stays", "md5sum", "/etc/passwd") // the program is here
		t.Cleanup(func() {
			require.NoError(t, w.registry.SwitchOn())
			require.NoError(t, w.worker.RemoveContainer(context.WithoutCancel(w.ctx), "stays"))
		})
		return w
	}
	t.Run("short", func(t *testing.T) {
		w := start(t)
		require.NoError(t, w.registry.SwitchOff())
		time.AfterFunc(2*time.Second, func() { _ = w.registry.SwitchOn() })
		sum, _, err := read(t, w)
		require.NoError(t, err)
		require.Equal(t, w.want, sum)
	})
	t.Run("long", func(t *testing.T) {
		w := start(t)
		require.NoError(t, w.registry.SwitchOff())
		_, took, err := read(t, w)
		require.Error(t, err)
		require.Regexp(t, "(?i)i/o error|input/output error", err.Error())
		require.Less(t, took, within)
		require.NoError(t, w.registry.SwitchOn())
		w.againInTime(func() (string, time.Duration, error) { return read(t, w) })
	})
	t.Run("for ever", func(t *testing.T) {
		w := start(t)
		// In one line, of which ctr loses nothing or all.
		everything := []string{"sh", "-c", "set -o pipefail && find / -xdev -type f -exec md5sum {} + | md5sum"}
		sums := w.exec(w.worker, "stays", everything...)
		require.NoError(t, w.registry.SwitchOff())
		dropCaches(t)
		require.Equal(t, sums, w.exec(w.worker, "stays", everything...))
		require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, w.ref, "sh", "/app/run.sh"))
	})
}

// TestExpiry has tokens, and addresses of the storage, that end while a layer is read.
func TestExpiry(t *testing.T) {
	t.Parallel()
	w := newFaultWorld(t)
	t.Run("token", func(t *testing.T) {
		w, root := w.cold(t)
		var token, answers atomic.Int64
		w.registry.Misbehave(func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
			switch {
			case r.URL.Path == "/token":
				fmt.Fprintf(rw, `{"token":"t%d","expires_in":300}`, token.Load())
			case r.Header.Get("Authorization") != fmt.Sprint("Bearer t", token.Load()):
				answer(401, "WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, r.Host))(rw, r, next)
			default:
				answers.Add(1)
				token.Add(1) // good for one request
				cut(rw, r, next)
			}
		})
		w.requireSum(root)
		require.Greater(t, answers.Load(), int64(2))
	})
	t.Run("redirect", func(t *testing.T) {
		w, root := w.cold(t)
		storage, err := w.lab.StartMirror(w.registry)
		require.NoError(t, err)
		var key, redirects, refused atomic.Int64
		w.registry.Misbehave(onBlobs(-1, func(rw http.ResponseWriter, r *http.Request, _ http.Handler) {
			redirects.Add(1)
			http.Redirect(rw, r, fmt.Sprintf("http://%s%s?key=%d", storage.Host(), r.URL.Path, key.Load()), http.StatusTemporaryRedirect)
		}))
		storage.Misbehave(func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
			if r.URL.Query().Get("key") != fmt.Sprint(key.Load()) {
				refused.Add(1)
				rw.WriteHeader(http.StatusForbidden)
				return
			}
			key.Add(1)
			cut(rw, r, next)
		})
		w.requireSum(root)
		require.Positive(t, refused.Load())
		require.GreaterOrEqual(t, redirects.Load(), refused.Load())
	})
}
