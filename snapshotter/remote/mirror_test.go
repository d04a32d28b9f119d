package remote

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// TestTwoMirrors are asked in the order in which they are written down, and the origin
// last; each speaks as its part of the file says.
func TestTwoMirrors(t *testing.T) {
	var asked []string
	var mu sync.Mutex // guards asked
	host := func(name string, h http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			asked = append(asked, name)
			mu.Unlock()
			h(w, r)
		}
	}
	var answer [3]atomic.Int32 // 0: the blob
	as := func(i int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if code := answer[i].Load(); code != 0 {
				w.WriteHeader(int(code))
				return
			}
			serveBlob(w, r)
		}
	}
	secure := httptest.NewTLSServer(host("first", as(0)))
	t.Cleanup(secure.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o600))
	second, origin := start(t, host("second", as(1))), start(t, host("origin", as(2)))
	dir := hostsFile(t, "registry.example.com", fmt.Sprintf(`
server = "http://%s"
[host.%q]
capabilities = ["pull"]
ca = %q
[host."http://%s"]
capabilities = ["pull"]
`, origin.name, secure.URL, ca, second.name))
	for _, c := range []struct {
		codes [3]int32
		want  []string
	}{
		{[3]int32{0, 0, 0}, []string{"first"}},
		{[3]int32{404, 0, 0}, []string{"first", "second"}},
		{[3]int32{404, 403, 0}, []string{"first", "second", "origin"}},
	} {
		for i, code := range c.codes {
			answer[i].Store(code)
		}
		mu.Lock()
		asked = nil
		mu.Unlock()
		got, err := read(t.Context(), newClient(t, dir), mirroredRef, 10, 5)
		require.NoError(t, err)
		require.Equal(t, "abcde", got)
		mu.Lock()
		require.Equal(t, c.want, asked)
		mu.Unlock()
	}
}

// TestNoName has a registry whose name nobody knows for a while: a read fails in time,
// and the next one after that finds it.
func TestNoName(t *testing.T) {
	h := start(t, serveBlob)
	dir := hostsFile(t, "registry.example.com", "server = \"http://registry.invalid\"\n")
	dockerConfig(t, "{}")
	// A read right after one that has given up has a fifth of the time to be silent in:
	// that must be enough for a busy machine, too.
	const giveUp = 6 * time.Second
	c := New(Options{ConfigPath: []string{dir}, GiveUp: giveUp, ConnectTimeout: giveUp - time.Second, SilenceTimeout: 5 * giveUp})
	began := time.Now()
	_, err := read(t.Context(), c, mirroredRef, 0, 3)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	_, dns := errors.AsType[*net.DNSError](err)
	require.True(t, dns, err)
	require.Less(t, time.Since(began), 5*giveUp)

	hosts, err := c.hostsOf("registry.example.com")
	require.NoError(t, err)
	transport := hosts[0].Client.Transport.(redirecting).next.(*http.Transport)
	transport.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, h.name) // as if the name were known now
	}
	_, err = read(t.Context(), c, mirroredRef, 0, 3)
	require.NoError(t, err)
}

// TestPausesGrow doubles the pause of a host that fails again and again, up to a limit,
// and not for all who failed with it at the same moment.
func TestPausesGrow(t *testing.T) {
	e := newEndpoint("registry.example.com")
	different := map[time.Duration]bool{}
	for n := range 10 {
		e.openUntil = time.Time{} // the last pause is over
		before := time.Now()
		e.failed(t.Context(), errors.New("away"))
		pause := e.openUntil.Sub(before)
		open := time.Now().Add(time.Hour) // however long it takes to the next line
		e.openUntil = open
		e.failed(t.Context(), errors.New("away, too"))
		require.Equal(t, open, e.openUntil)
		want := min(firstOpen<<n, maxOpen)
		require.GreaterOrEqual(t, pause, want/2)
		require.Less(t, pause, want*3/2+10*time.Second) // and what the machine takes for a line
		require.Equal(t, n+1, e.failures)
		different[pause.Round(time.Millisecond)] = true
	}
	require.Greater(t, len(different), 5)
	e.answered()
	e.failed(t.Context(), errors.New("away"))
	require.Equal(t, 1, e.failures, "it begins anew")

	r := &Reader{pause: firstPause}
	for n := range 10 {
		want := min(firstPause<<n, maxPause)
		pause := r.nextPause()
		require.GreaterOrEqual(t, pause, want/2)
		require.Less(t, pause, want*3/2)
	}
}
