// Package lazy registers the lazy snapshotter with a containerd that is built with it.
//
// Importing it does what containerd's configuration of a proxy plugin does: the
// snapshotter is called clip, and is the daemon behind its socket. It is not
// served by containerd itself, because containerd reads the roots that are served
// (it commits, compares, and copies out of them), and who reads what itself serves
// waits for itself; and because containers shall go on while containerd restarts.
package lazy

import (
	"fmt"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/dialer"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// ID is what containerd calls the plugin: io.containerd.snapshotter.v1.clip. A
// proxy plugin of this name cannot be configured as well.
const ID = "clip"

// Config is the plugin's section of containerd's configuration.
type Config struct {
	Address      string   `toml:"address"`      // the daemon's socket
	Root         string   `toml:"root"`         // the daemon's directory, for those who ask for usage of disk
	Capabilities []string `toml:"capabilities"` // see config.toml.example
}

func init() {
	registry.Register(&plugin.Registration{
		Type: plugins.SnapshotPlugin,
		ID:   ID,
		Config: &Config{
			Address:      "/run/containerd-clip-grpc/containerd-clip-grpc.sock",
			Root:         "/var/lib/containerd-clip-grpc",
			Capabilities: []string{"remap-ids"},
		},
		InitFn: connect,
	})
}

// connect returns the daemon's snapshotter. The daemon need not be there yet.
func connect(ic *plugin.InitContext) (any, error) {
	config := ic.Config.(*Config)
	conn, err := grpc.NewClient(dialer.DialAddress(config.Address),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(dialer.ContextDialer),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize)))
	if err != nil {
		return nil, fmt.Errorf("snapshotter %s at %s: %w", ID, config.Address, err)
	}
	ic.Meta.Platforms = append(ic.Meta.Platforms, platforms.DefaultSpec())
	ic.Meta.Capabilities = config.Capabilities
	ic.Meta.Exports = map[string]string{
		plugins.SnapshotterRootDir: config.Root,
		// Without it containerd does not tell the snapshotter which image it pulls.
		"enable_remote_snapshot_annotations": "true",
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), ID), nil
}
