package cri

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/distribution/reference"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

// Keychain holds what repositories were pulled with. It is safe for concurrent use.
//
// What it holds is also in a file, for the next process: containers that run
// read on with it. The file should be in memory, on a tmpfs.
type Keychain struct {
	path string

	mu    sync.Mutex // guards the fields below
	repos []repo     // the last one pulled first
}

// repo is what is kept of a repository.
type repo struct {
	Name   string         `json:"name"` // registry and path: docker.io/library/busybox
	Logins []remote.Login `json:"logins"`
}

// Bounds: repositories, and logins of each. Tenants may have different ones for
// the same.
const (
	maxRepos  = 1024
	maxLogins = 4
	maxFile   = 16 << 20 // bytes
)

// KeychainPath is where the daemon whose socket is at address has its keychain:
// beside it, in memory as a rule, and for root alone.
func KeychainPath(address string) string {
	return filepath.Join(filepath.Dir(address), "credentials.json")
}

// Repositories lists the repositories of which something is known.
func (k *Keychain) Repositories() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var names []string
	for _, r := range k.repos {
		names = append(names, r.Name)
	}
	return names
}

// OpenKeychain returns the keychain in the file at path, which need not exist.
// With a file that cannot be made sense of it is an empty one and an error.
func OpenKeychain(path string) (*Keychain, error) {
	k := &Keychain{path: path}
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return k, nil
	}
	if err == nil && st.Size() > maxFile {
		err = fmt.Errorf("%d bytes are too many", st.Size())
	}
	var raw []byte
	if err == nil {
		raw, err = os.ReadFile(path)
	}
	if err == nil {
		err = json.Unmarshal(raw, &k.repos)
	}
	if err != nil {
		k.repos = nil
		return k, fmt.Errorf("credentials in %s: %w", path, err)
	}
	return k, nil
}

// Logins returns what is known of a repository at a registry's host, the last
// one that was pulled with first. It is a remote.Options.Logins.
func (k *Keychain) Logins(host, repository string) []remote.Login {
	name := registryOf(host) + "/" + repository
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range k.repos {
		if r.Name == name {
			return slices.Clone(r.Logins)
		}
	}
	return nil
}

// registryOf returns how images call a registry's host.
func registryOf(host string) string {
	if host == "registry-1.docker.io" || host == "index.docker.io" {
		return "docker.io"
	}
	return host
}

// add keeps the credentials of a pull of image. undo, set if there are any, takes
// them back unless they were there before.
func (k *Keychain) add(image string, auth *runtime.AuthConfig, undo *func()) error {
	named, err := reference.ParseDockerRef(image)
	if err != nil {
		return fmt.Errorf("image %q: %w", image, err)
	}
	login, err := parseAuth(auth, reference.Domain(named))
	if err != nil || login.Secret == "" {
		return err
	}
	name := named.Name()
	fresh, err := k.put(name, login)
	if fresh {
		*undo = func() { _ = k.drop(name, login) } // in memory it is gone in any case
	}
	return err
}

// put makes login the first of a repository, and says whether it is a new one.
func (k *Keychain) put(name string, login remote.Login) (fresh bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := repo{Name: name}
	if i := slices.IndexFunc(k.repos, func(r repo) bool { return r.Name == name }); i >= 0 {
		r = k.repos[i]
		k.repos = slices.Delete(k.repos, i, i+1)
	}
	others := slices.DeleteFunc(slices.Clone(r.Logins), func(l remote.Login) bool { return l == login })
	fresh = len(others) == len(r.Logins)
	r.Logins = append([]remote.Login{login}, others...)
	r.Logins = r.Logins[:min(len(r.Logins), maxLogins)]
	k.repos = slices.Insert(k.repos, 0, r)
	k.repos = k.repos[:min(len(k.repos), maxRepos)]
	return fresh, k.saveLocked()
}

func (k *Keychain) drop(name string, login remote.Login) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, r := range k.repos {
		if r.Name == name {
			k.repos[i].Logins = slices.DeleteFunc(slices.Clone(r.Logins), func(l remote.Login) bool { return l == login })
		}
	}
	k.repos = slices.DeleteFunc(k.repos, func(r repo) bool { return len(r.Logins) == 0 })
	return k.saveLocked()
}

// saveLocked writes the file anew. The caller holds k.mu.
func (k *Keychain) saveLocked() (err error) {
	raw, err := json.Marshal(k.repos)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(k.path), ".credentials-") // for its owner alone
	if err != nil {
		return fmt.Errorf("keeping credentials: %w", err)
	}
	_, err = tmp.Write(raw)
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), k.path)
	}
	if err != nil {
		return fmt.Errorf("keeping credentials: %w", errors.Join(err, os.Remove(tmp.Name())))
	}
	return nil
}

// parseAuth reads credentials as containerd does. Those that are for another
// server are none, and so is a registry token, which containerd ignores, too.
func parseAuth(auth *runtime.AuthConfig, registry string) (remote.Login, error) {
	if server := auth.GetServerAddress(); server != "" {
		u, err := url.Parse(server)
		if err != nil {
			return remote.Login{}, errors.New("the server address of the credentials is no web address")
		}
		if host := cmp.Or(u.Host, strings.TrimSuffix(server, "/")); registryOf(host) != registry {
			return remote.Login{}, nil
		}
	}
	switch {
	case auth.GetUsername() != "":
		return remote.Login{User: auth.Username, Secret: auth.Password}, nil
	case auth.GetIdentityToken() != "":
		return remote.Login{Secret: auth.IdentityToken}, nil
	case auth.GetAuth() != "":
		decoded, err := base64.StdEncoding.DecodeString(auth.Auth)
		user, secret, ok := strings.Cut(string(decoded), ":")
		if err != nil || !ok {
			return remote.Login{}, errors.New("the field auth of the credentials is not user:password in base64")
		}
		return remote.Login{User: user, Secret: strings.Trim(secret, "\x00")}, nil
	}
	return remote.Login{}, nil
}
