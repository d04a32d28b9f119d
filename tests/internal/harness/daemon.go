package harness

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// Where the daemon works when nobody says otherwise, as config.toml.example has it.
const (
	defaultRoot   = "/var/lib/containerd-clip-grpc"
	defaultSocket = "/run/containerd-clip-grpc/containerd-clip-grpc.sock"
)

// Daemon is a containerd-clip-grpc.
type Daemon struct {
	*Process
	Name, Config, Root, Socket string
	Program                    string // what RestartDaemon starts; a name among the product's, or a path
}

// StartDaemon starts a daemon in a directory of its own. name is unique in the lab; config is its configuration file's
// content, empty for the defaults.
func (l *Lab) StartDaemon(ctx context.Context, name, config string) (*Daemon, error) {
	d, err := l.newDaemon(name, config)
	if err != nil {
		return nil, err
	}
	return d, l.RestartDaemon(ctx, d)
}

func (l *Lab) newDaemon(name, config string) (*Daemon, error) {
	dir := l.Path(name)
	d := &Daemon{
		Name:   name,
		Config: filepath.Join(dir, "config.toml"),
		Root:   filepath.Join(dir, "root"),
		Socket: filepath.Join(dir, "clip.sock"),

		Program: "containerd-clip-grpc",
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return d, os.WriteFile(d.Config, []byte(config), 0o600)
}

// StartWatcher starts a daemon that only watches, and so has no socket.
func (l *Lab) StartWatcher(ctx context.Context, name, config string) (*Daemon, error) {
	d, err := l.newDaemon(name, config)
	if err != nil {
		return nil, err
	}
	d.Process, err = l.launch(name, 0, d.Program, append([]string{"watch"}, d.args()...)...)
	if err != nil {
		return nil, err
	}
	return d, d.await(ctx, func(context.Context) error {
		if !strings.Contains(d.Log(), "watching for images to index") {
			return errors.New("it does not say that it watches")
		}
		return nil
	})
}

func (d *Daemon) args() []string {
	return []string{"--config", d.Config, "--root", d.Root, "--address", d.Socket, "--log-level", "debug"}
}

// RestartDaemon starts a daemon that was stopped or killed again.
func (l *Lab) RestartDaemon(ctx context.Context, d *Daemon) (err error) {
	d.Process, err = l.start(ctx, d.Name, dialable(d.Socket), d.Program, d.args()...)
	return err
}
