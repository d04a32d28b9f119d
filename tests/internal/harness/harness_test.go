package harness

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
)

// TestProxy counts requests, and refuses connections while it is off.
func TestProxy(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	require.NoError(t, err)
	backend := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // whoever sends sees what goes wrong
		http.ServeContent(w, r, "", Request{}.At, strings.NewReader("0123456789"))
	})}
	go func() { _ = backend.Serve(listener) }()
	t.Cleanup(func() { backend.Close() })
	p, err := newProxy(socket)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.switchOff()) })

	get := func(ranged string) (string, error) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+p.address+"/v2/a/blobs/sha256:00", nil)
		require.NoError(t, err)
		r.Header.Set("Range", ranged)
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	body, err := get("bytes=2-4")
	require.NoError(t, err)
	require.Equal(t, "234", body)
	var requests Requests
	require.Eventually(t, func() bool { // it is noted when it has ended, which the client may know first
		requests = (&Registry{proxy: p}).Requests()
		return len(requests.Gets("sha256:00")) == 1
	}, time.Minute, time.Millisecond)
	require.Empty(t, requests.Gets("sha256:01"))
	require.EqualValues(t, 3, requests.Sent())
	require.Equal(t, http.StatusPartialContent, requests[0].Status)
	require.Equal(t, "bytes=2-4", requests[0].Range)
	resp, err := http.Post("http://"+p.address+"/v2/", "text/plain", strings.NewReader("seven b"))
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.EqualValues(t, 7, (&Registry{proxy: p}).Received())

	require.NoError(t, p.switchOff())
	_, err = get("bytes=0-0")
	require.ErrorIs(t, err, unix.ECONNREFUSED)
	require.NoError(t, p.switchOn())
	body, err = get("bytes=0-0")
	require.NoError(t, err)
	require.Equal(t, "0", body)
}

// TestSweep ends what a lab left: a server's stubborn child with an environment of its own, and mounts.
func TestSweep(t *testing.T) {
	need.Root(t)
	lab, err := NewLab(Options{Parent: t.TempDir()})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, lab.Close()) })
	ready := func(context.Context) error { return nil }
	_, err = lab.start(t.Context(), "server", ready, "sh", "-c", "env -i sh -c 'trap \"\" TERM; sleep 1000 & wait' & wait")
	require.NoError(t, err)
	require.NoError(t, os.MkdirAll(lab.Path("a/b"), 0o700))
	require.NoError(t, unix.Mount("tmpfs", lab.Path("a/b"), "tmpfs", 0, ""))
	require.NoError(t, os.Mkdir(lab.Path("a/b/c"), 0o700))
	require.NoError(t, unix.Mount("tmpfs", lab.Path("a/b/c"), "tmpfs", 0, ""))
	busy, err := os.Create(lab.Path("a/b/c/busy"))
	require.NoError(t, err)
	defer busy.Close()

	require.Eventually(t, func() bool { return strings.Contains(strings.Join(Leftovers(lab.Dir), "\n"), "sleep 1000") }, time.Minute, 10*time.Millisecond)
	var pids []int
	require.Eventually(t, func() bool { pids = processesOf(lab.Dir); return len(pids) == 3 }, time.Minute, 10*time.Millisecond)
	require.NoError(t, lab.Close())
	require.Eventually(t, func() bool { return !slices.ContainsFunc(pids, alive) }, time.Minute, 10*time.Millisecond)
	require.Empty(t, Leftovers(lab.Dir))
	require.NoDirExists(t, lab.Dir)
	require.NoError(t, lab.Close())
}

// TestSweepStale sweeps labs whose owner died, also if its number is another's now, and leaves those alone whose owner
// lives.
func TestSweepStale(t *testing.T) {
	dead := exec.Command("sleep", "1000")
	require.NoError(t, dead.Start())
	owner := ownerOf(dead.Process.Pid)
	require.True(t, lives(owner))
	require.NoError(t, dead.Process.Kill())
	require.Error(t, dead.Wait())
	parent := t.TempDir()
	lab := func(name, owner string) string {
		dir := filepath.Join(parent, labPattern+name)
		require.NoError(t, os.Mkdir(dir, 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(dir, ownerFile), []byte(owner), 0o600))
		return dir
	}
	stale := []string{lab("dead", owner), lab("again", fmt.Sprint(os.Getpid(), " 1"))}
	living := []string{lab("lives", thisOwner()), lab("init", ownerOf(1)), lab("older", "1"), lab("begins", "")}
	var said []string
	require.NoError(t, SweepStale(parent, func(args ...any) { said = append(said, fmt.Sprint(args...)) }))
	require.Len(t, said, len(stale))
	for _, dir := range stale {
		require.NoDirExists(t, dir)
		require.Contains(t, strings.Join(said, "\n"), dir)
	}
	for _, dir := range living {
		require.DirExists(t, dir)
	}
}

// TestServerThatFails says at once what a server that cannot start had to say.
func TestServerThatFails(t *testing.T) {
	lab, err := NewLab(Options{Parent: t.TempDir()})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, lab.Close()) })
	_, err = lab.start(t.Context(), "server", dialable(lab.Path("none")), "sh", "-c", "echo no luck; exit 3")
	require.ErrorContains(t, err, "no luck")
}

// TestBareRegistry talks to a registry on its own port.
func TestBareRegistry(t *testing.T) {
	top, err := Top()
	require.NoError(t, err)
	lab, err := NewLab(Options{Parent: t.TempDir(), Parts: filepath.Join(top, ".cache", "bin")})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, lab.Close()) })
	host, err := lab.StartBareRegistry(t.Context())
	require.NoError(t, err)
	response, err := http.Get("http://" + host + "/v2/")
	require.NoError(t, err)
	require.NoError(t, response.Body.Close())
	require.Equal(t, http.StatusOK, response.StatusCode)
}

// TestShape measures a link: its rate is that of all connections together, and its latency is that of every answer.
func TestShape(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	require.NoError(t, err)
	backend := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // whoever sends sees what goes wrong
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(make([]byte, 2<<20)))
	})}
	go func() { _ = backend.Serve(listener) }()
	t.Cleanup(func() { backend.Close() })
	p, err := newProxy(socket)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.switchOff()) })
	registry := &Registry{proxy: p}
	get := func(n int) time.Duration {
		began := time.Now()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+p.address, nil)
		require.NoError(t, err)
		r.Header.Set("Range", fmt.Sprintf("bytes=0-%d", n-1))
		resp, err := http.DefaultClient.Do(r)
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Len(t, body, n)
		return time.Since(began)
	}
	const latency, rate = 20 * time.Millisecond, 4 << 20 // in time to wait for on a machine that is busy
	registry.Shape(Link{Rate: rate, Latency: latency})
	require.GreaterOrEqual(t, get(1), 4*latency, "a connection is made, and answers")
	gets := int64(1)
	requireAbout(t, 2*latency, 4*latency, "it is kept", func() time.Duration { gets++; return get(1) })
	requests, sent := registry.Traffic()
	require.Equal(t, gets, requests)
	require.Equal(t, gets, sent)

	together := func() time.Duration {
		began := time.Now()
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() { get(1 << 20) })
		}
		all.Wait()
		return time.Since(began) - 2*latency
	}
	requireRate(t, time.Second, "four connections share the rate", together)
	requireRate(t, time.Second/2, "latency does not make the link slower", func() time.Duration { return get(2<<20) - 2*latency })

	put := func() time.Duration {
		began := time.Now()
		resp, err := http.Post("http://"+p.address, "application/octet-stream", bytes.NewReader(make([]byte, 2<<20)))
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		return time.Since(began)
	}
	down := func() time.Duration { return get(2 << 20) }
	registry.Shape(Link{Up: rate / 2})
	requireRate(t, time.Second, "the other direction", put)
	requireAbout(t, 0, time.Second/2, "has nothing to do with this one", down)

	registry.Shape(Link{})
	requireAbout(t, 0, time.Second/2, "no link", down)
	requireAbout(t, 0, time.Second/2, "no link", put)
}

// requireRate allows for a burst, and for a machine that is busy.
func requireRate(t *testing.T, want time.Duration, what string, measure func() time.Duration) {
	t.Helper()
	requireAbout(t, want*9/10, want*3, what, measure)
}

// requireAbout measures until it takes less than most: a machine that is busy makes it
// longer, and nothing makes it shorter, so that each time is least at the least.
func requireAbout(t *testing.T, least, most time.Duration, what string, measure func() time.Duration) {
	t.Helper()
	for began := time.Now(); ; {
		got := measure()
		require.GreaterOrEqual(t, got, least, what)
		if got < most {
			return
		}
		require.Less(t, time.Since(began), 2*time.Minute, "%s: %s", what, got)
	}
}
