package plugin

import (
	"context"
	"fmt"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/local"
	"github.com/containerd/containerd/v2/plugins"

	"github.com/beam-cloud/containerd-clip/plugin/export"
)

// Installed says whether the containerd that client talks to is built with the
// plugin.
func Installed(ctx context.Context, client *containerd.Client) (bool, error) {
	resp, err := client.IntrospectionService().Plugins(ctx, fmt.Sprintf("type==%s,id==%s", plugins.InternalPlugin, ID))
	if err != nil {
		return false, fmt.Errorf("asking containerd for its plugins: %w", err)
	}
	return len(resp.Plugins) > 0 && resp.Plugins[0].InitErr == nil, nil
}

// Run transfers the image called name, in the namespace of ctx, to e: inside
// containerd if that has the plugin, else in this process. All that e has to
// deliver is delivered when Run returns.
func Run(ctx context.Context, client *containerd.Client, name string, e *Export) error {
	inside, err := Installed(ctx, client)
	if err != nil {
		return err
	}
	var t transfer.Transferrer = client.TransferService()
	if !inside {
		t = local.NewTransferService(export.Store(ctx, client), client.ImageService(), local.TransferConfig{Leases: client.LeasesService()})
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := t.Transfer(ctx, image.NewStore(name), e); err != nil {
		cancel() // containerd does not end the streams of what it never began
		_ = e.Wait()
		return fmt.Errorf("exporting %q: %w", name, err)
	}
	return e.Wait()
}
