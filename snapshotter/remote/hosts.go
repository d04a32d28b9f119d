// Package remote reads ranges of registry blobs through containerd's host configuration.
//
// Hosts, mirrors and TLS come from containerd's hosts.toml files, credentials
// from docker's config file and its helpers, as containerd's own pull takes
// them. A registry on loopback is reached over plain HTTP.
//
// What is read is not verified here: that is the caller's part, who knows what
// the bytes should be.
package remote

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	cliconfig "github.com/docker/cli/cli/config"
)

// dockerHub is the key under which docker's config keeps docker.io's credentials.
const dockerHub = "https://index.docker.io/v1/"

// Client talks to registries. It is safe for concurrent use and keeps
// connections and tokens between reads.
type Client struct {
	configure docker.RegistryHosts

	mu    sync.Mutex // guards hosts
	hosts map[string][]docker.RegistryHost
}

// New returns a client that looks for <host>/hosts.toml in each directory of
// configPath, in this order.
func New(configPath []string) *Client {
	c := &Client{hosts: map[string][]docker.RegistryHost{}}
	c.configure = dockerconfig.ConfigureHosts(context.Background(), dockerconfig.HostOptions{
		HostDir:     hostDir(configPath),
		Credentials: dockerCredentials,
		UpdateClient: func(client *http.Client) error {
			if t, ok := client.Transport.(*http.Transport); ok {
				t.MaxIdleConnsPerHost = maxIdleConns
				t.DisableCompression = true // ranges are of the bytes as stored
			}
			return nil
		},
	})
	return c
}

// maxIdleConns is how many connections to one host are kept for the next read.
const maxIdleConns = 16

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

// dockerCredentials reads docker's config anew each time: a helper's answer or
// a new login takes effect without a restart.
func dockerCredentials(host string) (user, secret string, err error) {
	config, err := cliconfig.Load(cliconfig.Dir())
	if err != nil {
		return "", "", err
	}
	if host == "docker.io" || host == "registry-1.docker.io" {
		host = dockerHub
	}
	auth, err := config.GetAuthConfig(host)
	if err != nil {
		return "", "", err
	}
	if auth.IdentityToken != "" {
		return "", auth.IdentityToken, nil
	}
	return auth.Username, auth.Password, nil
}

// hostsOf returns the hosts to ask for what belongs to registry, mirrors
// first, and whether they are kept from earlier.
func (c *Client) hostsOf(registry string) (_ []docker.RegistryHost, kept bool, _ error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if hosts, ok := c.hosts[registry]; ok {
		return hosts, true, nil
	}
	hosts, err := c.configure(registry)
	if err != nil {
		return nil, false, err
	}
	if len(hosts) == 0 {
		return nil, false, errors.Join(errors.New("no hosts are configured for registry "+registry), errdefs.ErrNotFound)
	}
	for i := range hosts {
		if hosts[i].Authorizer != nil {
			hosts[i].Authorizer = &serialized{Authorizer: hosts[i].Authorizer}
		}
	}
	c.hosts[registry] = hosts
	return hosts, false, nil
}

// serialized is an authorizer that is asked by one goroutine at a time:
// containerd's has a data race while it fetches a token.
type serialized struct {
	mu sync.Mutex // serialises Authorize
	docker.Authorizer
}

// Authorize implements docker.Authorizer.
func (s *serialized) Authorize(ctx context.Context, req *http.Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Authorizer.Authorize(ctx, req)
}

// forget drops hosts if they are what is known of registry: the next read
// configures it anew, with fresh credentials.
func (c *Client) forget(registry string, hosts []docker.RegistryHost) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if known := c.hosts[registry]; len(known) > 0 && &known[0] == &hosts[0] {
		delete(c.hosts, registry)
	}
}

// Fetcher returns containerd's own fetcher for the repository of ref, which
// reads manifests and lists referrers. It has credentials of its own: an
// authorizer remembers refusals.
func (c *Client) Fetcher(ctx context.Context, ref string) (remotes.Fetcher, error) {
	return docker.NewResolver(docker.ResolverOptions{Hosts: c.configure}).Fetcher(ctx, ref)
}

// isMirror says whether host stands in for registry, and must be told which.
func isMirror(host docker.RegistryHost, registry string) bool {
	return host.Host != registry && !(registry == "docker.io" && strings.HasSuffix(host.Host, ".docker.io"))
}
