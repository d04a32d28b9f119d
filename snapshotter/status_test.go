package snapshotter

import (
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/snapshotter/control"
)

// TestFind tells whoever asks of the archive that a pull would use, and of the layers that are not lazy.
func TestFind(t *testing.T) {
	dir := t.TempDir()
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	image := control.Image{Ref: ref, Manifest: img.Descriptor.Digest}
	found, err := sn.Find(t.Context(), image)
	require.NoError(t, err)
	require.Equal(t, control.Archive{Layers: 2, Lazy: 2}, found)
	_, err = sn.Find(t.Context(), control.Image{Ref: ref, Manifest: digest.FromString("another")})
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	file := filepath.Join(dir, "archives", "a.clip")
	require.NoError(t, os.Remove(file))
	_, err = sn.Find(t.Context(), image)
	require.ErrorIs(t, err, errdefs.ErrNotFound, "what was found is not remembered")
	x, err := layer.Build(t.Context(), bytes.NewReader(img.Blobs[img.Layers[0].Digest]), img.Layers[0], layer.Options{})
	require.NoError(t, err)
	_, err = archive.WriteFile(file, &archive.Image{
		StorageRef: ref, Platform: img.Platform, Descriptor: img.Descriptor, Manifest: img.Manifest, Config: img.Config,
		Layers: []archive.Layer{{Index: x}, {Reason: "zstd window"}},
	})
	require.NoError(t, err)
	found, err = sn.Find(t.Context(), image)
	require.NoError(t, err)
	require.Equal(t, control.Archive{Layers: 2, Lazy: 1, NotLazy: "zstd window"}, found)
}

// TestSave writes the archive that a pull would use, the same bytes.
func TestSave(t *testing.T) {
	dir := t.TempDir()
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	what := control.Save{Image: control.Image{Ref: ref, Manifest: img.Descriptor.Digest}, Path: filepath.Join(t.TempDir(), "saved.clip")}
	saved, err := sn.Save(t.Context(), what)
	require.NoError(t, err)
	require.Equal(t, control.Archive{Layers: 2, Lazy: 2}, saved)
	file := filepath.Join(dir, "archives", "a.clip")
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	got, err := os.ReadFile(what.Path)
	require.NoError(t, err)
	require.Equal(t, want, got)

	what.Path = filepath.Join(t.TempDir(), "none", "saved.clip")
	_, err = sn.Save(t.Context(), what)
	require.ErrorIs(t, err, os.ErrNotExist)
	what.Path = "saved.clip"
	_, err = sn.Save(t.Context(), what)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	what.Path = filepath.Join(t.TempDir(), "saved.clip")
	require.NoError(t, os.Remove(file))
	_, err = sn.Save(t.Context(), what)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.NoFileExists(t, what.Path)
}

// TestInFlight has a read wait for the registry: it is counted with its age as long as it does.
func TestInFlight(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	behind, goOn, asked := registry.New(registry.Logger(log.New(io.Discard, "", 0))), make(chan struct{}), make(chan struct{}, 100)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			asked <- struct{}{}
			<-goOn
		}
		behind.ServeHTTP(w, r)
	}))
	defer srv.Close()
	host, dir := strings.TrimPrefix(srv.URL, "http://"), t.TempDir()
	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "low", Data: "of the lower layer"}, testutil.File{Name: "both", Data: "new"}))
	img.Push(t, host, "team/app")
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "archives"), 0o700))
	img.WriteArchive(t, filepath.Join(dir, "archives", "a.clip"), host+"/team/app:1")

	sn := open(t, dir)
	mounts, err := sn.Prepare(t.Context(), "container", pull(t, sn, img, host+"/team/app:1"))
	require.NoError(t, err)
	requireNoneInFlight(t, sn)
	var reading sync.WaitGroup
	reading.Go(func() { requireRead(t, mounts) })
	<-asked
	require.Positive(t, gauge(t, sn, "clip_requests_in_flight"))
	age := gauge(t, sn, "clip_oldest_request_age_seconds")
	require.Positive(t, age)
	st, err := sn.Status(t.Context())
	require.NoError(t, err)
	require.Positive(t, st.Daemon.InFlight)
	require.Greater(t, st.Daemon.OldestSeconds, age, "it gets older")
	close(goOn)
	reading.Wait()
	requireNoneInFlight(t, sn)
}

// requireNoneInFlight waits for what the kernel asks without anybody waiting for it, such
// as when a file is closed.
func requireNoneInFlight(t *testing.T, sn *Snapshotter) {
	t.Helper()
	require.Eventually(t, func() bool {
		return gauge(t, sn, "clip_requests_in_flight") == 0 && gauge(t, sn, "clip_oldest_request_age_seconds") == 0
	}, time.Minute, time.Millisecond)
}

// gauge is the value of a metric that has no labels.
func gauge(t *testing.T, sn *Snapshotter, name string) float64 {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(sn.Collectors()...)
	families, err := registry.Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}
