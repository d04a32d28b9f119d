package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/image-spec/identity"
	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
)

type traceOptions struct {
	recordOptions
	html string
}

func newTraceCommand(g *globals) *cobra.Command {
	var o traceOptions
	cmd := &cobra.Command{
		Use:   "trace IMAGE --html FILE [flags] [-- CMD...]",
		Short: "Draw what a start of a lazy image reads and fetches, as one HTML page",
		Long: `Run an image that was pulled lazily, as "clipctl record" does, and draw what it read
and what the daemon fetched meanwhile: over time, and over each layer. The page is
one file that loads nothing.

What is here already is not fetched: to see a cold start, run "clipctl cache prune"
before, when no container of the image runs. Reads are shown once, when a part is
read for the first time. Fetches are all that the daemon made for the image's
layers in that time, whoever they were for.`,
		Example: `  clipctl cache prune && clipctl trace registry.example.com/team/app:1 --html start.html -- python3 -c 'import numpy'
  clipctl trace registry.example.com/team/app:1 --html start.html --from-daemon`,
		Args: recordArgs(&o.recordOptions),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runTrace(cmd.Context(), g, args[0], args[1:], o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.html, "html", "", "page to write")
	f.BoolVar(&o.fromDaemon, "from-daemon", false, "run nothing: draw the image's last ordinary start")
	f.DurationVar(&o.period, "period", record.Period, "how long the command runs at most")
	cmd.MarkFlagsMutuallyExclusive("from-daemon", "period")
	if err := cmd.MarkFlagRequired("html"); err != nil {
		panic(err) // there is no such flag
	}
	return cmd
}

// recordArgs checks IMAGE [-- CMD...].
func recordArgs(o *recordOptions) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if n := cmd.ArgsLenAtDash(); n == 0 || n > 1 || n < 0 && len(args) != 1 {
			return errors.New("name one IMAGE; the command to run comes after --")
		}
		if o.fromDaemon && len(args) > 1 {
			return errors.New("--from-daemon runs no command")
		}
		return nil
	}
}

func runTrace(ctx context.Context, g *globals, name string, args []string, o traceOptions, stdout, stderr io.Writer) error {
	ctx, on, err := g.stage(ctx, name)
	if err != nil {
		return err
	}
	defer on.close()
	diffIDs, err := on.image.RootFS(ctx)
	if err != nil {
		return err
	}
	doc, err := o.recording(ctx, on, identity.ChainID(slices.Clone(diffIDs)), args, stderr)
	if err != nil {
		return err
	}
	warnOfGaps(ctx, doc)
	fetched, err := control.GetFetches(ctx, on.daemon, doc.Began)
	if err != nil {
		return fmt.Errorf("asking the daemon what it fetched: %w", err)
	}
	st, err := control.GetStatus(ctx, on.daemon)
	if err != nil {
		return err
	}
	page := newTrace(name, strings.Join(args, " "), doc, fetched, st.Layers)
	f, err := os.Create(o.html)
	if err != nil {
		return err
	}
	if err := errors.Join(page.write(f), f.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", o.html, err)
	}
	_, err = fmt.Fprintf(stdout, "%s\t%s\n", o.html, page.summary())
	return err
}
