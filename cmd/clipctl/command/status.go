package command

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/spf13/cobra"

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
			return runStatus(cmd.Context(), g, cmd.OutOrStdout())
		},
	}
}

func runStatus(ctx context.Context, g *globals, stdout io.Writer) error {
	conn, err := g.connectDaemon()
	if err != nil {
		return err
	}
	defer conn.Close()
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), snapshotterName)
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
		return fmt.Errorf("asking the daemon at %s: %w", g.clipAddress, err)
	}
	return w.Flush()
}
