package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
)

// Namespace is where commands and clients work unless they say otherwise.
const Namespace = "default"

// Containerd is a containerd with root, state and sockets of its own.
type Containerd struct {
	*Process
	Name, Socket string

	lab    *Lab
	dir    string
	daemon *Daemon // nil when it has none
	binary string  // what to run, if not the parts' containerd
	client *containerd.Client
}

// The CRI and NRI plugins are off unless a test is about them: they listen on ports and fixed paths of the host.
const noCRI = `"io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri"`

const containerdConfig = `version = 3
root = %[1]q
state = %[2]q
imports = [%[6]q]
disabled_plugins = [%[7]s]

[grpc]
  address = %[3]q
[ttrpc]
  address = %[4]q
[debug]
  level = "warn"
[plugins.'io.containerd.internal.v1.opt']
  path = %[5]q
`

// StartContainerd starts a containerd. name is unique in the lab. With a daemon it has the clip snapshotter; nil is a
// containerd that knows nothing of it.
func (l *Lab) StartContainerd(ctx context.Context, name string, d *Daemon) (*Containerd, error) {
	c := &Containerd{Name: name, binary: "containerd", daemon: d}
	return c, l.firstStart(ctx, c, noCRI, "")
}

// StartCustomContainerd starts a containerd that somebody built, with more configuration.
func (l *Lab) StartCustomContainerd(ctx context.Context, name, binary, config string) (*Containerd, error) {
	c := &Containerd{Name: name, binary: binary}
	return c, l.firstStart(ctx, c, noCRI, config)
}

func (l *Lab) firstStart(ctx context.Context, c *Containerd, disabled, more string) error {
	dir := l.Path(c.Name)
	c.Socket, c.lab, c.dir = filepath.Join(dir, "containerd.sock"), l, dir
	config := fmt.Sprintf(containerdConfig, filepath.Join(dir, "root"), filepath.Join(dir, "state"), c.Socket,
		c.Socket+".ttrpc", filepath.Join(dir, "opt"), filepath.Join(dir, "conf.d", "*.toml"), disabled)
	if err := os.MkdirAll(filepath.Join(dir, "conf.d"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(c.configFile(), []byte(config), 0o600); err != nil {
		return err
	}
	if more != "" {
		if err := os.WriteFile(filepath.Join(dir, "conf.d", "60-more.toml"), []byte("version = 3\n"+more), 0o600); err != nil {
			return err
		}
	}
	if c.daemon != nil {
		if err := c.daemon.writeExample(filepath.Join(dir, "conf.d", "50-clip.toml")); err != nil {
			return err
		}
	}
	return l.RestartContainerd(ctx, c)
}

// writeExample writes what config.toml.example tells an administrator to write, with the daemon's own paths.
func (d *Daemon) writeExample(file string) error {
	top, err := Top()
	if err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(top, "config.toml.example"))
	if err != nil {
		return err
	}
	config := strings.NewReplacer(defaultSocket, d.Socket, defaultRoot, d.Root).Replace(string(text))
	return os.WriteFile(file, []byte(config), 0o600)
}

func (c *Containerd) configFile() string { return filepath.Join(c.dir, "config.toml") }

// RestartContainerd starts a containerd that was stopped or killed again.
func (l *Lab) RestartContainerd(ctx context.Context, c *Containerd) error {
	ready := func(ctx context.Context) (err error) {
		if c.client == nil {
			if err := dialable(c.Socket)(ctx); err != nil {
				return err
			}
			c.client, err = containerd.New(c.Socket, containerd.WithDefaultNamespace(Namespace))
			if err != nil {
				return err
			}
		}
		_, err = c.client.Version(ctx)
		return err
	}
	process, err := l.start(ctx, c.Name, ready, c.binary, "--config", c.configFile())
	if err != nil {
		return err
	}
	c.Process = process
	l.onClose(func(ctx context.Context) error { return c.RemoveContainers(ctx) })
	return nil
}

// Client talks to this containerd, in Namespace unless the context says otherwise.
func (c *Containerd) Client() *containerd.Client { return c.client }

// ContentPath is the file in which containerd keeps a blob.
func (c *Containerd) ContentPath(digest string) string {
	return filepath.Join(c.dir, "root/io.containerd.content.v1.content/blobs", strings.Replace(digest, ":", "/", 1))
}

// Ctr runs ctr against this containerd, in the context's namespace.
func (c *Containerd) Ctr(ctx context.Context, args ...string) (Result, error) {
	return c.lab.run(ctx, c.environ(ctx), "ctr", args...)
}

// Clipctl runs clipctl against this containerd, in the context's namespace.
func (c *Containerd) Clipctl(ctx context.Context, args ...string) (Result, error) {
	return c.lab.run(ctx, c.environ(ctx), "clipctl", args...)
}

func (c *Containerd) environ(ctx context.Context) []string {
	env := []string{"CONTAINERD_ADDRESS=" + c.Socket, "CONTAINERD_NAMESPACE=" + namespaceOf(ctx)}
	if c.daemon != nil {
		env = append(env, "CLIP_ADDRESS="+c.daemon.Socket)
	}
	return env
}

func namespaceOf(ctx context.Context) string {
	if ns, ok := namespaces.Namespace(ctx); ok {
		return ns
	}
	return Namespace
}

// RunContainer runs a command in a new container and removes it: `ctr run --rm`.
func (c *Containerd) RunContainer(ctx context.Context, snapshotter, ref, id string, command ...string) (Result, error) {
	return c.Ctr(ctx, append(c.runArgs(ctx, "--rm", snapshotter, ref, id), command...)...)
}

// RunContainerWith is RunContainer with more of ctr's flags.
func (c *Containerd) RunContainerWith(ctx context.Context, flags []string, snapshotter, ref, id string, command ...string) (Result, error) {
	args := c.runArgs(ctx, "--rm", snapshotter, ref, id)
	return c.Ctr(ctx, slices.Concat(args[:1], flags, args[1:], command)...)
}

// StartContainer leaves a container running: `ctr run --detach`.
func (c *Containerd) StartContainer(ctx context.Context, snapshotter, ref, id string, command ...string) error {
	_, err := c.Ctr(ctx, append(c.runArgs(ctx, "--detach", snapshotter, ref, id), command...)...)
	return err
}

// runArgs keeps in the lab what runc and ctr else keep in places that all containerds of a host share.
// A cgroup is one of them: without a name of its own it is shared by all containers with the same ID, and ends for all.
// It stays in the namespace's, for all containers together to have the share of one process.
func (c *Containerd) runArgs(ctx context.Context, mode, snapshotter, ref, id string) []string {
	cgroup := "/" + namespaceOf(ctx) + "/" + strings.Join([]string{filepath.Base(c.lab.Dir), filepath.Base(c.dir), id}, "-")
	return []string{"run", mode, "--runc-root", filepath.Join(c.dir, "runc"), "--fifo-dir", filepath.Join(c.dir, "fifo"),
		"--cgroup", cgroup, "--snapshotter", snapshotter, ref, id}
}

// RemoveContainer ends a container's task and removes both.
func (c *Containerd) RemoveContainer(ctx context.Context, id string) error {
	container, err := c.client.LoadContainer(ctx, id)
	if err != nil {
		return err
	}
	if task, err := container.Task(ctx, nil); err == nil {
		if _, err := task.Delete(ctx, containerd.WithProcessKill); err != nil {
			return err
		}
	}
	return container.Delete(ctx, containerd.WithSnapshotCleanup)
}

// RemoveContainers ends all containers the way containerd wants it, so that shims, cgroups and mounts go with them.
func (c *Containerd) RemoveContainers(ctx context.Context) error {
	if !c.Running() {
		return nil // nobody to ask; the sweep does it
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	spaces, err := c.client.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, ns := range spaces {
		ctx := namespaces.WithNamespace(ctx, ns)
		containers, err := c.client.Containers(ctx)
		errs = append(errs, err)
		for _, container := range containers {
			errs = append(errs, c.RemoveContainer(ctx, container.ID()))
		}
	}
	return errors.Join(errs...)
}
