package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Request is what the registry was asked, and what it answered.
type Request struct {
	Method, Path, Range string
	Status              int
	Sent                int64 // bytes of the response's body
	At                  time.Time
}

// blob returns the digest that the request is about, or "".
func (r Request) blob() string {
	if _, digest, ok := strings.Cut(r.Path, "/blobs/"); ok && strings.Contains(digest, ":") {
		return digest
	}
	return ""
}

func (r Request) String() string {
	return fmt.Sprintf("%s %s %q -> %d, %d bytes", r.Method, r.Path, r.Range, r.Status, r.Sent)
}

// Requests is a list with the sums that tests ask for.
type Requests []Request

// Sent is the sum of all bodies.
func (rs Requests) Sent() (n int64) {
	for _, r := range rs {
		n += r.Sent
	}
	return n
}

// Gets are the GETs of any of the blobs.
func (rs Requests) Gets(digests ...string) Requests {
	return slices.DeleteFunc(slices.Clone(rs), func(r Request) bool {
		return r.Method != http.MethodGet || !slices.Contains(digests, r.blob())
	})
}

func (rs Requests) String() string {
	var b strings.Builder
	for _, r := range rs {
		fmt.Fprintln(&b, r)
	}
	return b.String()
}

// Fault answers requests in the place of the registry, which is next. It may ask next with another request, or spoil
// what it writes.
type Fault func(w http.ResponseWriter, r *http.Request, next http.Handler)

// proxy is a reverse proxy on loopback that counts, that can be off, and that misbehaves when told to.
type proxy struct {
	address string // host:port; stays the same while off
	handler http.Handler
	wire    atomic.Pointer[wire]
	traffic traffic

	mu       sync.Mutex // guards the fields below
	server   *http.Server
	requests Requests
	fault    Fault // nil: none
}

// newProxy starts a proxy in front of a server that listens on a Unix socket.
func newProxy(socket string) (*proxy, error) {
	p := new(proxy)
	p.wire.Store(&wire{})
	backend := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", "registry"
			r.Out.Host = r.In.Host // upload locations are made from it
		},
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			},
			DisableCompression:  true,
			MaxIdleConnsPerHost: 64,
		},
		FlushInterval: -1,
		// A client that goes away in the middle of a body is no event.
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	p.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := &counter{ResponseWriter: w, traffic: &p.traffic}
		if r.Body != nil {
			r.Body = &upload{r.Body, &p.traffic}
		}
		p.traffic.requests.Add(1)
		req := Request{Method: r.Method, Path: r.URL.Path, Range: r.Header.Get("Range"), At: time.Now()}
		defer func() { // also when the client aborts, which is a panic
			req.Status, req.Sent = c.status, c.sent
			p.mu.Lock()
			defer p.mu.Unlock()
			p.requests = append(p.requests, req)
		}()
		p.mu.Lock()
		fault := p.fault
		p.mu.Unlock()
		if fault != nil {
			fault(c, r, backend)
			return
		}
		backend.ServeHTTP(c, r)
	})
	return p, p.switchOn()
}

func (p *proxy) switchOn() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server != nil {
		return nil
	}
	listener, err := p.listen()
	if err != nil {
		return err
	}
	p.address = listener.Addr().String()
	server := &http.Server{Handler: p.handler, ErrorLog: quiet}
	p.server = server
	go func() { _ = server.Serve(shapedListener{listener, &p.wire}) }() // it ends when switchOff closes the server
	return nil
}

// listen takes a port once, and that one again. It is none of those that the kernel gives to connections
// (net.ipv4.ip_local_port_range), of which one could have it while the proxy is off.
func (p *proxy) listen() (net.Listener, error) {
	if p.address != "" {
		return net.Listen("tcp", p.address)
	}
	for {
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 20000+rand.IntN(12000)))
		if !errors.Is(err, unix.EADDRINUSE) {
			return listener, err
		}
	}
}

// switchOff has connections refused, and breaks those that are open.
func (p *proxy) switchOff() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server == nil {
		return nil
	}
	err := p.server.Close()
	p.server = nil
	return err
}

// traffic counts requests when they begin, and bytes when they are sent or received.
type traffic struct{ requests, sent, received atomic.Int64 }

// upload counts what is read of a request's body.
type upload struct {
	io.ReadCloser
	traffic *traffic
}

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.ReadCloser.Read(p)
	u.traffic.received.Add(int64(n))
	return n, err
}

// counter counts what is written through it.
type counter struct {
	http.ResponseWriter
	traffic *traffic
	status  int
	sent    int64
}

func (c *counter) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b)
	c.sent += int64(n)
	c.traffic.sent.Add(int64(n))
	return n, err
}

// Unwrap lets the reverse proxy flush.
func (c *counter) Unwrap() http.ResponseWriter { return c.ResponseWriter }
