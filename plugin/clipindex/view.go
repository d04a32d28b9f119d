package clipindex

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/plugin/index"
)

// view is a registry that holds one image and cannot be written to. It follows
// the OCI distribution specification as far as pulling by digest goes.
type view struct {
	name     string // of the repository
	provider content.Provider
	img      index.Image
	progress index.Progress // may be nil
	config   digest.Digest

	mu     sync.Mutex // guards the fields below
	failed error
}

func newView(p content.Provider, img index.Image, progress index.Progress) *view {
	v := &view{name: secret(), provider: p, img: img, progress: progress}
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Manifest, &m); err == nil {
		v.config = m.Config.Digest
	}
	return v
}

// failure returns why a blob could not be served, if one could not: whoever
// asked has only seen a broken connection.
func (v *view) failure() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.failed
}

// ServeHTTP implements http.Handler.
func (v *view) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	if r.URL.Path == "/v2/" {
		return
	}
	prefix := "/v2/" + v.name
	what := strings.TrimPrefix(r.URL.Path, prefix)
	switch {
	case what == r.URL.Path:
	case what == "/manifests/"+v.img.Descriptor.Digest.String():
		w.Header().Set("Content-Type", v.img.Descriptor.MediaType)
		w.Header().Set("Docker-Content-Digest", v.img.Descriptor.Digest.String())
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(v.img.Manifest))
		return
	case what == "/blobs/"+v.config.String():
		v.serveBlob(w, r, bytes.NewReader(v.img.Config))
		return
	case strings.HasPrefix(what, "/blobs/"):
		for i, l := range v.img.Layers {
			if what == "/blobs/"+l.Digest.String() {
				v.serveLayer(w, r, i)
				return
			}
		}
	}
	w.WriteHeader(http.StatusNotFound)
}

func (v *view) serveBlob(w http.ResponseWriter, r *http.Request, blob io.ReadSeeker) {
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, blob)
}

func (v *view) serveLayer(w http.ResponseWriter, r *http.Request, i int) {
	ra, err := v.provider.ReaderAt(r.Context(), v.img.Layers[i])
	if err != nil {
		v.fail(i, err)
		status := http.StatusInternalServerError
		if errdefs.IsNotFound(err) {
			status = http.StatusNotFound
		}
		w.WriteHeader(status)
		return
	}
	defer ra.Close()
	v.serveBlob(w, r, &watched{io.NewSectionReader(ra, 0, ra.Size()), v, i})
}

func (v *view) fail(i int, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.failed == nil {
		v.failed = fmt.Errorf("layer %d (%s): %w", i+1, v.img.Layers[i].Digest, err)
	}
}

// watched is a layer that tells how much of it was read.
type watched struct {
	io.ReadSeeker
	view  *view
	layer int
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.ReadSeeker.Read(p)
	if n > 0 && w.view.progress != nil {
		w.view.progress.Read(w.layer, int64(n))
	}
	if err != nil && !errors.Is(err, io.EOF) {
		w.view.fail(w.layer, err)
	}
	return n, err
}
