package harness

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// The OCI worker runs builds by itself and keeps images where no containerd sees them.
const buildkitOCIConfig = `root = %q

[grpc]
  address = [%q]
[worker.containerd]
  enabled = false
[worker.oci]
  enabled = true
  snapshotter = "native"
  networkMode = "host"
  gc = false
[registry.%q]
  http = true
`

// StartBuildkitOCI starts a buildkitd that needs no containerd. name is unique in the lab.
func (l *Lab) StartBuildkitOCI(ctx context.Context, name string, registry *Registry) (*Buildkit, error) {
	dir := l.Path(name)
	b := &Buildkit{Socket: filepath.Join(dir, "buildkitd.sock"), lab: l}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "buildkitd.toml")
	config := fmt.Sprintf(buildkitOCIConfig, filepath.Join(dir, "root"), "unix://"+b.Socket, registry.Host())
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	var err error
	b.Process, err = l.start(ctx, name, dialable(b.Socket), "buildkitd", "--config", file)
	return b, err
}

// BuildWith builds the Dockerfile in a directory, with an output and further arguments of buildctl's own.
func (b *Buildkit) BuildWith(ctx context.Context, dir, output string, args ...string) (Result, error) {
	return b.lab.Run(ctx, "buildctl", append([]string{"--addr", "unix://" + b.Socket, "build", "--progress", "plain",
		"--frontend", "dockerfile.v0", "--local", "context=" + dir, "--local", "dockerfile=" + dir, "--output", output}, args...)...)
}
