package command

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/snapshotter/control"
)

func newCacheCommand(g *globals) *cobra.Command {
	cmd := newGroup("cache", "Look at what the daemon has fetched, and give it up")
	var asJSON, all bool
	ls := &cobra.Command{
		Use:   "ls",
		Short: "List the layers that lazy images use, the least recently read first",
		Example: `  clipctl cache ls
  clipctl cache ls --json | jq '.[] | select(.mounted | not) | .diffID'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withStatus(cmd.Context(), g, func(st control.Status) error { return listCache(cmd.OutOrStdout(), st, asJSON) })
		},
	}
	ls.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	usage := &cobra.Command{
		Use:     "usage",
		Short:   "Show how much disk fetched layers take, and how much of it could be given up",
		Example: `  clipctl cache usage`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withStatus(cmd.Context(), g, func(st control.Status) error { return showUsage(cmd.OutOrStdout(), st) })
		},
	}
	prune := &cobra.Command{
		Use:   "prune",
		Short: "Give up what was fetched of layers that no container uses",
		Long: `Give up what was fetched of layers of which no root is mounted: it is fetched
again when somebody reads it. Images stay, and stay lazy. The layers are not
completed in the background again until their image is pulled or the daemon
starts.

Layers that the kernel uses as devices stay. To be rid of an image, remove it
from containerd.`,
		Example: `  clipctl cache prune
  clipctl cache prune --all`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runPrune(cmd.Context(), g, all, cmd.OutOrStdout())
		},
	}
	prune.Flags().BoolVar(&all, "all", false, "also of layers that containers use: what they read again is fetched again")
	cmd.AddCommand(ls, usage, prune)
	return cmd
}

// withStatus calls f with what the daemon says of itself.
func withStatus(ctx context.Context, g *globals, f func(control.Status) error) error {
	conn, err := g.connectDaemon()
	if err != nil {
		return err
	}
	defer conn.Close()
	st, err := control.GetStatus(ctx, conn)
	if err != nil {
		return fmt.Errorf("asking the daemon at %s: %w", g.clipAddress, err)
	}
	return f(st)
}

func listCache(w io.Writer, st control.Status, asJSON bool) error {
	slices.SortFunc(st.Layers, func(a, b control.Layer) int { return cmp.Or(a.Used.Compare(b.Used), cmp.Compare(a.DiffID, b.DiffID)) })
	if asJSON {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(st.Layers)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "LAYER\tFETCHED\tDISK\tMOUNTED\tCOMPLETE\tLAST READ")
	for _, l := range st.Layers {
		read := "-"
		if !l.Used.IsZero() {
			read = l.Used.Local().Format(time.DateTime)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", l.DiffID, share(l.Fetched, l.Size), size(l.Disk), yes(l.Mounted), yes(l.Complete), read)
	}
	return tw.Flush()
}

func showUsage(w io.Writer, st control.Status) error {
	var mounted int64
	for _, l := range st.Layers {
		if l.Mounted {
			mounted += l.Disk
		}
	}
	_, err := fmt.Fprintf(w, "%s of at most %s in %d layers; %s of it in layers that containers use\n",
		size(st.Cache.Used), size(st.Cache.Max), len(st.Layers), size(mounted))
	return err
}

func runPrune(ctx context.Context, g *globals, all bool, stdout io.Writer) error {
	conn, err := g.connectDaemon()
	if err != nil {
		return err
	}
	defer conn.Close()
	done, err := control.AskPrune(ctx, conn, control.Prune{All: all})
	if err != nil {
		return fmt.Errorf("asking the daemon at %s: %w", g.clipAddress, err)
	}
	_, err = fmt.Fprintf(stdout, "gave up %s of %d layers\n", size(done.Bytes), done.Layers)
	return err
}
