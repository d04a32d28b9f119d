package command

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// get reads from a socket.
func get(t *testing.T, socket, path string) string {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	resp, err := client.Get("http://daemon" + path)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, http.StatusOK, resp.StatusCode)
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(b)
}

// TestObserved asks a daemon for its metrics and profiles.
func TestObserved(t *testing.T) {
	c := testConfig(t)
	c.LogFormat = "json"
	t.Cleanup(func() { require.NoError(t, log.SetFormat(log.TextFormat)) })
	metrics, profiles := filepath.Join(t.TempDir(), "m"), filepath.Join(t.TempDir(), "d")
	c.Metrics.Address, c.Debug.Address = unixScheme+metrics, unixScheme+profiles
	stop := start(t, c)
	for _, socket := range []string{metrics, profiles} {
		st, err := os.Stat(socket)
		require.NoError(t, err)
		require.Zero(t, st.Mode().Perm()&0o007, "for root only")
	}
	text := get(t, metrics, "/metrics")
	for _, line := range []string{"clip_cache_bytes 0", "clip_requests_in_flight 0", `clip_mounts{mode="file"} 0`, "go_goroutines "} {
		require.Contains(t, text, "\n"+line)
	}
	require.NotContains(t, text, "clip_index_", "nothing is watched")
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	require.NoError(t, err)
	require.Empty(t, problems)
	require.Contains(t, get(t, profiles, "/debug/pprof/goroutine?debug=2"), "command.serve(")
	require.NoError(t, stop())
	require.NoError(t, start(t, c)(), "sockets that were left do no harm")

	c.Metrics.Address = "127.0.0.1:1000000"
	require.ErrorContains(t, serve(t.Context(), c), "listening on 127.0.0.1:1000000")
}

// TestWatcherMetrics are those of another process, when it is there.
func TestWatcherMetrics(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "w")
	none, err := watcherMetrics(socket)()
	require.NoError(t, err)
	require.Empty(t, none)
	registry := prometheus.NewRegistry()
	queue := prometheus.NewGauge(prometheus.GaugeOpts{Name: "clip_index_queue", Help: "h"})
	registry.MustRegister(queue)
	queue.Set(3)
	c := config{Metrics: metricsConfig{Address: unixScheme + socket}}
	stop, err := c.observe(t.Context(), registry)
	require.NoError(t, err)
	defer stop()
	c.Address, c.Watch.Rules = strings.TrimSuffix(socket, "w")+"s", []watchRule{{}}
	require.NoError(t, os.Symlink(socket, c.watcherSocket()))
	all := c.gatherers(nil)
	require.Eventually(t, func() bool { // nobody waits long for them, and a busy machine takes long
		families, err := all.Gather()
		if err != nil {
			return false
		}
		for _, f := range families {
			if f.GetName() == "clip_index_queue" {
				assert.Equal(t, 3.0, f.GetMetric()[0].GetGauge().GetValue())
				return true
			}
		}
		return false
	}, time.Minute, time.Millisecond, "the watcher's metrics are missing")
}
