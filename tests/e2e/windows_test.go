package e2e

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// windowsWorld has an image most of whose seek points need a window, its archive, and a daemon that fetches what is read.
func windowsWorld(t *testing.T) (w *world, blob string) {
	w = emptyWorld(t, "[fill]\nmode = 'off'\n")
	layout, err := images.Windows(w.lab.Path("windows"))
	require.NoError(t, err)
	file := w.lab.Path("windows.tar")
	require.NoError(t, layout.WriteTar(file))
	w.ctr(w.builder, "image", "import", "--no-unpack", file)
	w.publish(images.WindowsName)
	w.index(images.WindowsName)
	for _, r := range w.pull(w.worker, lazy, w.ref(images.WindowsName)) {
		if r.Status == http.StatusPartialContent {
			_, blob, _ = strings.Cut(r.Path, "/blobs/")
		}
	}
	require.NotEmpty(t, blob, "the archive was fetched in parts")
	return w, blob
}

// requireText reads a file of the image.
func (w *world) requireText(root string, i int) {
	w.Helper()
	path, want := images.WindowsFile(i)
	got, err := os.ReadFile(filepath.Join(root, path))
	require.NoError(w, err)
	require.True(w, want == string(got), path)
}

// TestWindows leaves windows of seek points in the registry until decompression starts there. What has come stays, over
// kill -9 and damage.
func TestWindows(t *testing.T) {
	t.Parallel()
	w, blob := windowsWorld(t)
	info, err := os.Stat(w.registry.BlobPath(blob))
	require.NoError(t, err)
	pulled := w.registry.Requests().Gets(blob)
	require.Less(t, pulled.Sent(), info.Size()/3, "most of an archive are windows, and what CLIP reads")
	windows := func() int { return len(w.registry.Requests().Gets(blob)) }

	root := w.view(w.worker, lazy, w.ref(images.WindowsName))
	w.registry.Reset()
	w.requireText(root, 7)
	first := windows()
	require.Positive(t, first)
	require.Less(t, w.registry.Requests().Gets(blob).Sent(), info.Size()/2)
	w.requireText(root, 8)

	w.daemon.Kill()
	w.damage(damage{"windows", "layers/*/windows", cutHalf})
	require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
	for i := images.WindowsFiles - 1; i >= 0; i -= 3 {
		w.requireText(root, i)
	}
	require.Greater(t, windows(), first)

	w.daemon.Kill()
	w.damage(damage{"points", "layers/*/points", flipBits})
	require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
	for i := range images.WindowsFiles {
		w.requireText(root, i)
	}
	require.Contains(t, w.daemon.Log(), "a layer's seek points were damaged on disk")
}

// TestWindowsGone has an archive removed after the pull, or altered: the image can be read all the same.
func TestWindowsGone(t *testing.T) {
	for name, fault := range map[string]harness.Fault{
		"removed": func(rw http.ResponseWriter, _ *http.Request, _ http.Handler) { rw.WriteHeader(http.StatusNotFound) },
		"altered": func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
			next.ServeHTTP(&flipping{ResponseWriter: rw}, r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, blob := windowsWorld(t)
			w.registry.Misbehave(func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
				if strings.HasSuffix(r.URL.Path, blob) {
					fault(rw, r, next)
					return
				}
				next.ServeHTTP(rw, r)
			})
			root := w.view(w.worker, lazy, w.ref(images.WindowsName))
			for i := images.WindowsFiles - 1; i >= 0; i-- {
				w.requireText(root, i)
			}
			require.Contains(t, w.daemon.Log(), "windows cannot be fetched")
			w.registry.Misbehave(nil)
			require.NotEmpty(t, w.registry.Requests().Gets(blob), "the fault was met")
		})
	}
}

// flipping alters every byte of a body.
type flipping struct{ http.ResponseWriter }

func (f *flipping) Write(p []byte) (int, error) {
	b := bytes.Clone(p)
	for i := range b {
		b[i] ^= 0xff
	}
	return f.ResponseWriter.Write(b)
}
