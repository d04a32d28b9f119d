package clipindex

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/plugin/index"
)

const ref = "registry.example.com/team/app:1"

func testImage(t *testing.T) (*testutil.Image, index.Image) {
	t.Helper()
	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "a", Data: "first"}), testutil.Tar(t, testutil.File{Name: "b", Data: "second"}))
	return img, index.Image{StorageRef: ref, Platform: img.Platform, Descriptor: img.Descriptor, Manifest: img.Manifest, Config: img.Config, Layers: img.Layers}
}

type recorder struct {
	mu   sync.Mutex // guards the fields below
	read map[int]int64
	done []int
}

func (r *recorder) Read(i int, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.read[i] += n
}

func (r *recorder) Done(i int, _ index.Outcome) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.done = append(r.done, i)
}

func TestWriteFile(t *testing.T) {
	img, what := testImage(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "a.clip")
	r := &recorder{read: map[int]int64{}}
	require.NoError(t, WriteFile(t.Context(), path, img.Blobs, what, r))
	require.Equal(t, []int{0, 1}, r.done)
	for i, l := range img.Layers {
		require.Equal(t, l.Size, r.read[i])
	}
	m, err := clip.NewClipArchiver().ExtractMetadata(path)
	require.NoError(t, err)
	require.NotNil(t, m.Get("/a"))
	require.NotNil(t, m.Get("/b"))
	info := m.StorageInfo.(common.OCIStorageInfo)
	require.Equal(t, []string{"registry.example.com", "team/app", "1"}, []string{info.RegistryURL, info.Repository, info.Reference})
	require.Equal(t, ref, info.ImageMetadata.Name, "not where it was read from")
	require.Equal(t, img.Descriptor.Digest.String(), info.ImageMetadata.Digest)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1)
}

// The archive has the reference that CLIP can mount by, and the image's name is the one that was given.
func TestWriteFileReference(t *testing.T) {
	img, what := testImage(t)
	for given, want := range map[string][]string{
		"alpine": {"index.docker.io", "library/alpine", "latest"},
		"registry.example.com/app:1@" + img.Descriptor.Digest.String(): {"registry.example.com", "app", "1"},
		"registry.example.com/app@" + img.Descriptor.Digest.String():   {"registry.example.com", "app", img.Descriptor.Digest.String()},
	} {
		path := filepath.Join(t.TempDir(), "a.clip")
		what.StorageRef = given
		require.NoError(t, WriteFile(t.Context(), path, img.Blobs, what, nil))
		m, err := clip.NewClipArchiver().ExtractMetadata(path)
		require.NoError(t, err)
		info := m.StorageInfo.(common.OCIStorageInfo)
		require.Equal(t, want, []string{info.RegistryURL, info.Repository, info.Reference}, given)
		require.Equal(t, given, info.ImageMetadata.Name)
	}
	what.StorageRef = "Not A Ref"
	require.ErrorContains(t, WriteFile(t.Context(), filepath.Join(t.TempDir(), "a.clip"), img.Blobs, what, nil), "Not A Ref")
}

var errBroken = errors.New("the disk is broken")

type broken struct{ testutil.Blobs }

func (b broken) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	ra, err := b.Blobs.ReaderAt(ctx, desc)
	return brokenReader{ra}, err
}

type brokenReader struct{ content.ReaderAt }

func (b brokenReader) ReadAt([]byte, int64) (int, error) { return 0, errBroken }

func TestWriteFileFails(t *testing.T) {
	img, what := testImage(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "a.clip")
	require.NoError(t, os.WriteFile(path, []byte("old"), 0o600))
	keeps := func() {
		t.Helper()
		b, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, "old", string(b))
		left, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Len(t, left, 1)
	}
	require.ErrorIs(t, WriteFile(t.Context(), path, broken{img.Blobs}, what, nil), errBroken)
	keeps()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, WriteFile(ctx, path, img.Blobs, what, nil), context.Canceled)
	keeps()

	gone := testutil.Blobs{}
	err := WriteFile(t.Context(), path, gone, what, nil)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorContains(t, err, "layer 1")
	keeps()

	plain := what
	plain.Layers = []ocispec.Descriptor{img.Blobs.Add(ocispec.MediaTypeImageLayer, testutil.Tar(t, testutil.File{Name: "f"}))}
	m := ocispec.Manifest{Config: ocispec.Descriptor{Digest: "sha256:x"}}
	require.NoError(t, json.Unmarshal(img.Manifest, &m))
	m.Layers = plain.Layers
	plain.Manifest = testutil.JSON(t, m)
	plain.Descriptor = img.Blobs.Add(ocispec.MediaTypeImageManifest, plain.Manifest)
	require.ErrorContains(t, WriteFile(t.Context(), path, img.Blobs, plain, nil), "gzip layers only")
	keeps()
	require.Error(t, WriteFile(t.Context(), filepath.Join(dir, "none", "a.clip"), img.Blobs, what, nil))
}

// The view shows the image and nothing else, and only to those who know its name.
func TestView(t *testing.T) {
	img, what := testImage(t)
	other := img.Blobs.Add("", []byte("of another image"))
	v := newView(img.Blobs, what, nil)
	require.NotEqual(t, v.name, newView(img.Blobs, what, nil).name)
	server := httptest.NewServer(v)
	t.Cleanup(server.Close)
	ask := func(method, path string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, server.URL+path, nil)
		require.NoError(t, err)
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, string(b)
	}
	at := "/v2/" + v.name
	for path, want := range map[string]string{
		"/v2/": "", at + "/manifests/" + img.Descriptor.Digest.String(): string(img.Manifest), at + "/blobs/" + v.config.String(): string(img.Config),
		at + "/blobs/" + img.Layers[1].Digest.String(): string(img.Blobs[img.Layers[1].Digest]),
	} {
		status, got := ask(http.MethodGet, path)
		require.Equal(t, http.StatusOK, status, path)
		require.Equal(t, want, got, path)
		status, got = ask(http.MethodHead, path)
		require.Equal(t, http.StatusOK, status, path)
		require.Empty(t, got)
	}
	for _, path := range []string{
		"/", "/v2/x/manifests/" + img.Descriptor.Digest.String(), at + "/blobs/" + other.Digest.String(), at + "/blobs/", at + "/manifests/latest", at + "/tags/list",
	} {
		status, _ := ask(http.MethodGet, path)
		require.Equal(t, http.StatusNotFound, status, path)
	}
	status, _ := ask(http.MethodPost, at+"/blobs/uploads/")
	require.Equal(t, http.StatusMethodNotAllowed, status)
}

// TestServe has the view be reachable from this machine alone, and not for longer than it is needed.
func TestServe(t *testing.T) {
	img, what := testImage(t)
	where, stop, err := newView(img.Blobs, what, nil).serve(t.Context())
	require.NoError(t, err)
	address, _, _ := strings.Cut(where, "/")
	host, _, err := net.SplitHostPort(address)
	require.NoError(t, err)
	require.True(t, net.ParseIP(host).IsLoopback(), address)
	conn, err := net.Dial("tcp", address)
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	stop()
	_, err = net.Dial("tcp", address)
	require.ErrorIs(t, err, unix.ECONNREFUSED)
}
