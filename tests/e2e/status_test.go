package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// status is what clipctl status --json prints, as its users read it.
type status struct {
	Daemon struct {
		Mode     string
		PID      int
		InFlight int
	}
	Cache  struct{ Used, Max int64 }
	Images []struct {
		Namespace, Name, Reason, Fill, Mount, Error string
		Layers, Lazy                                int
		Fetched, Total                              int64
	}
	Containers []struct {
		Namespace, Name, Image, Reason, Mount string
		Lazy                                  bool
	}
	Layers []struct {
		DiffID, Fill, Host, Error, Image string
		Lazy, Complete                   bool
		Size, Fetched, BlobSize          int64
		Sources                          []string
	}
}

func (w *world) status() (st status) {
	w.Helper()
	result, err := w.worker.Clipctl(w.ctx, "status", "--json")
	require.NoError(w, err)
	require.NoError(w, json.Unmarshal([]byte(result.Stdout), &st))
	return st
}

// TestStatus has a lazy image, one that shares its layers, one with no layer of its own, one that is not lazy at the
// top, and a container.
func TestStatus(t *testing.T) {
	t.Parallel()
	// What is asked for must come within give_up on a slow machine, and a read that fails waits for all of it.
	w := newWorldWith(t, "[fill]\nmode = 'off'\n[registry]\ngive_up = '20s'\n[metrics]\naddress = 'unix://LAB/metrics'\n[debug]\naddress = 'unix://LAB/debug'\n")
	for _, name := range []string{images.SmallName, images.BaseName} {
		w.index(name)
	}
	for _, name := range []string{images.SmallName, images.SiblingName, images.BaseName} {
		w.pull(w.worker, lazy, w.ref(name))
	}
	require.NoError(t, w.worker.StartContainer(w.ctx, lazy, w.ref(images.SmallName), "web", "sleep", "1000"))
	st := w.status()
	require.Equal(t, w.daemon.Pid(), st.Daemon.PID)
	require.NotEmpty(t, st.Daemon.Mode)
	require.Positive(t, st.Cache.Used)
	require.Len(t, st.Images, 3)
	type lazyOf struct{ lazy, layers int }
	got := map[string]lazyOf{}
	for _, i := range st.Images {
		require.Equal(t, "default", i.Namespace)
		require.Empty(t, i.Error)
		got[images.ShortName(i.Name)] = lazyOf{i.Lazy, i.Layers}
		if i.Lazy < i.Layers {
			require.NotEmpty(t, i.Reason)
		}
		if i.Name == w.ref(images.SmallName) {
			require.Positive(t, i.Fetched)
			require.Less(t, i.Fetched, i.Total)
			require.Equal(t, "off", i.Fill)
			require.Equal(t, st.Daemon.Mode, i.Mount)
		}
	}
	require.Equal(t, map[string]lazyOf{"busybox": {5, 5}, "sibling": {3, 4}, "base": {3, 3}}, got)
	require.Len(t, st.Containers, 1)
	require.Equal(t, "web", st.Containers[0].Name)
	require.Equal(t, w.ref(images.SmallName), st.Containers[0].Image)
	require.True(t, st.Containers[0].Lazy)
	require.Equal(t, st.Daemon.Mode, st.Containers[0].Mount)
	host := ""
	for _, l := range st.Layers {
		host += l.Host
		if l.Lazy {
			require.NotEmpty(t, l.Sources)
		}
	}
	require.Contains(t, host, w.registry.Host(), "it says who delivered")

	require.NoError(t, w.registry.SwitchOff())
	_, err := w.worker.Ctr(w.ctx, "task", "exec", "--exec-id", "e", "web", "md5sum", "/sizes/noise-1M")
	require.Error(t, err)
	var wrong string
	for _, l := range w.status().Layers {
		wrong += l.Error
	}
	require.Contains(t, wrong, w.registry.Host(), "and what went wrong")
	require.NoError(t, w.registry.SwitchOn())
	w.eventually("it reads when the registry is back", func() bool { // right after a failure reads are given little time
		_, err := w.worker.Ctr(w.ctx, "task", "exec", "--exec-id", fmt.Sprint("f", time.Now().UnixNano()), "web", "md5sum", "/sizes/noise-1M")
		return err == nil
	})
	w.requireMetrics()
	w.eventually("it is forgotten when it goes right", func() bool {
		wrong := ""
		for _, l := range w.status().Layers {
			wrong += l.Error
		}
		return wrong == ""
	})

	require.NotEqual(t, "0", w.metrics(w.lab.Path("metrics"))[`clip_read_duration_seconds_count{outcome="failed"}`])

	w.requireRedrawn()
	require.NoError(t, w.daemon.Stop())
	result, err := w.worker.Clipctl(w.ctx, "status")
	require.Error(t, err)
	requireClear(t, result.Stderr, w.daemon.Socket)
}

// newPage is what clipctl writes before each page on a terminal: home, and clear.
const newPage = "\x1b[H\x1b[2J"

// requireRedrawn watches on a terminal until it is interrupted: each time the screen is drawn anew.
func (w *world) requireRedrawn() {
	w.Helper()
	clipctl, err := w.lab.Look("clipctl")
	require.NoError(w, err)
	number, typescript := w.lab.Path("status.pid"), w.lab.Path("typescript")
	watch := "echo $$ >" + number + "; exec " + clipctl + " status --watch --clip-address " + w.daemon.Socket + " --address " + w.worker.Socket
	// The typescript is a file, and what is drawn is seen there as it is drawn.
	cmd := exec.CommandContext(w.ctx, "script", "--quiet", "--return", "--flush", "--command", watch, typescript)
	var screen bytes.Buffer
	cmd.Stdout, cmd.Stderr = &screen, &screen
	require.NoError(w, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	w.eventually("two pages, and a third that begins", func() bool {
		drawn, _ := os.ReadFile(typescript) // there is none at first
		return bytes.Count(drawn, []byte(newPage)) > 2
	})
	text, err := os.ReadFile(number)
	require.NoError(w, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	require.NoError(w, err)
	require.NoError(w, unix.Kill(pid, unix.SIGINT))
	w.soon("clipctl ends", func() { err = <-ended })
	require.NoError(w, err, "%s", &screen)
	pages := strings.Split(screen.String(), newPage)
	require.Greater(w, len(pages), 2, "%q", &screen)
	require.Empty(w, pages[0], "nothing is written before")
	for _, page := range pages[1:] {
		require.Contains(w, page, w.ref(images.SmallName))
	}
}

// ask asks an HTTP server on a socket.
func (w *world) ask(socket, path string) string {
	w.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	resp, err := client.Get("http://daemon" + path)
	require.NoError(w, err)
	defer resp.Body.Close()
	require.Equal(w, http.StatusOK, resp.StatusCode)
	b, err := io.ReadAll(resp.Body)
	require.NoError(w, err)
	return string(b)
}

// metrics asks a daemon for its metrics, by name and labels.
func (w *world) metrics(socket string) map[string]string {
	w.Helper()
	values := map[string]string{}
	for line := range strings.Lines(w.ask(socket, "/metrics")) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "} "); ok {
			values[name+"}"] = value
		} else if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			values[name] = value
		}
	}
	return values
}

// requireMetrics is after a container has read what was not fetched for its start.
func (w *world) requireMetrics() {
	w.Helper()
	got := w.metrics(w.lab.Path("metrics"))
	for _, name := range []string{
		`clip_fetched_bytes_total{reason="reader",source="` + w.registry.Host() + `"}`, `clip_read_duration_seconds_count{outcome="fetched"}`,
		`clip_prepared_layers_total{outcome="lazy"}`, `clip_prepared_layers_total{outcome="unpacked"}`,
		`clip_mounts{mode="` + w.status().Daemon.Mode + `"}`, `clip_spans_total{reason="reader"}`, "clip_cache_bytes", "clip_cache_limit_bytes", "process_resident_memory_bytes",
	} {
		require.NotContains(w, []string{"", "0"}, got[name], "%s in %v", name, got)
	}
	w.eventually("what the kernel reads ahead is answered", func() bool {
		return w.metrics(w.lab.Path("metrics"))["clip_requests_in_flight"] == "0"
	})
	require.Equal(w, "0", got[`clip_verification_failures_total{what="span"}`])
	require.Contains(w, w.ask(w.lab.Path("debug"), "/debug/pprof/goroutine?debug=1"), "goroutine profile")
}

// TestPullAndPrune goes through the commands that look after images and what was fetched of them.
func TestPullAndPrune(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, "[fill]\ndelay = '0s'\n")
	ref, file := w.ref(images.SmallName), w.lab.Path("a.clip")
	w.index(images.SmallName)
	ask := func(args ...string) string {
		t.Helper()
		result, err := w.worker.Clipctl(w.ctx, args...)
		require.NoError(t, err)
		return result.Stdout
	}
	require.Contains(t, ask("pull", ref), "lazy\t5 layers")
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	require.Contains(t, ask("pull", w.ref(images.SiblingName)), "not lazy\t1 of 4 layers: ")
	w.eventually("shells complete names of images", func() bool { // they wait for containerd for two seconds at most
		return strings.Contains(ask("__complete", "doctor", w.registry.Host()), ref+"\n")
	})
	_, err := w.worker.Clipctl(w.ctx, "pull", w.registry.Ref("small/none:1"))
	require.ErrorContains(t, err, "clipctl doctor")

	w.eventually("the layers are complete", func() bool { return strings.Count(ask("cache", "ls"), "100%") == 5 })
	require.Regexp(t, "of at most .* in 5 layers", ask("cache", "usage"))
	require.NoError(t, w.worker.StartContainer(w.ctx, lazy, ref, "web", "sleep", "1000"))
	require.Equal(t, "gave up 0 B of 0 layers\n", ask("cache", "prune"), "a container uses them")
	require.Contains(t, ask("cache", "prune", "--all"), "gave up ")
	require.Equal(t, "clip\n", w.exec(w.worker, "web", "cat", "/app/name"), "what is read again is fetched again")
	require.NoError(t, w.worker.RemoveContainer(w.ctx, "web"))
	w.removeImage(w.worker, w.ref(images.SiblingName))
	require.NoError(t, w.daemon.Stop(), "unmounts the root, which nobody needs any more")
	require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
	// A daemon that starts completes them again, some time after it answers: what is given up before may come back.
	w.eventually("the layers are complete again", func() bool { return strings.Count(ask("cache", "ls"), "100%") == 5 })
	require.Regexp(t, "gave up [1-9].* of [1-5] layers", ask("cache", "prune"))
	require.NotContains(t, ask("cache", "ls"), "100%")
	w.runAfterRestart(ref)

	_, err = w.builder.Clipctl(w.ctx, "index", ref, "-o", file)
	require.NoError(t, err)
	for _, args := range [][]string{{"check", file}, {"check", file, ref}} {
		result, err := w.builder.Clipctl(w.ctx, args...)
		require.NoError(t, err)
		require.Equal(t, 5, strings.Count(result.Stdout, "ok    layer"), result.Stdout)
	}
}
