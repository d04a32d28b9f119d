package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"text/tabwriter"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
)

func newStatusCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the images that were indexed by themselves, and the layers that the snapshotter has: which are lazy, and why others are not",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := showIndexed(cmd.Context(), g, cmd.OutOrStdout()); err != nil {
				return err
			}
			return runStatus(cmd.Context(), g.clipAddress, cmd.OutOrStdout())
		},
	}
}

func runStatus(ctx context.Context, address string, stdout io.Writer) error {
	if _, err := os.Stat(address); err != nil {
		return fmt.Errorf("the daemon's socket (is containerd-clip-grpc running? name another with --clip-address): %w", err)
	}
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "clip")
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "IMAGE\tLAYER\tLAZY\tON DISK\tREASON")
	err = sn.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		layer := info.Labels[snapshots.LabelSnapshotDiffID]
		if info.Kind != snapshots.KindCommitted || layer == "" {
			return nil
		}
		lazy := "no"
		if info.Labels[discover.LabelLazy] != "" {
			lazy = "yes"
		}
		usage, err := sn.Usage(ctx, info.Name)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s\t%.19s\t%s\t%s\t%s\n", info.Labels[snapshotters.TargetRefLabel], layer, lazy,
			size(usage.Size), info.Labels[discover.LabelNotLazy])
		return err
	})
	if err != nil {
		return fmt.Errorf("asking the daemon at %s: %w", address, err)
	}
	return w.Flush()
}
