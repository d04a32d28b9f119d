// Containerd-stargz-grpc serves stargz-snapshotter, whose own command is not on the Go module proxy.
package main

import (
	"context"
	"os"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/pelletier/go-toml/v2"

	"github.com/beam-cloud/containerd-clip/tests/bench/peers/daemons/internal/serve"
)

func main() { serve.Main(open) }

func open(ctx context.Context, config, root string) (snapshots.Snapshotter, error) {
	var c service.Config
	if config != "" {
		text, err := os.ReadFile(config)
		if err != nil {
			return nil, err
		}
		if err := toml.Unmarshal(text, &c); err != nil {
			return nil, err
		}
	}
	if err := service.Supported(root); err != nil {
		return nil, err
	}
	return service.NewStargzSnapshotterService(ctx, root, &c)
}
