package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// big is a blob that does not fit into a socket's buffers.
var (
	big       = randomBytes(12 << 20)
	bigDigest = digest.FromBytes(big)
)

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func serveBig(w http.ResponseWriter, r *http.Request) {
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(big))
}

// readBig reads a range of big and checks it.
func readBig(t *testing.T, c *Client, sources []string, off, n int64) error {
	t.Helper()
	return readBigWithin(t, 2*time.Minute, c, sources, off, n)
}

func readBigWithin(t *testing.T, d time.Duration, c *Client, sources []string, off, n int64) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	rc, err := c.Open(ctx, sources, bigDigest, off, n)
	if err != nil {
		return err
	}
	defer rc.Close()
	got, err := io.ReadAll(rc)
	require.True(t, bytes.Equal(big[off:off+int64(len(got))], got), "what comes is right")
	return err
}

// cutAfter sends n bytes of every body, then ends as end says.
func cutAfter(n int, end func(http.ResponseWriter, *http.Request)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		serveBig(&cutter{ResponseWriter: w, left: n, end: func() { end(w, r) }}, r)
	}
}

type cutter struct {
	http.ResponseWriter
	left int
	end  func()
}

func (c *cutter) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b[:min(len(b), c.left)])
	c.left -= n
	if err == nil && n < len(b) {
		c.ResponseWriter.(http.Flusher).Flush()
		c.end()
		return n, io.ErrShortWrite
	}
	return n, err
}

func reset(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
func stall(_ http.ResponseWriter, r *http.Request) {
	<-r.Context().Done()
}

// TestBodyBreaksOff goes on where a body broke off, at the same host or at
// another: nothing is sent twice but what was under way.
func TestBodyBreaksOff(t *testing.T) {
	for name, end := range map[string]func(http.ResponseWriter, *http.Request){"reset": reset, "stall": stall} {
		client := map[string]func(*testing.T, ...string) *Client{"reset": newClient, "stall": newImpatientClient}[name]
		t.Run(name+", one host", func(t *testing.T) {
			h := start(t, cutAfter(1<<20, end))
			require.NoError(t, readBig(t, client(t), []string{h.ref()}, 100, 4<<20))
			require.Len(t, h.seen(), 4)
			require.Equal(t, fmt.Sprintf("bytes=%d-%d", 100+3<<20, 100+4<<20-1), h.seen()[3].Header.Get("Range"))
		})
		t.Run(name+", two hosts", func(t *testing.T) {
			bad, good := start(t, cutAfter(1<<20, end)), start(t, serveBig)
			c := client(t)
			require.NoError(t, readBig(t, c, []string{bad.ref(), good.ref()}, 100, 4<<20))
			require.Len(t, bad.seen(), 1)
			require.Len(t, good.seen(), 1)
			require.NoError(t, readBig(t, c, []string{bad.ref(), good.ref()}, 0, 1<<20))
			require.Len(t, bad.seen(), 1, "who delivered last is asked first")
		})
	}
	t.Run("nothing at all", func(t *testing.T) {
		h := start(t, cutAfter(0, reset))
		err := readBigWithin(t, 2*time.Second, newClient(t), []string{h.ref()}, 0, 1<<20)
		require.ErrorIs(t, err, errdefs.ErrUnavailable)
		require.Less(t, len(h.seen()), 20, "it is not hammered")
	})
	t.Run("a drop at a time", func(t *testing.T) {
		h := start(t, cutAfter(10, reset))
		require.ErrorIs(t, readBigWithin(t, 2*time.Second, newClient(t), []string{h.ref()}, 0, 1<<20), errdefs.ErrUnavailable)
		require.Less(t, len(h.seen()), 20)
	})
}

// blackhole accepts connections and says nothing.
func blackhole(t *testing.T) (name string, accepted *atomic.Int32) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	accepted = new(atomic.Int32)
	var mu sync.Mutex
	var conns []net.Conn
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		defer mu.Unlock()
		for _, conn := range conns {
			conn.Close()
		}
	})
	return l.Addr().String(), accepted
}

// mirrored has hosts in front of an origin for registry.example.com.
func mirrored(t *testing.T, origin string, mirrors ...string) string {
	t.Helper()
	text := fmt.Sprintf("server = \"http://%s\"\n", origin)
	for _, m := range mirrors {
		text += fmt.Sprintf("[host.\"http://%s\"]\ncapabilities = [\"pull\"]\n", m)
	}
	return hostsFile(t, "registry.example.com", text)
}

var mirroredRef = []string{"registry.example.com/team/app:1"}

// TestDeadMirror costs one timeout, whoever reads; and after a pause one
// request finds out that it is back.
func TestDeadMirror(t *testing.T) {
	dead, accepted := blackhole(t)
	origin := start(t, serveBlob)
	c := newImpatientClient(t, mirrored(t, origin.name, dead))
	_, err := read(t.Context(), c, mirroredRef, 0, 3)
	require.NoError(t, err)
	e := c.endpoint(&url.URL{Scheme: "http", Host: dead})
	e.mu.Lock()
	require.NotZero(t, e.failures)
	e.openUntil = time.Now().Add(time.Hour) // the pause is not over before all have read, however long they take
	e.mu.Unlock()

	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			// Another blob, so that nothing but the mirror's state is known.
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			rc, err := c.Open(ctx, mirroredRef, bigDigest, 0, 3)
			if err != nil {
				t.Error(err)
				return
			}
			rc.Close()
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, accepted.Load(), "nobody waits for it again")
}

func TestMirrorComesBack(t *testing.T) {
	var up atomic.Bool
	mirror := start(t, func(w http.ResponseWriter, r *http.Request) {
		if up.Load() {
			serveBlob(w, r)
		} else {
			w.WriteHeader(http.StatusBadGateway)
		}
	})
	origin := start(t, serveBlob)
	c := newClient(t, mirrored(t, origin.name, mirror.name))
	for range 10 {
		_, err := read(t.Context(), c, mirroredRef, 0, 3)
		require.NoError(t, err)
	}
	require.Len(t, mirror.seen(), 1)
	up.Store(true)
	require.Eventually(t, func() bool {
		c.mu.Lock()
		clear(c.memory.good) // as after preferGood
		c.mu.Unlock()
		_, err := read(t.Context(), c, mirroredRef, 0, 3)
		return err == nil && len(mirror.seen()) > 5
	}, time.Minute, 50*time.Millisecond)
}

// TestFailover is the part of the outage matrix about mirrors.
func TestFailover(t *testing.T) {
	const refused = "127.0.0.1:1"
	up := start(t, serveBlob)
	for name, c := range map[string]struct {
		origin, mirror string
		fails          bool
	}{
		"mirror refused": {origin: up.name, mirror: refused},
		"origin refused": {origin: refused, mirror: up.name},
		"both refused":   {origin: refused, mirror: refused, fails: true},
		"no such name":   {origin: up.name, mirror: "mirror.invalid"},
	} {
		t.Run(name, func(t *testing.T) {
			client := newImpatientClient(t, mirrored(t, c.origin, c.mirror))
			if c.fails {
				_, err := readInVain(t.Context(), client, mirroredRef, 0, 3)
				require.ErrorIs(t, err, errdefs.ErrUnavailable)
				return
			}
			_, err := read(t.Context(), client, mirroredRef, 0, 3)
			require.NoError(t, err)
		})
	}
}

// TestOutage is the part about time: short, long, over, permanent.
func TestOutage(t *testing.T) {
	var down atomic.Bool
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		if down.Load() {
			panic(http.ErrAbortHandler)
		}
		serveBlob(w, r)
	})
	dockerConfig(t, "{}")
	// Times are compared with how long a read goes on, which a busy machine
	// does not come near to. One right after a failure has a fifth of patience.
	const patience, giveUp = 45 * time.Second, 10 * time.Second
	c := New(Options{GiveUp: patience, SilenceTimeout: patience})
	get := func() error { _, err := read(t.Context(), c, []string{h.ref()}, 0, 3); return err }
	require.NoError(t, get())

	down.Store(true)
	time.AfterFunc(500*time.Millisecond, func() { down.Store(false) })
	require.NoError(t, get(), "shorter than the deadline")

	down.Store(true)
	c.opts.GiveUp = giveUp
	began := time.Now()
	err := get()
	require.ErrorIs(t, err, errdefs.ErrUnavailable, "longer than the deadline")
	require.NotErrorIs(t, err, io.EOF, "which would be the end of the blob")
	require.Less(t, time.Since(began), 2*giveUp)
	c.opts.GiveUp = patience
	c.mu.Lock()
	require.Contains(t, c.memory.hopeless, testDigest)
	c.memory.hopeless[testDigest] = time.Now().Add(time.Hour) // however long it takes to ask again
	c.mu.Unlock()
	began = time.Now()
	require.Error(t, get(), "asked again at once, as the kernel does")
	require.Less(t, time.Since(began), patience/2)
	down.Store(false)
	began = time.Now()
	require.NoError(t, get(), "the next read")
	require.Less(t, time.Since(began), patience/2, "is not made to wait for what is over")
}

// TestDeadlineWhileAsking has an error that still says what was wrong.
func TestDeadlineWhileAsking(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	var asked atomic.Int32
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		cancel(context.DeadlineExceeded)
		<-r.Context().Done()
	})
	_, err := read(ctx, newClient(t), []string{h.ref()}, 0, 3)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "502")
}

// TestEndedBeforeAsking begins a read that nobody waits for any more.
func TestEndedBeforeAsking(t *testing.T) {
	h := start(t, func(http.ResponseWriter, *http.Request) {})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := read(ctx, newClient(t), []string{h.ref()}, 0, 3)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorIs(t, err, context.Canceled)
	require.Empty(t, h.seen())
}

// TestRetryAfter leaves a host alone as long as it asks for.
func TestRetryAfter(t *testing.T) {
	for name, value := range map[string]func() string{
		"seconds": func() string { return "1" },
		"date":    func() string { return time.Now().Add(2 * time.Second).UTC().Format(http.TimeFormat) },
	} {
		for _, code := range []int{http.StatusTooManyRequests, http.StatusServiceUnavailable} {
			t.Run(fmt.Sprint(name, code), func(t *testing.T) {
				t.Parallel()
				h := start(t, firstly(1, func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Retry-After", value())
					w.WriteHeader(code)
				}))
				c := New(Options{SilenceTimeout: time.Minute})
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				began := time.Now()
				rc, err := c.Open(ctx, []string{h.ref()}, testDigest, 0, 3)
				require.NoError(t, err)
				rc.Close()
				require.GreaterOrEqual(t, time.Since(began), 900*time.Millisecond)
				require.Len(t, h.seen(), 2)
			})
		}
	}
	t.Run("longer than there is time", func(t *testing.T) {
		busy := start(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "3600")
			w.WriteHeader(http.StatusTooManyRequests)
		})
		c := newClient(t)
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 2*maxRetryAfter/3)
		defer cancel()
		_, err := read(ctx, c, []string{busy.ref()}, 0, 3)
		require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
		require.Less(t, time.Since(began), 20*time.Second, "it does not sit the time out")
		require.Len(t, busy.seen(), 1)

		good := start(t, serveBlob)
		_, err = read(t.Context(), c, []string{busy.ref(), good.ref()}, 0, 3)
		require.NoError(t, err)
		require.Len(t, busy.seen(), 1)
	})
}

// TestBlame asks others before who delivered wrong bytes, and him if there is
// nobody else.
func TestBlame(t *testing.T) {
	liar := start(t, func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(strings.ToUpper(testBlob)))
	})
	good := start(t, serveBlob)
	c := newClient(t)
	sources := []string{liar.ref(), good.ref()}
	rc, err := c.Open(t.Context(), sources, testDigest, 10, 5)
	require.NoError(t, err)
	got, err := io.ReadAll(rc)
	require.NoError(t, err)
	require.Equal(t, "ABCDE", string(got))
	rc.(*Reader).Blame()
	require.NoError(t, rc.Close())

	text, err := read(t.Context(), c, sources, 10, 5)
	require.NoError(t, err)
	require.Equal(t, "abcde", text)
	text, err = read(t.Context(), c, sources[:1], 10, 5)
	require.NoError(t, err)
	require.Equal(t, "ABCDE", text)
}

// TestWrongAnswersAreCountedByHost has one that answers wrongly all the time: it is
// given up, and the other, which comes back, is not.
func TestWrongAnswersAreCountedByHost(t *testing.T) {
	wrong := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-1/36")
		w.WriteHeader(http.StatusPartialContent)
	}
	liar, good := start(t, wrong), start(t, firstly(maxWrong+1, status(http.StatusServiceUnavailable)))
	_, err := read(t.Context(), newClient(t), []string{liar.ref(), good.ref()}, 10, 5)
	require.NoError(t, err)
	require.Len(t, liar.seen(), maxWrong)

	// Who goes wrong now and then, and delivers in between, is not given up.
	var n atomic.Int32
	moody := start(t, func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1)%2 == 0 {
			wrong(w, r)
			return
		}
		cutAfter(64<<10, reset)(w, r)
	})
	require.NoError(t, readBig(t, newClient(t), []string{moody.ref()}, 0, (maxWrong+2)*64<<10))
	require.EqualValues(t, 2*(maxWrong+2)-1, n.Load())
}

// TestConnectionLimit has more readers than a host is asked at once.
func TestConnectionLimit(t *testing.T) {
	var now, most atomic.Int32
	two := make(chan struct{}) // closed when a second one is there
	second := sync.OnceFunc(func() { close(two) })
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		if n > 1 {
			second()
		}
		select {
		case <-two:
		case <-r.Context().Done():
		}
		time.Sleep(5 * time.Millisecond)
		now.Add(-1) // before the answer: with it the next one may come
		serveBlob(w, r)
	})
	c := newClient(t)
	var wg sync.WaitGroup
	for range 4 * maxPerEndpoint {
		wg.Go(func() {
			if _, err := read(t.Context(), c, []string{h.ref()}, 0, 3); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	require.LessOrEqual(t, most.Load(), int32(maxPerEndpoint))
	require.Greater(t, most.Load(), int32(1))
}

// TestConnectionsAreKept reads one after the other over one connection, also
// when answers are errors.
func TestConnectionsAreKept(t *testing.T) {
	n := 0
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		if n++; n%2 == 0 {
			http.Error(w, "no", http.StatusNotFound)
			return
		}
		serveBlob(w, r)
	})
	c := newClient(t)
	from := map[string]bool{}
	for range 10 {
		_, _ = read(t.Context(), c, []string{h.ref()}, 0, 3)
	}
	for _, r := range h.seen() {
		from[r.RemoteAddr] = true
	}
	require.Len(t, h.seen(), 10)
	require.Len(t, from, 1)
}

// TestNothingLeaks goes through all faults and looks at what is left.
func TestNothingLeaks(t *testing.T) {
	dead, _ := blackhole(t)
	hosts := []string{dead, "127.0.0.1:1"}
	for _, h := range []http.HandlerFunc{
		cutAfter(1<<20, reset), cutAfter(1<<20, stall), cutAfter(0, stall), status(http.StatusInternalServerError),
		status(http.StatusTooManyRequests), status(http.StatusNotFound), stall, reset,
		status(http.StatusUnauthorized), status(http.StatusForbidden), status(http.StatusRequestedRangeNotSatisfiable),
		status(http.StatusServiceUnavailable), func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(big) },
		func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path+"x", http.StatusFound) },
	} {
		hosts = append(hosts, start(t, h).name)
	}
	good := start(t, serveBig)
	c := newImpatientClient(t)
	round := func() {
		var wg sync.WaitGroup
		for _, host := range hosts {
			wg.Go(func() {
				if err := readBig(t, c, []string{host + "/team/app:1", good.ref()}, 0, 3<<20); err != nil {
					t.Errorf("%s: %v", host, err)
				}
				ctx, cancel := context.WithTimeoutCause(t.Context(), 200*time.Millisecond, errors.New("enough"))
				defer cancel()
				if rc, err := c.Open(ctx, []string{host + "/team/app:1"}, bigDigest, 0, 3<<20); err == nil {
					_, _ = rc.Read(make([]byte, 100))
					rc.Close()
				}
			})
		}
		wg.Wait()
	}
	left := func() (goroutines, fds int) {
		c.mu.Lock()
		for _, conf := range c.configs {
			conf.closeIdle()
		}
		c.mu.Unlock()
		names, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return runtime.NumGoroutine(), len(names)
	}
	round()
	time.Sleep(300 * time.Millisecond)
	goroutines, fds := left()
	for range 5 {
		round()
	}
	// What each read of one host leaks would be 10 of.
	var g, f int
	if !assert.Eventually(t, func() bool { g, f = left(); return g <= goroutines+8 && f <= fds+8 }, time.Minute, 50*time.Millisecond) {
		t.Fatalf("%d goroutines and %d files were %d and %d", g, f, goroutines, fds)
	}
	for _, e := range c.endpoints {
		require.True(t, e.slots.TryAcquire(maxPerEndpoint), "connections to %s are not given back", e.host)
	}
}
