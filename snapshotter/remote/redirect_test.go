package remote

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
)

// presigned is a registry that redirects to storage by URLs that end.
type presigned struct {
	*host
	storage *host
	current atomic.Int32 // the signature that is good
	once    bool         // each is good for one request
}

func startPresigned(t *testing.T) *presigned {
	t.Helper()
	p := &presigned{}
	p.storage = start(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("X-Signature") != fmt.Sprint("secret", p.current.Load()) {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		if p.once {
			p.current.Add(1)
		}
		serveBlob(w, r)
	})
	p.host = start(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, fmt.Sprintf("http://%s/data?X-Signature=secret%d", p.storage.name, p.current.Load()), http.StatusTemporaryRedirect)
	})
	return p
}

// TestRedirectIsKept asks the registry once, and anew when the URL has ended.
func TestRedirectIsKept(t *testing.T) {
	p := startPresigned(t)
	c := newClient(t)
	get := func() {
		t.Helper()
		got, err := read(t.Context(), c, []string{p.ref()}, 10, 5)
		require.NoError(t, err)
		require.Equal(t, "abcde", got)
	}
	for range 3 {
		get()
	}
	require.Len(t, p.seen(), 1)
	require.Len(t, p.storage.seen(), 3)

	c.mu.Lock()
	for _, l := range c.memory.redirects {
		l.since = time.Now().Add(-time.Hour)
	}
	c.mu.Unlock()
	p.current.Add(1)
	get()
	require.Len(t, p.seen(), 2)
	require.Len(t, p.storage.seen(), 5, "one was refused")
	get()
	require.Len(t, p.seen(), 2)
}

// TestRedirectForOneRequest is not tried in vain each time.
func TestRedirectForOneRequest(t *testing.T) {
	p := startPresigned(t)
	p.once = true
	c := newClient(t)
	for range 5 {
		_, err := read(t.Context(), c, []string{p.ref()}, 10, 5)
		require.NoError(t, err)
	}
	require.Len(t, p.seen(), 5)
	require.Len(t, p.storage.seen(), 6)
}

// TestRedirectsThatEndNowhere are bounded.
func TestRedirectsThatEndNowhere(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	loop := start(t, nil)
	loop.handle = func(w http.ResponseWriter, r *http.Request) {
		if len(loop.seen()) > 4*(maxRedirects+1) {
			cancel() // it has been followed four times
		}
		http.Redirect(w, r, r.URL.Path+"x", http.StatusFound)
	}
	began := time.Now()
	_, err := read(ctx, newClient(t), []string{loop.ref()}, 0, 3)
	require.ErrorContains(t, err, "redirects")
	require.GreaterOrEqual(t, len(loop.seen()), maxRedirects+1)
	require.Less(t, len(loop.seen()), 10*(maxRedirects+1))
	require.GreaterOrEqual(t, time.Since(began), (1+2+4)*firstPause/2, "it is not hammered")

	for name, location := range map[string]string{"none": "", "not a URL": "http://%zz/", "no host": "http:///x", "file": "file:///etc/passwd"} {
		t.Run(name, func(t *testing.T) {
			h := start(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Location", location)
				w.WriteHeader(http.StatusFound)
			})
			_, err := readInVain(t.Context(), newClient(t), []string{h.ref()}, 0, 3)
			require.ErrorIs(t, err, errdefs.ErrUnavailable)
		})
	}
}

// TestLongHeaders are an error, not memory.
func TestLongHeaders(t *testing.T) {
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Long", strings.Repeat("x", 2*maxHeader))
		serveBlob(w, r)
	})
	_, err := readInVain(t.Context(), newClient(t), []string{h.ref()}, 0, 3)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
}

// TestNoSecretsTold has errors and logs of everything that knows a secret.
func TestNoSecretsTold(t *testing.T) {
	var logged bytes.Buffer
	logger := logrus.New()
	logger.SetOutput(&logged)
	logger.SetLevel(logrus.TraceLevel)
	ctx := log.WithLogger(t.Context(), logrus.NewEntry(logger))
	const secret = "s3cr3t"
	forbids, asks := start(t, status(http.StatusForbidden)), start(t, status(http.StatusUnauthorized))
	for name, location := range map[string]string{
		"storage forbids":    "http://" + forbids.name + "/data?X-Amz-Signature=" + secret,
		"storage asks":       "http://me:" + secret + "@" + asks.name + "/data?X-Amz-Signature=" + secret,
		"storage is gone":    "http://127.0.0.1:1/data?X-Amz-Signature=" + secret,
		"storage with login": "http://me:" + secret + "@127.0.0.1:1/data",
		"odd query":          "http://127.0.0.1:1/data?a=\"&sig=" + secret,
		"no address":         "http://[::1/data?sig=" + secret,
	} {
		t.Run(name, func(t *testing.T) {
			logged.Reset()
			h := start(t, func(w http.ResponseWriter, r *http.Request) {
				if user, _, ok := r.BasicAuth(); !ok || user != "me" {
					w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				w.Header().Set("Location", location)
				w.WriteHeader(http.StatusTemporaryRedirect)
			})
			registry := "registry.example.com"
			dir := hostsFile(t, registry, fmt.Sprintf("server = \"http://%s\"\n[header]\nX-Key = %q\n", h.name, "key "+secret))
			c := newClient(t, dir)
			dockerConfig(t, login(h.name))
			_, err := readInVain(ctx, c, []string{registry + "/team/app:1"}, 0, 3)
			require.Error(t, err)
			require.Equal(t, "key "+secret, h.seen()[0].Header.Get("X-Key"))
			require.NotContains(t, err.Error(), secret)

			f, err := c.Fetcher(ctx, registry+"/team/app:1")
			require.NoError(t, err)
			rc, err := f.Fetch(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1})
			if err == nil {
				_, err = rc.Read(make([]byte, 10))
			}
			require.Error(t, err)
			require.NotContains(t, err.Error(), secret)
			require.NotContains(t, logged.String(), secret)
			require.NotContains(t, logged.String(), "bWU6") // me:, encoded
		})
	}
	t.Run("token server", func(t *testing.T) {
		h := start(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://me:`+secret+`@127.0.0.1:1/token?key=`+secret+`",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		})
		_, err := readInVain(ctx, newClient(t), []string{h.ref()}, 0, 3)
		require.ErrorIs(t, err, errdefs.ErrUnavailable)
		require.NotContains(t, err.Error(), secret)
	})
}

// TestStorageAsksForCredentials redirects to a storage that sends whoever comes to a token server of its own: it gets
// nothing that is the registry's.
func TestStorageAsksForCredentials(t *testing.T) {
	var tokens atomic.Int32
	var storage *host
	storage = start(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			tokens.Add(1)
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, storage.name))
		w.WriteHeader(http.StatusUnauthorized)
	})
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://"+storage.name+"/data", http.StatusTemporaryRedirect)
	})
	c := newClient(t)
	dockerConfig(t, login(h.name))
	_, err := read(t.Context(), c, []string{h.ref()}, 0, 3)
	require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
	f, err := c.Fetcher(t.Context(), h.ref())
	require.NoError(t, err)
	rc, err := f.Fetch(t.Context(), ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("x"), Size: 1})
	if err == nil {
		_, err = rc.Read(make([]byte, 10))
	}
	require.Error(t, err)
	require.NotEmpty(t, storage.seen())
	require.Zero(t, tokens.Load())
	for _, r := range storage.seen() {
		require.Empty(t, r.Header.Get("Authorization"))
	}
}

// TestForeignAddresses has a descriptor that names an address: it is not asked.
func TestForeignAddresses(t *testing.T) {
	foreign, h := start(t, serveBlob), start(t, status(http.StatusNotFound))
	f, err := newClient(t).Fetcher(t.Context(), h.ref())
	require.NoError(t, err)
	for _, mediaType := range []string{ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageManifest} {
		rc, err := f.Fetch(t.Context(), ocispec.Descriptor{MediaType: mediaType, Digest: testDigest, Size: 1, URLs: []string{"http://" + foreign.name + "/blob"}})
		if err == nil {
			_, err = rc.Read(make([]byte, 10))
		}
		require.Error(t, err)
	}
	require.NotEmpty(t, h.seen())
	require.Empty(t, foreign.seen())
}
