package bucket

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

const ref = "registry.example.com/team/app:1"

var manifest = digest.FromString("manifest")

func location(t *testing.T, text string) *Location {
	t.Helper()
	l, err := Parse(text)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.Close()) })
	return l
}

func TestName(t *testing.T) {
	file := "sha256-" + manifest.Encoded() + ".clip"
	for text, want := range map[string]struct{ bucket, name string }{
		"s3://b":                                {"s3://b?", file},
		"s3://b/?region=r":                      {"s3://b?region=r", file},
		"s3://b/archives":                       {"s3://b?", "archives/" + file},
		"s3://b/archives/":                      {"s3://b?", "archives/" + file},
		"gs://b/x.clip":                         {"gs://b?", "x.clip"},
		"azblob://b/{{.Path}}-{{.Tag}}.clip":    {"azblob://b?", "team/app-1.clip"},
		"s3://b/{{.Domain}}/{{.Manifest}}.clip": {"s3://b?", "registry.example.com/" + file},
		"file:///":                              {"file:///?metadata=skip&no_tmp_dir=1", file},
		"file:///srv/archives":                  {"file:///srv/archives/?metadata=skip&no_tmp_dir=1", file},
		"file:///srv/a/{{.Path}}/x.clip":        {"file:///srv/a/?metadata=skip&no_tmp_dir=1", "team/app/x.clip"},
		"file:///srv/a-{{.Tag}}.clip":           {"file:///srv/?metadata=skip&no_tmp_dir=1", "a-1.clip"},
	} {
		l := location(t, text)
		require.Equal(t, want.bucket, l.url, text)
		got, err := l.Name(ref, manifest)
		require.NoError(t, err, text)
		require.Equal(t, want.name, got, text)
		require.Equal(t, strings.TrimSuffix(text, "?region=r"), l.String())
		require.Equal(t, strings.HasSuffix(text, "/x.clip") && !strings.Contains(text, "{{"), l.Fixed(), text)
	}
	for text, says := range map[string]string{
		"bucket/archives": "not a URL", "http://host/a": "s3, gs, azblob and file", "s3:///a": "names no bucket", "file://srv/a": "three slashes",
		"s3://b/{{.Size}}.clip": "Size", "s3://b/{{.clip": "unclosed", "s3://b?a=%": "invalid URL escape",
	} {
		_, err := Parse(text)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, text)
		require.ErrorContains(t, err, says, text)
		require.ErrorContains(t, err, strings.Split(text, "?")[0])
	}
}

func TestCheckNames(t *testing.T) {
	other := digest.FromString("another platform's")
	require.NoError(t, location(t, "s3://b/{{.Tag}}/{{.Manifest}}.clip").CheckNames(ref, []digest.Digest{manifest, other}))
	require.NoError(t, location(t, "s3://b/{{.Tag}}.clip").CheckNames(ref, []digest.Digest{manifest}))
	err := location(t, "file:///srv/{{.Tag}}.clip?a=b").CheckNames(ref, []digest.Digest{manifest, other})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "file:///srv/1.clip is the name of the archives of both")
}

func read(t *testing.T, l *Location) string {
	t.Helper()
	r, err := l.Open(t.Context(), ref, manifest)
	require.NoError(t, err)
	defer r.Close()
	b, err := io.ReadAll(r)
	require.NoError(t, err)
	return string(b)
}

func TestDirectory(t *testing.T) {
	dir, file := filepath.Join(t.TempDir(), "archives"), filepath.Join(t.TempDir(), "a.clip")
	l := location(t, "file://"+dir+"/{{.Path}}/{{.Tag}}.clip")
	_, err := l.Open(t.Context(), ref, manifest)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.NoDirExists(t, dir, "who reads makes no directory")
	for _, text := range []string{"first", "second, and longer", "3"} {
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		name, err := l.Put(t.Context(), file, ref, manifest)
		require.NoError(t, err)
		require.Equal(t, "team/app/1.clip", name)
		require.Equal(t, text, read(t, l))
	}
	left, err := os.ReadDir(filepath.Join(dir, "team/app"))
	require.NoError(t, err)
	require.Len(t, left, 1, "nothing but the archive")
	_, err = l.Open(t.Context(), "registry.example.com/team/other:1", manifest)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = l.Open(t.Context(), "", manifest)
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	_, err = l.Put(t.Context(), filepath.Join(dir, "none"), ref, manifest)
	require.ErrorIs(t, err, os.ErrNotExist)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.NoError(t, os.WriteFile(file, []byte("4"), 0o600))
	_, err = l.Put(ctx, file, ref, manifest)
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, "3", read(t, l))
}

// TestProviders sees what drivers ask for that have no server here, when they read. S3 has its tests against a real one,
// in tests/e2e.
func TestProviders(t *testing.T) {
	var asked string
	status := http.StatusOK
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.Method + " " + r.URL.Path
		w.Header().Set("Content-Length", "7")
		w.Header().Set("Last-Modified", "Mon, 02 Jan 2006 15:04:05 GMT")
		w.Header().Set("ETag", `"1"`)
		w.WriteHeader(status)
		_, _ = w.Write([]byte("archive"))
	}))
	t.Cleanup(server.Close)
	host := strings.TrimPrefix(server.URL, "http://")
	t.Setenv("STORAGE_EMULATOR_HOST", host)
	t.Setenv("AZURE_STORAGE_ACCOUNT", "account")
	t.Setenv("AZURE_STORAGE_KEY", "a2V5")
	for text, path := range map[string]string{
		"gs://b/a/x.clip": "GET /b/a/x.clip",
		"azblob://b/a/x.clip?protocol=http&localemu=true&domain=" + host: "GET /account/b/a/x.clip",
	} {
		status = http.StatusOK
		require.Equal(t, "archive", read(t, location(t, text)), text)
		require.Equal(t, path, asked)
		status = http.StatusNotFound
		_, err := location(t, text).Open(t.Context(), ref, manifest)
		require.ErrorIs(t, err, errdefs.ErrNotFound, text)
		require.ErrorContains(t, err, strings.Split(text, "?")[0])
	}
}
