package testbed

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
)

// Snapshotters.
const (
	Ours  = "clip"
	Plain = "overlayfs"
)

// Site is a containerd, with one snapshotter that counts.
type Site struct {
	*harness.Containerd
	Snapshotter string
	Process     *harness.Process // the snapshotter's; nil with overlayfs, which is a part of containerd
	Daemon      *harness.Daemon  // the same if it is ours, else nil

	world *World
	names []string // of what runs
}

// Open starts a site with overlayfs, or with ours and a configuration.
func (w *World) Open(ctx context.Context, snapshotter, config string) (s *Site, err error) {
	s = w.newSite(snapshotter)
	if snapshotter == Ours {
		if s.Daemon, err = w.Lab.StartDaemon(ctx, s.names[0], config); err != nil {
			return nil, err
		}
		s.Process = s.Daemon.Process
	}
	if s.Containerd, err = w.Lab.StartContainerd(ctx, s.names[1], s.Daemon); err != nil {
		return nil, err
	}
	return s, w.flush()
}

// flush has written what earlier sites have left to write, which is not the next one's business. It does not wait for
// other file systems of the machine, of which some may not answer.
func (w *World) flush() error {
	dir, err := os.Open(w.Lab.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Syncfs(int(dir.Fd()))
}

// Peer is a snapshotter of others that containerd reaches through a socket.
type Peer struct {
	Name    string // of the snapshotter
	Program string // its daemon
}

// peerConfig is what containerd needs in order to use a peer for lazy pulls, as the peers' documentation says.
const peerConfig = `[proxy_plugins.%[1]s]
  type = "snapshot"
  address = %[2]q
  [proxy_plugins.%[1]s.exports]
    root = %[3]q
    enable_remote_snapshot_annotations = "true"
[plugins.'io.containerd.transfer.v1.local']
  [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
    platform = "linux"
    snapshotter = "overlayfs"
    differ = "walking"
  [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
    platform = "linux"
    snapshotter = "%[1]s"
    differ = "walking"
`

// OpenPeer starts a site with a peer. In its configuration, "{containerd}" stands for containerd's socket. flags are
// more of its daemon's.
func (w *World) OpenPeer(ctx context.Context, p Peer, config string, flags ...string) (s *Site, err error) {
	s = w.newSite(p.Name)
	dir, containerd := w.Lab.Path(s.names[0]), s.names[1]
	root, socket, file := filepath.Join(dir, "root"), filepath.Join(dir, "socket"), filepath.Join(dir, "config.toml")
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	config = strings.ReplaceAll(config, "{containerd}", w.Lab.Path(containerd, "containerd.sock"))
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	flags = append([]string{"--address", socket, "--root", root, "--config", file}, flags...)
	if s.Process, err = w.Lab.StartServer(ctx, s.names[0], socket, p.Program, flags...); err != nil {
		return nil, err
	}
	if s.Containerd, err = w.Lab.StartCustomContainerd(ctx, containerd, "containerd", fmt.Sprintf(peerConfig, p.Name, socket, root)); err != nil {
		return nil, err
	}
	return s, w.flush()
}

func (w *World) newSite(snapshotter string) *Site {
	w.sites++
	return &Site{Snapshotter: snapshotter, world: w, names: []string{fmt.Sprint("d", w.sites), fmt.Sprint("c", w.sites)}}
}

// Close ends a site and removes what it has, so that the next one finds the disk as this one did.
func (s *Site) Close(ctx context.Context, images ...string) error {
	s.world.Registry.Shape(harness.Link{})
	errs := []error{s.RemoveContainers(ctx)}
	for _, ref := range images {
		_, err := s.Ctr(ctx, "image", "rm", "--sync", ref)
		errs = append(errs, err)
	}
	errs = append(errs, s.Containerd.Stop())
	if s.Process != nil {
		errs = append(errs, s.Process.Stop())
	}
	for _, name := range s.names {
		dir := s.world.Lab.Path(name)
		for _, m := range slices.Backward(harness.MountsUnder(dir)) {
			errs = append(errs, unix.Unmount(m, unix.MNT_DETACH))
		}
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// Pull pulls an image.
func (s *Site) Pull(ctx context.Context, ref string) (harness.Result, error) {
	return s.Ctr(ctx, "image", "pull", "--snapshotter", s.Snapshotter, ref)
}

// Run runs a command in a container of its own.
func (s *Site) Run(ctx context.Context, ref string, command ...string) (harness.Result, error) {
	return s.RunContainer(ctx, s.Snapshotter, ref, fmt.Sprint("run-", rand.Uint32()), command...)
}

// Exec runs a command in a container that was started under a name.
func (s *Site) Exec(ctx context.Context, container string, command ...string) (harness.Result, error) {
	args := []string{"task", "exec", "--exec-id", fmt.Sprint("exec-", rand.Uint32()), container}
	return s.Ctr(ctx, append(args, command...)...)
}
