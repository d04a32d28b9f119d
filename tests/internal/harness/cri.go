package harness

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// What else a containerd with CRI needs to know so that it leaves the host alone: pods that use the host's network need
// no CNI plugins, and not every root may lower a process's OOM score. clip is the default snapshotter of pods, as docs/kubernetes.md has it.
const criConfig = `
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "clip"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = %[1]q
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  cdi_spec_dirs = [%[2]q]
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = [%[2]q]
    conf_dir = %[2]q
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      Root = %[3]q
`

// StartCRI starts a containerd that serves Kubernetes' runtime interface, with the daemon's snapshotter as its default.
// sandbox is the image of pods' sandboxes.
func (l *Lab) StartCRI(ctx context.Context, name string, d *Daemon, sandbox string) (*Containerd, error) {
	c := &Containerd{Name: name, binary: "containerd", daemon: d}
	return c, l.firstStart(ctx, c, `"io.containerd.nri.v1.nri"`, fmt.Sprintf(criConfig, sandbox, l.Path(name, "none"), l.Path(name, "runc")))
}

// Dial connects to a gRPC server on a Unix socket, until the lab ends.
func (l *Lab) Dial(socket string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err == nil {
		l.onClose(func(context.Context) error { return conn.Close() })
	}
	return conn, err
}
