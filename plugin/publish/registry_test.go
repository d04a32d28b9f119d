package publish

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
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
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// recorder is a registry that remembers requests.
type recorder struct {
	host string

	mu       sync.Mutex // guards requests
	requests []string
}

func startRegistry(t *testing.T, wrap func(http.Handler) http.Handler, opts ...registry.Option) *recorder {
	t.Helper()
	h := registry.New(append(opts, registry.Logger(log.New(io.Discard, "", 0)))...)
	if wrap != nil {
		h = wrap(h)
	}
	r := &recorder{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		r.requests = append(r.requests, req.Method+" "+req.URL.Path)
		r.mu.Unlock()
		h.ServeHTTP(w, req)
	}))
	t.Cleanup(s.Close)
	r.host = strings.TrimPrefix(s.URL, "http://")
	return r
}

// take returns the requests of a method since the last call.
func (r *recorder) take(methods ...string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []string
	for _, req := range r.requests {
		for _, m := range methods {
			if strings.HasPrefix(req, m+" ") {
				found = append(found, req)
			}
		}
	}
	r.requests = nil
	return found
}

func (r *recorder) get(t *testing.T, path string) (*http.Response, []byte) {
	t.Helper()
	resp, err := http.Get("http://" + r.host + path)
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp, b
}

// testArchive makes an image, pushes it unless host is empty, and writes its archive.
func testArchive(t *testing.T, host string) (*testutil.Image, string) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "f", Data: strings.Repeat("data", 1000)}))
	if host != "" {
		img.Push(t, host, "team/app")
	}
	path := filepath.Join(t.TempDir(), "app.clip")
	img.WriteArchive(t, path, "registry.example.com/team/app:1")
	return img, path
}

func TestPush(t *testing.T) {
	r := startRegistry(t, nil, registry.WithReferrersSupport(true))
	img, path := testArchive(t, r.host)
	r.take()

	id, n, err := Push(t.Context(), path, r.host+"/team/app:1")
	require.NoError(t, err)
	require.NotEmpty(t, r.take(http.MethodPut, http.MethodPost, http.MethodPatch))

	resp, raw := r.get(t, "/v2/team/app/manifests/"+id.String())
	require.Equal(t, ocispec.MediaTypeImageManifest, resp.Header.Get("Content-Type"))
	require.Equal(t, id, digest.FromBytes(raw))
	var m ocispec.Manifest
	require.NoError(t, json.Unmarshal(raw, &m))
	require.Equal(t, 2, m.SchemaVersion)
	require.Equal(t, ocispec.MediaTypeImageManifest, m.MediaType)
	require.Equal(t, archive.ArtifactType, m.ArtifactType)
	require.Equal(t, ocispec.MediaTypeEmptyJSON, m.Config.MediaType)
	require.Equal(t, ocispec.DescriptorEmptyJSON.Digest, m.Config.Digest)
	require.Equal(t, &ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, Digest: img.Descriptor.Digest, Size: img.Descriptor.Size,
	}, m.Subject)
	require.Len(t, m.Layers, 1)
	require.Equal(t, archive.MediaType, m.Layers[0].MediaType)
	require.Equal(t, n, m.Layers[0].Size)
	require.Equal(t, "image.clip", m.Layers[0].Annotations[ocispec.AnnotationTitle])
	require.Equal(t, "3", m.Layers[0].Annotations[archive.AnnotationRevision])
	_, config := r.get(t, "/v2/team/app/blobs/"+m.Config.Digest.String())
	require.Equal(t, "{}", string(config))

	_, blob := r.get(t, "/v2/team/app/blobs/"+m.Layers[0].Digest.String())
	require.Len(t, blob, int(n))
	dec, err := zstd.NewReader(nil)
	require.NoError(t, err)
	defer dec.Close()
	got, err := dec.DecodeAll(blob, nil)
	require.NoError(t, err)
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, digest.FromBytes(want), digest.FromBytes(got))
	parts, ok := archive.PartsOf(m.Layers[0].Annotations, n)
	require.True(t, ok, "workers fetch no more than they read")
	require.Equal(t, parts.Spans.Digest, digest.FromBytes(blob[parts.Spans.In:parts.Rest.In]))
	require.Equal(t, parts.Rest.Digest, digest.FromBytes(blob[parts.Rest.In:]))

	_, raw = r.get(t, "/v2/team/app/referrers/"+img.Descriptor.Digest.String())
	var index ocispec.Index
	require.NoError(t, json.Unmarshal(raw, &index))
	require.Len(t, index.Manifests, 1)
	require.Equal(t, id, index.Manifests[0].Digest)
}

func TestPushAgain(t *testing.T) {
	for name, referrers := range map[string]bool{"referrers API": true, "fallback tag": false} {
		t.Run(name, func(t *testing.T) {
			r := startRegistry(t, nil, registry.WithReferrersSupport(referrers))
			img, path := testArchive(t, r.host)
			first, n, err := Push(t.Context(), path, r.host+"/team/app:1")
			require.NoError(t, err)
			r.take()
			second, m, err := Push(t.Context(), path, r.host+"/team/app:1")
			require.NoError(t, err)
			require.Equal(t, first, second)
			require.Equal(t, n, m)
			require.Empty(t, r.take(http.MethodPost, http.MethodPatch), "no blob is uploaded again")

			tag := strings.Replace(img.Descriptor.Digest.String(), ":", "-", 1)
			resp, raw := r.get(t, "/v2/team/app/manifests/"+tag)
			if referrers {
				require.Equal(t, http.StatusNotFound, resp.StatusCode)
				return
			}
			var index ocispec.Index
			require.NoError(t, json.Unmarshal(raw, &index))
			require.Len(t, index.Manifests, 1, "the fallback tag lists the archive once")
			require.Equal(t, first, index.Manifests[0].Digest)
			require.Equal(t, archive.ArtifactType, index.Manifests[0].ArtifactType)
		})
	}
}

// TestPushRecorded says when the list was recorded, so that workers find the newest.
func TestPushRecorded(t *testing.T) {
	r := startRegistry(t, nil, registry.WithReferrersSupport(true))
	_, path := testArchive(t, r.host)
	a, err := archive.OpenFile(path)
	require.NoError(t, err)
	defer a.Close()
	img, err := a.Image()
	require.NoError(t, err)
	img.Prefetch = &archive.Prefetch{Recorded: time.Unix(1e9, 0), Spans: []archive.SpanRange{{Layer: 0, First: 0, Count: 1}}}
	recorded := filepath.Join(t.TempDir(), "recorded.clip")
	_, err = archive.WriteFile(recorded, img)
	require.NoError(t, err)
	for file, want := range map[string]string{path: "", recorded: "2001-09-09T01:46:40Z"} {
		id, _, err := Push(t.Context(), file, r.host+"/team/app:1")
		require.NoError(t, err)
		_, raw := r.get(t, "/v2/team/app/manifests/"+id.String())
		var m ocispec.Manifest
		require.NoError(t, json.Unmarshal(raw, &m))
		require.Equal(t, want, m.Annotations[ocispec.AnnotationCreated])
	}
}

func TestPushWithoutTheImage(t *testing.T) {
	r := startRegistry(t, nil)
	img, path := testArchive(t, "")
	_, _, err := Push(t.Context(), path, r.host+"/team/app:1")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorContains(t, err, img.Descriptor.Digest.String())
	require.ErrorContains(t, err, "push the image first")
	require.Empty(t, r.take(http.MethodPost, http.MethodPut, http.MethodPatch))
}

// TestPushWithoutTheLayers has an image in the registry whose layers are not, as a registry may have it after an
// interrupted copy. All that is missing is named, and nothing is written.
func TestPushWithoutTheLayers(t *testing.T) {
	for name, c := range map[string]struct {
		status int
		length string
		is     error
		says   []string
	}{
		"missing":    {status: http.StatusNotFound, length: "0", is: errdefs.ErrNotFound, says: []string{"is not whole", "push the image again"}},
		"other size": {status: http.StatusOK, length: "7", is: errdefs.ErrNotFound, says: []string{"it has 7 bytes there instead of"}},
		"refused":    {status: http.StatusForbidden, length: "0", is: errdefs.ErrPermissionDenied, says: []string{"log in"}},
	} {
		t.Run(name, func(t *testing.T) {
			var lost sync.Map // a request that nobody waits for any more may still be served
			r := startRegistry(t, func(h http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
					if _, ok := lost.Load(filepath.Base(req.URL.Path)); ok && req.Method == http.MethodHead {
						w.Header().Set("Content-Length", c.length)
						w.WriteHeader(c.status)
						return
					}
					h.ServeHTTP(w, req)
				})
			})
			t.Setenv("DOCKER_CONFIG", t.TempDir())
			img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "a", Data: "1"}), testutil.Tar(t, testutil.File{Name: "b", Data: "2"}), testutil.Tar(t, testutil.File{Name: "c", Data: "3"}))
			img.Push(t, r.host, "team/app")
			path := filepath.Join(t.TempDir(), "app.clip")
			img.WriteArchive(t, path, "registry.example.com/team/app:1")
			lost.Store(img.Layers[0].Digest.String(), nil)
			lost.Store(img.Layers[2].Digest.String(), nil)
			r.take()
			_, _, err := Push(t.Context(), path, r.host+"/team/app:1")
			require.ErrorIs(t, err, c.is)
			if c.status != http.StatusForbidden {
				c.says = append(c.says, img.Layers[0].Digest.String(), img.Layers[2].Digest.String())
				require.NotContains(t, err.Error(), img.Layers[1].Digest.String())
			}
			for _, text := range c.says {
				require.ErrorContains(t, err, text)
			}
			require.Empty(t, r.take(http.MethodPost, http.MethodPut, http.MethodPatch))
			lost.Clear()
			_, _, err = Push(t.Context(), path, r.host+"/team/app:1")
			require.NoError(t, err)
		})
	}
}

func TestCredentials(t *testing.T) {
	r := startRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if user, password, _ := req.BasicAuth(); user != "me" || password != "secret" {
				w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, req)
		})
	})
	_, path := testArchive(t, "")
	_, _, err := Push(t.Context(), path, r.host+"/team/app:1")
	require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
	require.ErrorContains(t, err, "log in")

	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	auth := base64.StdEncoding.EncodeToString([]byte("me:secret"))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, r.host, auth), 0o600))
	_, _, err = Push(t.Context(), path, r.host+"/team/app:1")
	require.ErrorIs(t, err, errdefs.ErrNotFound, "the credentials are good, the image is not there")
}

func TestRefusals(t *testing.T) {
	_, path := testArchive(t, "")
	_, _, err := Push(t.Context(), path, "UPPER/case")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)

	bad := filepath.Join(t.TempDir(), "bad.clip")
	require.NoError(t, os.WriteFile(bad, []byte("no archive"), 0o644))
	_, _, err = Push(t.Context(), bad, "localhost:1/app:1")
	require.ErrorIs(t, err, archive.ErrNotArchive)

	_, _, err = Push(t.Context(), path, "127.0.0.1:1/app:1")
	require.ErrorIs(t, err, errdefs.ErrUnavailable, "nobody listens on port 1")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err = Push(ctx, path, "127.0.0.1:1/app:1")
	require.ErrorIs(t, err, context.Canceled)
}
