package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/snapshotter/control"
)

type statusOptions struct {
	watch bool
	json  bool
}

func newStatusCommand(g *globals) *cobra.Command {
	var o statusOptions
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show which images and containers are lazy, why others are not, and how much of them is here",
		Long: `Show the daemon, the images and containers that use the clip snapshotter, and
their layers: which are lazy, why others are not, how roots are mounted, how much
of each layer is here, who delivers it, and what last went wrong. Of a builder it
shows what became of the images that were indexed by themselves; that needs no
daemon.

Images and containers are containerd's, of all namespaces. Without containerd they
are called what they were pulled by, as far as the daemon knows that.`,
		Example: `  clipctl status
  clipctl status --watch
  clipctl status --json | jq '.images[] | select(.lazy != .layers)'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runStatus(cmd.Context(), g, o, cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVarP(&o.watch, "watch", "w", false, "show it again every second until interrupted")
	cmd.Flags().BoolVar(&o.json, "json", false, "print one JSON document; with --watch one per line")
	return cmd
}

// Between two looks at the daemon.
const watchPeriod = time.Second

func runStatus(ctx context.Context, g *globals, o statusOptions, stdout io.Writer) error {
	for {
		v, err := look(ctx, g)
		if o.watch && ctx.Err() != nil {
			return nil // that is how it ends
		}
		if err != nil {
			return err
		}
		if o.watch && !o.json && isTerminal(stdout) {
			fmt.Fprint(stdout, "\x1b[H\x1b[2J") // home, and clear
		}
		if err := showStatus(stdout, v, o); err != nil || !o.watch {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(watchPeriod):
		}
	}
}

// look asks the daemon and containerd. A machine that only builds has a
// containerd without the snapshotter and, with the watcher alone, no daemon.
func look(ctx context.Context, g *globals) (view, error) {
	var st control.Status
	none := withStatus(ctx, g, func(s control.Status) error { st = s; return nil })
	if none != nil && !errors.Is(none, fs.ErrNotExist) && !errdefs.IsUnavailable(none) {
		return view{}, none
	}
	known, err := askContainerd(ctx, g)
	if none != nil && (!known.asked || known.registered) {
		return view{}, none
	}
	if err != nil {
		return view{}, err
	}
	v := newView(st, known)
	if none != nil {
		v.Daemon, v.Cache = nil, nil
	}
	return v, nil
}

func showStatus(w io.Writer, v view, o statusOptions) error {
	if !o.json {
		return v.write(w)
	}
	enc := json.NewEncoder(w)
	if !o.watch {
		enc.SetIndent("", "  ")
	}
	return enc.Encode(v)
}
