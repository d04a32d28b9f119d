// Package remote reads ranges of registry blobs through containerd's host configuration.
//
// Hosts, mirrors, headers and TLS come from containerd's hosts.toml files,
// credentials from Options.Logins, docker's config file and its helpers, as containerd's own
// pull takes them. A registry on loopback is reached over plain HTTP.
//
// # Vocabulary
//
// A source is an image reference whose repository should hold a blob. A
// registry is the host in that reference; the hosts that stand for it, mirrors
// first, are its hosts. A candidate is one host of one source. An endpoint is
// a machine that is talked to: a host, or the storage that it redirects to.
//
// # Faults
//
// A read goes on as long as somebody may still answer, until its context ends or
// nothing has arrived for Options.GiveUp. One that begins right after tries once.
// What one candidate does not deliver is asked of the next, in the middle of a
// body too. An endpoint that fails is left alone for a growing pause while
// there are others; one that says when to come back is left alone until then.
// A host's word that it does not have a blob, or does not give it to us, is
// final for the read.
//
// What is read is not verified here: that is the caller's part, who knows what
// the bytes should be, and says so by Reader.Blame.
//
// Nothing that this package logs or returns as an error holds a secret: of a
// URL, only its host is told.
package remote

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
)

// Options configures New. Zero values are the defaults.
type Options struct {
	// ConfigPath are directories with containerd's <host>/hosts.toml files; the
	// first that knows a host counts.
	ConfigPath []string
	// ConnectTimeout bounds connecting to an endpoint, and again its TLS
	// handshake; 5 seconds, a quarter of GiveUp at most. A dial_timeout in
	// hosts.toml goes before.
	ConnectTimeout time.Duration
	// SilenceTimeout bounds how long an endpoint may be silent: before its
	// answer, connecting included, and between two pieces of a body; 10 seconds,
	// a quarter of GiveUp at most.
	SilenceTimeout time.Duration
	// GiveUp is how long a read goes on when nothing arrives; 55 seconds.
	GiveUp time.Duration
	// Logins returns what is known of a repository at a host, the best first;
	// docker's config comes after it. Nil knows nothing. It is called with
	// nothing locked, for each new token.
	Logins func(host, repository string) []Login
}

// Bounds on what an endpoint may cost.
const (
	maxPerEndpoint = 32       // requests at once
	maxHeader      = 64 << 10 // bytes of an answer's headers
	maxIdle        = 90 * time.Second
)

// Client talks to registries. It is safe for concurrent use and keeps
// connections, tokens and redirects between reads.
type Client struct {
	opts Options

	mu        sync.Mutex // guards the fields below, not what they point to
	configs   map[string]*config
	auths     map[string]*authorizer // by scheme://host
	endpoints map[string]*endpoint   // by scheme://host
	memory    memory
}

// config is what is known of a registry's hosts.
type config struct {
	hosts      []docker.RegistryHost
	transports []*http.Transport
	state      [sha256.Size]byte // of the files that it was made from
	checked    time.Time
}

func (c *config) closeIdle() {
	for _, t := range c.transports {
		t.CloseIdleConnections()
	}
}

// checkPeriod is how long a change of a registry's files may go unnoticed.
const checkPeriod = 10 * time.Second

// New returns a client. It reads no files and talks to nobody yet.
func New(opts Options) *Client {
	if opts.GiveUp == 0 {
		opts.GiveUp = 55 * time.Second
	}
	// There must be time left for another host.
	if opts.ConnectTimeout == 0 {
		opts.ConnectTimeout = min(5*time.Second, opts.GiveUp/4)
	}
	if opts.SilenceTimeout == 0 {
		opts.SilenceTimeout = min(10*time.Second, opts.GiveUp/4)
	}
	return &Client{
		opts: opts, configs: map[string]*config{}, auths: map[string]*authorizer{},
		endpoints: map[string]*endpoint{}, memory: newMemory(),
	}
}

// hostsOf returns the hosts to ask for what belongs to registry, mirrors first.
func (c *Client) hostsOf(registry string) ([]docker.RegistryHost, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	known := c.configs[registry]
	if known != nil && time.Since(known.checked) < checkPeriod {
		return known.hosts, nil
	}
	dir, err := hostDir(c.opts.ConfigPath)(registry)
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	state := stateOf(dir)
	if known != nil && known.state == state {
		known.checked = time.Now()
		return known.hosts, nil
	}
	fresh := &config{state: state, checked: time.Now()}
	if err := c.configureLocked(registry, fresh); err != nil {
		return nil, fmt.Errorf("configuration of registry %s: %w", registry, err)
	}
	if known != nil {
		known.closeIdle()
	}
	c.configs[registry] = fresh
	return fresh.hosts, nil
}

// stateOf sums up the files of a directory by name, size and time.
func stateOf(dir string) (sum [sha256.Size]byte) {
	var all strings.Builder
	fmt.Fprintln(&all, dir)
	files, err := os.ReadDir(dir)
	if err != nil {
		return sha256.Sum256([]byte(all.String())) // nothing there, or what is there is reported when it is read
	}
	for _, f := range files {
		if st, err := os.Stat(filepath.Join(dir, f.Name())); err == nil {
			fmt.Fprintln(&all, f.Name(), st.Size(), st.ModTime().UnixNano())
		}
	}
	return sha256.Sum256([]byte(all.String()))
}

func hostDir(configPath []string) func(string) (string, error) {
	return func(host string) (string, error) {
		for _, root := range configPath {
			dir, err := dockerconfig.HostDirFromRoot(filepath.Clean(root))(host)
			if !errdefs.IsNotFound(err) {
				return dir, err
			}
		}
		return "", errdefs.ErrNotFound
	}
}

func (c *Client) configureLocked(registry string, conf *config) error {
	update := func(client *http.Client) error {
		t, ok := client.Transport.(*http.Transport)
		if !ok {
			return fmt.Errorf("unexpected transport %T", client.Transport)
		}
		c.tune(t, len(conf.transports) == 0)
		conf.transports = append(conf.transports, t)
		return nil
	}
	hosts, err := dockerconfig.ConfigureHosts(context.Background(), dockerconfig.HostOptions{
		HostDir: hostDir(c.opts.ConfigPath), UpdateClient: update,
	})(registry)
	if err != nil {
		return err
	}
	if len(hosts) == 0 {
		return fmt.Errorf("it names no hosts: %w", errdefs.ErrNotFound)
	}
	for i := range hosts {
		c.adoptLocked(&hosts[i])
	}
	conf.hosts = hosts
	return nil
}

// tune sets what containerd's configuration leaves open. The first transport
// is the pattern of the others, which may have a dial timeout of their own.
func (c *Client) tune(t *http.Transport, first bool) {
	t.MaxIdleConns, t.MaxIdleConnsPerHost, t.IdleConnTimeout = 0, maxPerEndpoint, maxIdle
	t.MaxResponseHeaderBytes = maxHeader
	t.DisableCompression = true // ranges are of the bytes as stored
	t.ForceAttemptHTTP2 = true  // not tried by itself with TLS settings of our own
	t.TLSHandshakeTimeout = c.opts.ConnectTimeout
	// A connection that died in silence must not be taken for the next read.
	t.HTTP2 = &http.HTTP2Config{SendPingTimeout: c.opts.SilenceTimeout, PingTimeout: c.opts.ConnectTimeout}
	if first {
		t.DialContext = (&net.Dialer{Timeout: c.opts.ConnectTimeout, KeepAlive: 30 * time.Second}).DialContext
	}
}

// adoptLocked gives a host our authorizer, and takes its headers out of the
// hands of those who log requests and follow redirects.
func (c *Client) adoptLocked(host *docker.RegistryHost) {
	transport := &hostTransport{next: host.Client.Transport, scheme: host.Scheme, host: host.Host, header: canonical(host.Header)}
	key := host.Scheme + "://" + host.Host
	auth := c.auths[key]
	if auth == nil {
		auth = newAuthorizer(host.Scheme, host.Host, c.loginsFor, c.opts.SilenceTimeout)
		c.auths[key] = auth
	}
	auth.use(transport)
	host.Client, host.Authorizer, host.Header = &http.Client{Transport: redirecting{transport}}, auth, nil
}

func canonical(h http.Header) http.Header {
	out := http.Header{}
	for key, values := range h {
		out[http.CanonicalHeaderKey(key)] = slices.Clone(values)
	}
	return out
}

// hostTransport adds the headers that hosts.toml has for a host, to requests
// to that host alone.
type hostTransport struct {
	next         http.RoundTripper
	scheme, host string
	header       http.Header
}

// RoundTrip implements http.RoundTripper.
func (t *hostTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != t.scheme || req.URL.Host != t.host || len(t.header) == 0 {
		return t.next.RoundTrip(req)
	}
	req = req.Clone(req.Context())
	for key, values := range t.header {
		if key == "Authorization" && req.Header.Get(key) != "" {
			continue // the registry asked for it
		}
		req.Header[key] = values
	}
	return t.next.RoundTrip(req)
}

const maxRedirects = 5

// redirecting follows redirects for those who only know a client and tell
// whoever wants to hear it where it was sent. What is meant for one host is
// not passed on to another, nor to the same one without encryption, and where
// a request was sent to has no say in who gets credentials.
type redirecting struct{ *hostTransport }

// RoundTrip implements http.RoundTripper.
func (t redirecting) RoundTrip(req *http.Request) (*http.Response, error) {
	var first *http.Request // as it was sent, which may be over another scheme
	for range maxRedirects + 1 {
		resp, err := t.hostTransport.RoundTrip(req)
		if err != nil {
			return nil, err
		}
		if first == nil {
			first = resp.Request
		}
		if !isRedirect(resp.StatusCode) || (req.Method != http.MethodGet && req.Method != http.MethodHead) {
			if resp.Request.URL.Scheme != first.URL.Scheme || resp.Request.URL.Host != first.URL.Host {
				resp.Header.Del("WWW-Authenticate")
			}
			resp.Header.Del("Set-Cookie") // nobody here keeps any
			resp.Request = first
			return resp, nil
		}
		resp.Body.Close()
		u, err := redirectTarget(req.URL, resp.Header.Get("Location"))
		if err != nil {
			return nil, err
		}
		next := req.Clone(req.Context())
		next.URL, next.Host = u, ""
		if u.Scheme != req.URL.Scheme || u.Host != req.URL.Host {
			next.Header.Del("Authorization")
		}
		req = next
	}
	return nil, fmt.Errorf("more than %d redirects", maxRedirects)
}

func isRedirect(code int) bool {
	switch code {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// isMirror says whether host stands in for registry, and must be told which.
func isMirror(host docker.RegistryHost, registry string) bool {
	return host.Host != registry && !(registry == "docker.io" && strings.HasSuffix(host.Host, ".docker.io"))
}

// endpoint returns what is known of the machine behind u.
func (c *Client) endpoint(u *url.URL) *endpoint {
	key := u.Scheme + "://" + u.Host
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.endpoints[key]
	if e == nil {
		if len(c.endpoints) >= maxRemembered { // somebody redirects to ever new hosts
			clear(c.endpoints)
		}
		e = newEndpoint(u.Host)
		c.endpoints[key] = e
	}
	return e
}
