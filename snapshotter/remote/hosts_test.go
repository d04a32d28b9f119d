package remote

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	mathbig "math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// TestTLS has a registry that speaks HTTP/2, shows a certificate of its own
// authority and wants to see one.
func TestTLS(t *testing.T) {
	dir := t.TempDir()
	ca := newCA(t, dir)
	server, client := ca.issue(t, "server"), ca.issue(t, "client")
	var protocols sync.Map
	var conns atomic.Int32
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		protocols.Store(r.Proto, r.TLS.PeerCertificates[0].Subject.CommonName)
		serveBlob(w, r)
	}))
	cert, err := tls.LoadX509KeyPair(server+".cert", server+".key")
	require.NoError(t, err)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.pool}
	srv.EnableHTTP2 = true
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			conns.Add(1)
		}
	}
	srv.Config.ErrorLog = nil
	srv.StartTLS()
	t.Cleanup(srv.Close)

	file := func(lines string) string {
		return hostsFile(t, "registry.example.com", fmt.Sprintf("server = %q\n%s", srv.URL, lines))
	}
	c := newClient(t, file(fmt.Sprintf("ca = %q\nclient = [[%q, %q]]\n", ca.file, client+".cert", client+".key")))
	var wg sync.WaitGroup
	_, err = read(t.Context(), c, mirroredRef, 0, 3)
	require.NoError(t, err)
	for range 20 {
		wg.Go(func() {
			if _, err := read(t.Context(), c, mirroredRef, 0, 3); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	name, ok := protocols.Load("HTTP/2.0")
	require.True(t, ok)
	require.Equal(t, "client", name)
	require.EqualValues(t, 1, conns.Load(), "one connection for all")

	for name, lines := range map[string]string{
		"unknown authority": "",
		"no certificate":    fmt.Sprintf("ca = %q\n", ca.file),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := readInVain(t.Context(), newClient(t, file(lines)), mirroredRef, 0, 3)
			require.ErrorIs(t, err, errdefs.ErrUnavailable)
		})
	}
}

// authority issues certificates into a directory.
type authority struct {
	dir, file string
	cert      *x509.Certificate
	key       *ecdsa.PrivateKey
	pool      *x509.CertPool
}

func newCA(t *testing.T, dir string) *authority {
	t.Helper()
	a := &authority{dir: dir, pool: x509.NewCertPool()}
	path := a.issue(t, "ca")
	a.file = path + ".cert"
	return a
}

// issue writes <name>.cert and <name>.key and returns the path without suffix.
func (a *authority) issue(t *testing.T, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: mathbig.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: a.cert == nil, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	require.NoError(t, err)
	if a.cert == nil {
		a.cert, err = x509.ParseCertificate(der)
		require.NoError(t, err)
		a.key = key
		a.pool.AddCert(a.cert)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	path := filepath.Join(a.dir, name)
	require.NoError(t, os.WriteFile(path+".cert", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	require.NoError(t, os.WriteFile(path+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), 0o600))
	return path
}

// helperSource is a credential helper that answers "get" with what is in a file.
const helperSource = `package main

import (
	"fmt"
	"io"
	"os"
)

func main() {
	if len(os.Args) != 2 || os.Args[1] != "get" {
		os.Exit(2)
	}
	server, _ := io.ReadAll(os.Stdin)
	user, err := os.ReadFile(os.Getenv("HELPER_SECRET"))
	if err != nil {
		fmt.Println("credentials not found in native keychain")
		os.Exit(1)
	}
	fmt.Printf("{\"ServerURL\":%q,\"Username\":\"me\",\"Secret\":%q}", server, user)
}
`

// TestCredentialHelper has a real helper whose password changes.
func TestCredentialHelper(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	require.NoError(t, os.WriteFile(source, []byte(helperSource), 0o600))
	out, err := exec.Command("go", "build", "-o", filepath.Join(dir, "docker-credential-cliptest"), source).CombinedOutput()
	require.NoError(t, err, string(out))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("HELPER_SECRET", filepath.Join(dir, "secret"))

	var password atomic.Value
	change := func(p string) {
		password.Store(p)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "secret"), []byte(p), 0o600))
	}
	refuse := http.StatusUnauthorized
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		if _, secret, _ := r.BasicAuth(); secret != password.Load() {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			if r.Header.Get("Authorization") == "" {
				w.WriteHeader(http.StatusUnauthorized)
			} else {
				w.WriteHeader(refuse)
			}
			return
		}
		serveBlob(w, r)
	})
	change("first")
	c := newClient(t)
	dockerConfig(t, fmt.Sprintf(`{"credHelpers":{%q:"cliptest"}}`, h.name))
	get := func() error { _, err := read(t.Context(), c, []string{h.ref()}, 0, 3); return err }
	require.NoError(t, get())
	require.NoError(t, get())
	require.Len(t, h.seen(), 3)
	for _, refuse = range []int{http.StatusUnauthorized, http.StatusForbidden} {
		change(fmt.Sprint("another", refuse))
		require.NoError(t, get(), "it is asked anew after %d", refuse)
	}
	require.NoError(t, os.Remove(filepath.Join(dir, "secret")))
	password.Store("unknown")
	require.ErrorIs(t, get(), errdefs.ErrPermissionDenied)
}

// TestPasswordsAreTried has several logins for a host that wants a password, and a
// host that has its own way to say that one is no good.
func TestPasswordsAreTried(t *testing.T) {
	for _, refuse := range []int{http.StatusUnauthorized, http.StatusForbidden} {
		t.Run(fmt.Sprint(refuse), func(t *testing.T) {
			h := start(t, func(w http.ResponseWriter, r *http.Request) {
				user, _, shown := r.BasicAuth()
				switch {
				case shown && user == "good":
					serveBlob(w, r)
				case shown:
					w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
					w.WriteHeader(refuse)
				default:
					w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
					w.WriteHeader(http.StatusUnauthorized)
				}
			})
			dockerConfig(t, "{}")
			users := map[string][]string{"team/app": {"old", "older", "good"}, "team/other": {"old", "older"}}
			c := New(Options{Logins: func(_, repository string) (logins []Login) {
				for _, user := range users[repository] {
					logins = append(logins, Login{user, "secret"})
				}
				return logins
			}})
			other := h.name + "/team/other:1"
			for range 2 { // a refusal is not for ever
				before := len(h.seen())
				_, err := read(t.Context(), c, []string{other}, 0, 3)
				require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
				require.GreaterOrEqual(t, len(h.seen()), before+2, "both were tried")
				require.LessOrEqual(t, len(h.seen()), before+3)
			}
			// One repository's credentials are of no use, another's are.
			_, err := read(t.Context(), c, []string{other, h.ref()}, 0, 3)
			require.NoError(t, err)
			before := len(h.seen())
			_, err = read(t.Context(), c, []string{h.ref()}, 0, 3)
			require.NoError(t, err)
			require.Len(t, h.seen(), before+1, "what is good is kept")
		})
	}
}

// TestIdentityToken is what docker's config has instead of a password.
func TestIdentityToken(t *testing.T) {
	tokens := start(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost || r.FormValue("grant_type") != "refresh_token" || r.FormValue("refresh_token") != "identity" ||
			r.FormValue("service") != "s" || r.FormValue("scope") != "repository:team/app:pull" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = fmt.Fprint(w, `{"access_token":"t"}`)
	})
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "Bearer t" {
			serveBlob(w, r)
			return
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="s"`, tokens.name))
		w.WriteHeader(http.StatusUnauthorized)
	})
	c := newClient(t)
	dockerConfig(t, fmt.Sprintf(`{"auths":{%q:{"auth":%q,"identitytoken":"identity"}}}`, h.name, base64.StdEncoding.EncodeToString([]byte("00000000:"))))
	_, err := read(t.Context(), c, []string{h.ref()}, 0, 3)
	require.NoError(t, err)
}

// TestDockerHubLogin is kept under an address of its own.
func TestDockerHubLogin(t *testing.T) {
	dockerConfig(t, login(dockerHub))
	for _, host := range []string{"docker.io", "registry-1.docker.io"} {
		l, err := DockerLogin(host)
		require.NoError(t, err)
		require.Equal(t, Login{"me", "secret"}, l, host)
	}
	l, err := DockerLogin("registry.example.com")
	require.NoError(t, err)
	require.Empty(t, l)
}

// TestGrantsAreBounded asks for more repositories than are remembered.
func TestGrantsAreBounded(t *testing.T) {
	a := newAuthorizer("http", "registry.example.com", func(string, string) ([]Login, error) { return []Login{{"me", "secret"}}, nil }, time.Minute)
	a.general = &challenge{basic: true}
	for i := range maxRemembered + 10 {
		g := a.grantFor(docker.WithScope(t.Context(), fmt.Sprintf("repository:team/app%d:pull", i)))
		<-g.done
		require.NoError(t, g.err)
	}
	require.Equal(t, maxRemembered, len(a.grants))
}

// TestOneTokenForAll reads with many at once: one token is fetched, and the
// next repository's before it is asked for.
func TestOneTokenForAll(t *testing.T) {
	b := startBearer(t, "")
	dockerConfig(t, login(b.name))
	c := New(Options{})
	_, err := read(t.Context(), c, []string{b.ref()}, 0, 3)
	require.NoError(t, err)
	require.Len(t, b.tokens.seen(), 1)
	b.revoke()
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			if _, err := read(t.Context(), c, []string{b.ref()}, 0, 3); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	require.Len(t, b.tokens.seen(), 2)

	asked := len(b.seen())
	_, err = read(t.Context(), c, []string{b.name + "/team/other:1"}, 0, 3)
	require.NoError(t, err)
	require.Len(t, b.seen(), asked+1, "no request without a token")
	require.Equal(t, []string{"repository:team/other:pull"}, b.tokens.seen()[2].URL.Query()["scope"])
	for _, r := range append(b.seen(), b.tokens.seen()...) {
		require.NotEqual(t, http.MethodHead, r.Method)
	}
}

// TestLoginThatEnded reads what is public all the same.
func TestLoginThatEnded(t *testing.T) {
	tokens := start(t, func(w http.ResponseWriter, r *http.Request) {
		if _, _, ok := r.BasicAuth(); ok {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = fmt.Fprint(w, `{"token":"t"}`)
	})
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "Bearer t" {
			serveBlob(w, r)
			return
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token"`, tokens.name))
		w.WriteHeader(http.StatusUnauthorized)
	})
	c := newClient(t)
	dockerConfig(t, login(h.name))
	_, err := read(t.Context(), c, []string{h.ref()}, 0, 3)
	require.NoError(t, err)
}

// TestTokenServerBounds has token servers that must not be believed.
func TestTokenServerBounds(t *testing.T) {
	other := start(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, `{"token":"t"}`) })
	for name, answer := range map[string]http.HandlerFunc{
		"endless": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = fmt.Fprint(w, `{"token":"`)
			for range 64 {
				_, _ = fmt.Fprint(w, strings.Repeat("t", 1<<16))
			}
			_, _ = fmt.Fprint(w, `"}`)
		},
		"redirects": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://"+other.name, http.StatusTemporaryRedirect)
		},
		"empty": func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, `{}`) },
	} {
		t.Run(name, func(t *testing.T) {
			tokens := start(t, answer)
			h := start(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token"`, tokens.name))
				w.WriteHeader(http.StatusUnauthorized)
			})
			c := newClient(t)
			dockerConfig(t, login(h.name))
			_, err := readInVain(t.Context(), c, []string{h.ref()}, 0, 3)
			require.ErrorContains(t, err, "credentials for "+h.name)
			require.Empty(t, other.seen())
		})
	}
}

// TestDowngrade sends no credentials where anybody can read them.
func TestDowngrade(t *testing.T) {
	plain := start(t, serveBlob)
	var challenge string
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if challenge != "" && r.Header.Get("Authorization") == "" {
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.Redirect(w, r, "http://"+plain.name+"/data", http.StatusTemporaryRedirect)
	}))
	t.Cleanup(secure.Close)
	host := strings.TrimPrefix(secure.URL, "https://")
	dir := hostsFile(t, "registry.example.com", fmt.Sprintf("server = %q\nskip_verify = true\n[header]\nX-Key = \"k\"\n", secure.URL))
	get := func(c string) error {
		challenge = c
		client := newClient(t, dir)
		dockerConfig(t, login(host))
		_, err := read(t.Context(), client, mirroredRef, 0, 3)
		return err
	}
	require.NoError(t, get(`Basic realm="x"`))
	require.Len(t, plain.seen(), 1)
	require.Empty(t, plain.seen()[0].Header.Get("Authorization"))
	require.Empty(t, plain.seen()[0].Header.Get("X-Key"))

	err := get(fmt.Sprintf(`Bearer realm="http://%s/token"`, plain.name))
	require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
	require.Len(t, plain.seen(), 1, "nothing was sent to the token server")
}

// TestHostsFileChanges takes effect on a client that has read it.
func TestHostsFileChanges(t *testing.T) {
	first, second := start(t, serveBlob), start(t, serveBlob)
	dir := hostsFile(t, "registry.example.com", fmt.Sprintf("server = \"http://%s\"\n", first.name))
	c := newClient(t, dir)
	get := func() {
		_, err := read(t.Context(), c, mirroredRef, 0, 3)
		require.NoError(t, err)
	}
	get()
	file := filepath.Join(dir, "registry.example.com", "hosts.toml")
	require.NoError(t, os.WriteFile(file, []byte(fmt.Sprintf("server = \"http://%s\"\n# changed\n", second.name)), 0o600))
	c.mu.Lock()
	for _, conf := range c.configs {
		conf.checked = time.Now().Add(-checkPeriod)
	}
	c.mu.Unlock()
	get()
	require.Len(t, first.seen(), 1)
	require.Len(t, second.seen(), 1)
}

// TestFetcherShares has the fetcher's token serve the reads.
func TestFetcherShares(t *testing.T) {
	b := startBearer(t, "")
	dockerConfig(t, login(b.name))
	c := New(Options{})
	f, err := c.Fetcher(context.Background(), b.ref())
	require.NoError(t, err)
	_, err = f.(fetcher).FetchReferrers(t.Context(), testDigest)
	require.Error(t, err, "the blob is no list of referrers")
	asked := len(b.seen())
	_, err = read(t.Context(), c, []string{b.ref()}, 0, 3)
	require.NoError(t, err)
	require.Len(t, b.seen(), asked+1)
	require.Len(t, b.tokens.seen(), 1)
	require.Equal(t, "me:secret", decode(t, b.tokens.seen()[0].Header.Get("Authorization")))
}

func decode(t *testing.T, header string) string {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(header, "Basic "))
	require.NoError(t, err)
	return string(b)
}
