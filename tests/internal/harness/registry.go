package harness

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

var quiet = log.New(io.Discard, "", 0)

// Registry is a distribution registry with filesystem storage behind a counting proxy.
type Registry struct {
	*Process
	Root string // of its storage

	socket string
	proxy  *proxy
}

const registryConfig = `version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %s}
  delete: {enabled: true}
http:
  net: %s
  addr: %s
`

// StartRegistry starts a registry. It listens on a Unix socket; only the proxy has a port.
func (l *Lab) StartRegistry(ctx context.Context) (*Registry, error) {
	return l.StartAnotherRegistry(ctx, "registry")
}

// StartAnotherRegistry starts a registry beside others, with content of its own. name is unique in the lab.
func (l *Lab) StartAnotherRegistry(ctx context.Context, name string) (*Registry, error) {
	r := &Registry{Root: l.Path(name, "root"), socket: l.Path(name, "registry.sock")}
	var err error
	if r.Process, err = l.serveRegistry(ctx, name, "unix", r.socket); err != nil {
		return nil, err
	}
	if r.proxy, err = newProxy(r.socket); err != nil {
		return nil, err
	}
	l.onClose(func(context.Context) error { return r.proxy.switchOff() })
	return r, nil
}

// StartMirror starts another proxy in front of a registry's process: same content, its own port, counts and faults.
func (l *Lab) StartMirror(r *Registry) (*Registry, error) {
	m := *r
	var err error
	if m.proxy, err = newProxy(r.socket); err != nil {
		return nil, err
	}
	l.onClose(func(context.Context) error { return m.proxy.switchOff() })
	return &m, nil
}

// StartBareRegistry starts a registry with no proxy before it, for measuring its clients. It returns host:port.
func (l *Lab) StartBareRegistry(ctx context.Context) (host string, err error) {
	port, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	host = port.Addr().String()
	if err := port.Close(); err != nil {
		return "", err
	}
	_, err = l.serveRegistry(ctx, "registry", "tcp", host)
	return host, err
}

func (l *Lab) serveRegistry(ctx context.Context, name, network, address string) (*Process, error) {
	root := l.Path(name, "root")
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	config := l.Path(name, "config.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, registryConfig, root, network, address), 0o600); err != nil {
		return nil, err
	}
	return l.start(ctx, name, accepts(network, address), "registry", "serve", config)
}

// dialable is ready when a Unix socket accepts.
func dialable(socket string) func(context.Context) error { return accepts("unix", socket) }

// accepts is ready when a server accepts connections.
func accepts(network, address string) func(context.Context) error {
	return func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err == nil {
			conn.Close()
		}
		return err
	}
}

// Host is the registry's host:port.
func (r *Registry) Host() string { return r.proxy.address }

// Ref names a repository and tag in this registry.
func (r *Registry) Ref(name string) string { return r.Host() + "/" + name }

// Requests are those since the start or the last Reset, in the order in which they ended.
func (r *Registry) Requests() Requests {
	r.proxy.mu.Lock()
	defer r.proxy.mu.Unlock()
	return slices.Clone(r.proxy.requests)
}

// Reset forgets the requests so far.
func (r *Registry) Reset() {
	r.proxy.mu.Lock()
	defer r.proxy.mu.Unlock()
	r.proxy.requests = nil
}

// Traffic is how many requests have begun so far, and how many bytes of answers were sent; Reset does not change it.
// Unlike Requests it has what is under way.
func (r *Registry) Traffic() (requests, sent int64) {
	return r.proxy.traffic.requests.Load(), r.proxy.traffic.sent.Load()
}

// Received is how many bytes of requests' bodies came in so far.
func (r *Registry) Received() int64 { return r.proxy.traffic.received.Load() }

// Shape puts a link between the registry and its clients, in the place of the one that was there.
func (r *Registry) Shape(l Link) { r.proxy.wire.Store(&wire{Link: l}) }

// SwitchOff has connections refused until SwitchOn.
func (r *Registry) SwitchOff() error { return r.proxy.switchOff() }

// SwitchOn listens on the same port again.
func (r *Registry) SwitchOn() error { return r.proxy.switchOn() }

// Misbehave has requests answered by a fault from now on; nil ends it.
func (r *Registry) Misbehave(f Fault) {
	r.proxy.mu.Lock()
	defer r.proxy.mu.Unlock()
	r.proxy.fault = f
}

// BlobPath is the file in which the registry keeps a blob.
func (r *Registry) BlobPath(digest string) string {
	algorithm, hex, _ := strings.Cut(digest, ":")
	return filepath.Join(r.Root, "docker/registry/v2/blobs", algorithm, hex[:2], hex, "data")
}

// StoredBytes is the size of all blobs.
func (r *Registry) StoredBytes() (n int64, err error) {
	err = filepath.WalkDir(filepath.Join(r.Root, "docker/registry/v2/blobs"), func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += info.Size()
		}
		return err
	})
	return n, err
}
