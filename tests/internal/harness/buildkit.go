package harness

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// Buildkit is a buildkitd whose builds run in a containerd.
type Buildkit struct {
	*Process
	Socket string

	lab *Lab
}

// The registry of the tests speaks plain HTTP.
const buildkitConfig = `root = %q

[grpc]
  address = [%q]
[worker.oci]
  enabled = false
[worker.containerd]
  enabled = true
  address = %q
  namespace = %q
  snapshotter = %q
  networkMode = "host"
  gc = false
[registry.%q]
  http = true
`

// StartBuildkit starts a buildkitd that works in c with a snapshotter of c's, and in the namespace that everything is
// in. name is unique in the lab.
func (l *Lab) StartBuildkit(ctx context.Context, name string, c *Containerd, snapshotter string, registry *Registry) (*Buildkit, error) {
	dir := l.Path(name)
	b := &Buildkit{Socket: filepath.Join(dir, "buildkitd.sock"), lab: l}
	config := fmt.Sprintf(buildkitConfig, filepath.Join(dir, "root"), "unix://"+b.Socket, c.Socket, Namespace, snapshotter, registry.Host())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "buildkitd.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	var err error
	b.Process, err = l.start(ctx, name, dialable(b.Socket), "buildkitd", "--config", file)
	return b, err
}

// Build builds the Dockerfile in a directory and keeps the image in containerd under a name.
func (b *Buildkit) Build(ctx context.Context, dir, image string) (Result, error) {
	return b.lab.Run(ctx, "buildctl", "--addr", "unix://"+b.Socket, "build", "--progress", "plain", "--frontend", "dockerfile.v0",
		"--local", "context="+dir, "--local", "dockerfile="+dir, "--output", "type=image,name="+image+",push=false")
}
