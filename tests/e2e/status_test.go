package e2e

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"

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
	w := newWorldWith(t, "[fill]\nmode = 'off'\n[registry]\ngive_up = '2s'\n")
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
	_, err := w.worker.Ctr(w.ctx, "task", "exec", "--exec-id", "e", "web", "md5sum", "/sizes/noise-3M+1")
	require.Error(t, err)
	var wrong string
	for _, l := range w.status().Layers {
		wrong += l.Error
	}
	require.Contains(t, wrong, w.registry.Host(), "and what went wrong")

	require.NoError(t, w.daemon.Stop())
	result, err := w.worker.Clipctl(w.ctx, "status")
	require.Error(t, err)
	requireClear(t, result.Stderr, w.daemon.Socket)
}
