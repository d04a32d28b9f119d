package remote

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	cliconfig "github.com/docker/cli/cli/config"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

const testBlob = "0123456789abcdefghijklmnopqrstuvwxyz"

var testDigest = digest.FromString(testBlob)

// host is a server that remembers requests.
type host struct {
	name   string // host:port
	handle http.HandlerFunc

	mu       sync.Mutex // guards requests
	requests []*http.Request
}

func start(t *testing.T, h http.HandlerFunc) *host {
	t.Helper()
	srv := &host{handle: h}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		srv.mu.Lock()
		srv.requests = append(srv.requests, r.Clone(context.Background()))
		srv.mu.Unlock()
		srv.handle(w, r)
	}))
	t.Cleanup(s.Close)
	srv.name = strings.TrimPrefix(s.URL, "http://")
	return srv
}

func (h *host) seen() []*http.Request {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]*http.Request(nil), h.requests...)
}

func (h *host) ref() string { return h.name + "/team/app:1" }

// serveBlob answers ranges of the blob.
func serveBlob(w http.ResponseWriter, r *http.Request) {
	http.ServeContent(w, r, "", time.Time{}, strings.NewReader(testBlob))
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

// firstly answers n requests with h, the rest with serveBlob.
func firstly(n int, h http.HandlerFunc) http.HandlerFunc {
	var mu sync.Mutex
	return func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		n--
		now := n
		mu.Unlock()
		if now >= 0 {
			h(w, r)
			return
		}
		serveBlob(w, r)
	}
}

// read opens and reads a range, as slow as the machine may be.
func read(ctx context.Context, c *Client, sources []string, off, n int64) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	rc, err := c.Open(ctx, sources, testDigest, off, n)
	if err != nil {
		return "", err
	}
	defer rc.Close()
	b, err := io.ReadAll(rc)
	return string(b), err
}

// readInVain is read where an error is no surprise, so that what is tried again
// does not take long. Where the time ended before somebody answered, which is
// nobody's word, there is more of it.
func readInVain(ctx context.Context, c *Client, sources []string, off, n int64) (text string, err error) {
	for _, limit := range []time.Duration{2 * time.Second, 20 * time.Second} {
		within, cancel := context.WithTimeout(ctx, limit)
		text, err = read(within, c, sources, off, n)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			break
		}
	}
	return text, err
}

// newClient keeps the user's docker config out of the test. It has all the patience
// that a busy machine needs, also for a host that has failed before, which gets a
// fifth of it.
func newClient(t *testing.T, configPath ...string) *Client {
	t.Helper()
	dockerConfig(t, "{}")
	return New(Options{ConfigPath: configPath, ConnectTimeout: time.Minute, SilenceTimeout: time.Minute})
}

// newImpatientClient is newClient where somebody says nothing and has to be given up:
// late enough for nobody else to be given up with him, however busy the machine is.
func newImpatientClient(t *testing.T, configPath ...string) *Client {
	t.Helper()
	dockerConfig(t, "{}")
	return New(Options{ConfigPath: configPath, ConnectTimeout: impatience, SilenceTimeout: impatience})
}

const impatience = 6 * time.Second

func dockerConfig(t *testing.T, content string) {
	t.Helper()
	dir, before := t.TempDir(), cliconfig.Dir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(content), 0o600))
	t.Setenv("DOCKER_CONFIG", dir)
	cliconfig.SetDir(dir)
	t.Cleanup(func() { cliconfig.SetDir(before) })
}

func TestRange(t *testing.T) {
	h := start(t, serveBlob)
	got, err := read(t.Context(), newClient(t), []string{h.ref()}, 10, 5)
	require.NoError(t, err)
	require.Equal(t, "abcde", got)
	require.Len(t, h.seen(), 1)
	r := h.seen()[0]
	require.Equal(t, http.MethodGet, r.Method)
	require.Equal(t, "/v2/team/app/blobs/"+testDigest.String(), r.URL.Path)
	require.Empty(t, r.URL.RawQuery)
	require.Equal(t, "bytes=10-14", r.Header.Get("Range"))
	require.Equal(t, []string{"identity"}, r.Header["Accept-Encoding"])
}

// again is any number of tries but one.
const again = -1

// shortRanges sends three bytes at most.
func shortRanges(w http.ResponseWriter, r *http.Request) {
	var off, last int
	_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &off, &last)
	r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, min(last, off+2)))
	serveBlob(w, r)
}

// TestAnswers has one source that answers every request alike.
func TestAnswers(t *testing.T) {
	partial := func(rng, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", rng)
			w.WriteHeader(http.StatusPartialContent)
			_, _ = io.WriteString(w, body)
		}
	}
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   string
		is     error
		tries  int
	}{
		"range":                 {answer: partial("bytes 10-14/36", "abcde"), want: "abcde", tries: 1},
		"range, unknown total":  {answer: partial("bytes 10-14/*", "abcde"), want: "abcde", tries: 1},
		"range, longer body":    {answer: partial("bytes 10-14/36", "abcdefgh"), want: "abcde", tries: 1},
		"range, other start":    {answer: partial("bytes 0-4/36", "01234"), is: errdefs.ErrDataLoss, tries: maxWrong},
		"range, longer":         {answer: partial("bytes 10-19/36", "abcdefghij"), is: errdefs.ErrDataLoss, tries: maxWrong},
		"range, shorter":        {answer: shortRanges, want: "abcde", tries: 2},
		"range, blob too short": {answer: partial("bytes 10-12/13", "abc"), is: errdefs.ErrOutOfRange, tries: 1},
		"range, none said":      {answer: partial("", "abcde"), is: errdefs.ErrDataLoss, tries: maxWrong},
		"range, short body":     {answer: partial("bytes 10-14/36", "abc"), is: errdefs.ErrDataLoss, tries: 1 + maxWrong},
		"whole":                 {answer: func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, testBlob) }, want: "abcde", tries: 1},
		"whole, ends inside":    {answer: func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, testBlob[:12]) }, is: errdefs.ErrOutOfRange, tries: 1},
		"whole, ends before":    {answer: func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, testBlob[:5]) }, is: errdefs.ErrOutOfRange, tries: 1},
		"not found":             {answer: status(http.StatusNotFound), is: errdefs.ErrNotFound, tries: 1},
		"gone":                  {answer: status(http.StatusGone), is: errdefs.ErrNotFound, tries: 1},
		"forbidden":             {answer: status(http.StatusForbidden), is: errdefs.ErrPermissionDenied, tries: 1},
		"beyond the end":        {answer: status(http.StatusRequestedRangeNotSatisfiable), is: errdefs.ErrOutOfRange, tries: 1},
		"busy":                  {answer: status(http.StatusTooManyRequests), is: errdefs.ErrResourceExhausted, tries: again},
		"broken":                {answer: status(http.StatusInternalServerError), is: errdefs.ErrUnavailable, tries: again},
		"503 once":              {answer: firstly(1, status(http.StatusServiceUnavailable)), want: "abcde", tries: 2},
		"wrong range once":      {answer: firstly(1, partial("bytes 0-4/36", "01234")), want: "abcde", tries: 2},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			h := start(t, nil)
			h.handle = func(w http.ResponseWriter, r *http.Request) {
				if c.tries == again && len(h.seen()) > 1 {
					cancel() // it would be asked for as long as there is time
				}
				c.answer(w, r)
			}
			got, err := read(ctx, newClient(t), []string{h.ref()}, 10, 5)
			if c.tries == again {
				require.Greater(t, len(h.seen()), 1)
			} else {
				require.Len(t, h.seen(), c.tries)
			}
			if c.is != nil {
				require.ErrorIs(t, err, c.is)
				return
			}
			require.NoError(t, err)
			require.Equal(t, c.want, got)
		})
	}
}

func TestSources(t *testing.T) {
	c := newClient(t)
	good, absent := start(t, serveBlob), start(t, status(http.StatusNotFound))
	got, err := read(t.Context(), c, []string{absent.ref(), good.ref()}, 0, 3)
	require.NoError(t, err)
	require.Equal(t, "012", got)
	require.Len(t, absent.seen(), 1)

	_, err = read(t.Context(), c, []string{good.ref(), absent.ref()}, 0, 3)
	require.NoError(t, err)
	require.Len(t, absent.seen(), 1, "the first source answered")

	_, err = read(t.Context(), c, nil, 0, 3)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = read(t.Context(), c, []string{"/app:1"}, 0, 3)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)

	// One of the two may answer later, the other has said no.
	broken := start(t, firstly(1, status(http.StatusBadGateway)))
	got, err = read(t.Context(), c, []string{absent.ref(), broken.ref()}, 0, 3)
	require.NoError(t, err)
	require.Equal(t, "012", got)
	require.Len(t, absent.seen(), 2)
}

func TestNobodyListens(t *testing.T) {
	h := start(t, serveBlob)
	_, err := read(t.Context(), newClient(t), []string{"127.0.0.1:1/team/app:1", h.ref()}, 0, 3)
	require.NoError(t, err)
}

func TestCancelEndsTheWait(t *testing.T) {
	h := start(t, status(http.StatusServiceUnavailable))
	cause := errors.New("no longer wanted")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(200*time.Millisecond, func() { cancel(cause) })
	begin := time.Now()
	_, err := read(ctx, newClient(t), []string{h.ref()}, 0, 3)
	require.ErrorIs(t, err, cause)
	require.Less(t, time.Since(begin), 30*time.Second, "it would go on for longer")
}

// bearer is a registry and its token server, which accepts user and secret.
type bearer struct {
	*host
	tokens *host

	mu    sync.Mutex // guards token
	token string     // the one that is valid
}

func startBearer(t *testing.T, challenge string) *bearer {
	t.Helper()
	b := &bearer{token: "t1"}
	b.tokens = start(t, func(w http.ResponseWriter, r *http.Request) {
		if user, secret, _ := r.BasicAuth(); user != "me" || secret != "secret" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		fmt.Fprintf(w, `{"token":%q,"expires_in":600}`, b.token)
	})
	b.host = start(t, func(w http.ResponseWriter, r *http.Request) {
		b.mu.Lock()
		valid := r.Header.Get("Authorization") == "Bearer "+b.token
		b.mu.Unlock()
		if valid {
			serveBlob(w, r)
			return
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="test",scope="repository:team/app:pull"%s`, b.tokens.name, challenge))
		w.WriteHeader(http.StatusUnauthorized)
	})
	return b
}

func (b *bearer) revoke() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.token += "'"
}

func login(registry string) string {
	return fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, registry, base64.StdEncoding.EncodeToString([]byte("me:secret")))
}

func TestBearerToken(t *testing.T) {
	b := startBearer(t, "")
	c := newClient(t)
	_, err := read(t.Context(), c, []string{b.ref()}, 10, 5)
	require.ErrorIs(t, err, errdefs.ErrPermissionDenied, "nobody is logged in")
	require.Len(t, b.seen(), 1)
	require.Len(t, b.tokens.seen(), 1)

	dockerConfig(t, login(b.name))
	var asked []*http.Request
	for range 3 {
		got, err := read(t.Context(), c, []string{b.ref()}, 10, 5)
		require.NoError(t, err, "a login takes effect without a restart")
		require.Equal(t, "abcde", got)
		if asked == nil {
			asked = b.tokens.seen()
		}
	}
	require.Len(t, b.tokens.seen(), len(asked), "the token is kept")
	require.Equal(t, "test", asked[len(asked)-1].URL.Query().Get("service"))
	require.Contains(t, asked[len(asked)-1].URL.Query()["scope"], "repository:team/app:pull")
}

// TestTokenServerFails is a passing failure: it must not be remembered.
func TestTokenServerFails(t *testing.T) {
	h := start(t, nil)
	fails := make(chan struct{}, 1)
	fails <- struct{}{}
	tokens := start(t, func(w http.ResponseWriter, _ *http.Request) {
		select {
		case <-fails:
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			_, _ = io.WriteString(w, `{"token":"t"}`)
		}
	})
	h.handle = func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "Bearer t" {
			serveBlob(w, r)
			return
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="test"`, tokens.name))
		w.WriteHeader(http.StatusUnauthorized)
	}
	got, err := read(t.Context(), newClient(t), []string{h.ref()}, 10, 5)
	require.NoError(t, err)
	require.Equal(t, "abcde", got)
}

func TestRevokedToken(t *testing.T) {
	for name, challenge := range map[string]string{"with a reason": `,error="invalid_token"`, "without": ""} {
		t.Run(name, func(t *testing.T) {
			b := startBearer(t, challenge)
			dockerConfig(t, login(b.name))
			c := New(Options{})
			for range 3 {
				got, err := read(t.Context(), c, []string{b.ref()}, 10, 5)
				require.NoError(t, err)
				require.Equal(t, "abcde", got)
				b.revoke()
			}
		})
	}
}

func TestBasicAuth(t *testing.T) {
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		if user, secret, _ := r.BasicAuth(); user != "me" || secret != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		serveBlob(w, r)
	})
	c := newClient(t)
	_, err := read(t.Context(), c, []string{h.ref()}, 0, 3)
	require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
	dockerConfig(t, login(h.name))
	got, err := read(t.Context(), c, []string{h.ref()}, 0, 3)
	require.NoError(t, err)
	require.Equal(t, "012", got)
}

func TestRedirectDropsCredentials(t *testing.T) {
	store := start(t, serveBlob)
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		if _, _, ok := r.BasicAuth(); !ok {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.Redirect(w, r, strings.Replace("http://"+store.name, "127.0.0.1", "localhost", 1)+"/data", http.StatusTemporaryRedirect)
	})
	dockerConfig(t, login(h.name))
	got, err := read(t.Context(), New(Options{}), []string{h.ref()}, 10, 5)
	require.NoError(t, err)
	require.Equal(t, "abcde", got)
	require.Len(t, store.seen(), 1)
	r := store.seen()[0]
	require.Empty(t, r.Header.Get("Authorization"))
	require.Equal(t, "bytes=10-14", r.Header.Get("Range"))
}

// hostsFile writes a hosts.toml and returns the directory to look in.
func hostsFile(t *testing.T, registry, content string) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, registry), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, registry, "hosts.toml"), []byte(content), 0o644))
	return dir
}

func TestMirror(t *testing.T) {
	for name, c := range map[string]struct {
		mirror   http.HandlerFunc
		byOrigin int // requests
	}{
		"answers":   {serveBlob, 0},
		"refuses":   {status(http.StatusForbidden), 1},
		"is empty":  {status(http.StatusNotFound), 1},
		"is broken": {status(http.StatusBadGateway), 1},
	} {
		t.Run(name, func(t *testing.T) {
			mirror, origin := start(t, c.mirror), start(t, serveBlob)
			dir := hostsFile(t, "registry.example.com", fmt.Sprintf(`
server = "http://%s"
[host."http://%s"]
capabilities = ["pull"]
[host."http://%s".header]
x-test = ["yes"]
`, origin.name, mirror.name, mirror.name))
			got, err := read(t.Context(), newClient(t, t.TempDir(), dir), []string{"registry.example.com/team/app:1"}, 10, 5)
			require.NoError(t, err)
			require.Equal(t, "abcde", got)
			require.Len(t, mirror.seen(), 1)
			require.Equal(t, "ns=registry.example.com", mirror.seen()[0].URL.RawQuery)
			require.Equal(t, "yes", mirror.seen()[0].Header.Get("X-Test"))
			require.Len(t, origin.seen(), c.byOrigin)
		})
	}
}

func TestHostsThatMayNotBePulledFrom(t *testing.T) {
	h := start(t, serveBlob)
	dir := hostsFile(t, "registry.example.com", fmt.Sprintf("server = \"http://%s\"\ncapabilities = [\"push\"]\n", h.name))
	_, err := readInVain(t.Context(), newClient(t, dir), []string{"registry.example.com/team/app:1"}, 0, 3)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.Empty(t, h.seen())

	dir = hostsFile(t, "registry.example.com", "server = 1\n")
	_, err = readInVain(t.Context(), newClient(t, dir), []string{"registry.example.com/team/app:1"}, 0, 3)
	require.Error(t, err)
}

func TestConcurrentReads(t *testing.T) {
	b := startBearer(t, "")
	dockerConfig(t, login(b.name))
	c := New(Options{})
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			got, err := read(t.Context(), c, []string{b.ref()}, int64(i), 3)
			if err != nil || got != testBlob[i:i+3] {
				t.Errorf("read %q: %v", got, err)
			}
		})
	}
	wg.Wait()
}

// TestFetchRange has parts of blobs, and tells who has none from others.
func TestFetchRange(t *testing.T) {
	const off = 2 << 20
	blob := strings.Repeat("x", off) + "the end"
	id := digest.FromString(blob)
	good := start(t, func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(blob))
	})
	whole := start(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, blob) })
	fetch := func(h *host) (string, error) {
		fetcher, err := newClient(t).Fetcher(t.Context(), h.ref())
		require.NoError(t, err)
		rc, err := fetcher.(interface {
			FetchRange(ctx context.Context, d digest.Digest, off, n int64) (io.ReadCloser, error)
		}).FetchRange(t.Context(), id, off, 7)
		if err != nil {
			return "", err
		}
		defer rc.Close()
		b, err := io.ReadAll(rc)
		return string(b), err
	}
	got, err := fetch(good)
	require.NoError(t, err)
	require.Equal(t, "the end", got)
	_, err = fetch(whole)
	require.ErrorIs(t, err, errWhole)
	require.Len(t, whole.seen(), 1, "it is asked once")
}
