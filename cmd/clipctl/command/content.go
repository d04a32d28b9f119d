package command

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/plugin/export"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

type ensureOptions struct {
	platforms platformFlags
	from      string
	hosts     []string
}

func newContentCommand(g *globals) *cobra.Command {
	content := newGroup("content", "Look after the content of images in containerd's store")
	var o ensureOptions
	ensure := &cobra.Command{
		Use:   "ensure IMAGE",
		Short: "Fetch what containerd's store lacks of an image",
		Long: `Fetch the layers that containerd's store lacks of an image, because it was
pulled lazily, from the image's registry. After it the image can be exported,
pushed and run with any snapshotter.

Layers are fetched by digest: the image stays what it is, wherever its tag
points now.`,
		Example: `  clipctl content ensure registry.example.com/team/app:1 && ctr image export app.tar registry.example.com/team/app:1`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runEnsure(cmd.Context(), g, args[0], o, cmd.OutOrStdout())
		},
	}
	o.platforms.add(ensure, "fetch")
	addRegistryFlags(ensure, &o.from, &o.hosts)
	content.AddCommand(ensure)
	return content
}

// addRegistryFlags adds the flags of commands that fetch what belongs to an image.
func addRegistryFlags(cmd *cobra.Command, from *string, hosts *[]string) {
	cmd.Flags().StringVar(from, "from", "", "reference to fetch from (default: IMAGE)")
	cmd.Flags().StringSliceVar(hosts, "hosts-dir", defaultHostsDirs, "directories with containerd's <host>/hosts.toml files")
}

func runEnsure(ctx context.Context, g *globals, image string, o ensureOptions, stdout io.Writer) error {
	selection, err := o.platforms.selection()
	if err != nil {
		return err
	}
	ctx, client, err := g.connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	from := o.from
	if from == "" {
		from = image
	}
	fetcher, err := remote.New(remote.Options{ConfigPath: o.hosts}).Fetcher(ctx, from)
	if err != nil {
		return fmt.Errorf("reference %q (name the image's registry with --from): %w", from, err)
	}
	start := time.Now()
	e, err := export.Ensure(ctx, client, image, selection, fetcher)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s\t%d layers were there\t%d blobs fetched\t%s\t%.1fs\n",
		image, e.Present, e.Blobs, size(e.Bytes), time.Since(start).Seconds())
	return nil
}
