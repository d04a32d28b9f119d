// Peers measures this project next to other snapshotters: containerd's overlayfs with a full pull, stargz-snapshotter
// and soci-snapshotter, on one containerd, one image, one registry and one link (package testbed).
//
// The contestants take turns round by round, and a ratio is the median of the rounds' ratios. The peers' daemons and
// what prepares images for them are built from their modules (directory daemons); what is missing is named.
//
// docs/benchmarks.md has the method in detail and the figures; `make bench-peers` writes them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"regexp"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
)

func main() {
	only := flag.String("only", "", "`pattern` of those who take part besides ours")
	note := flag.String("note", "", "`sentence` on the circumstances of the run, for the report")
	report.Main("bench-peers", 5, func(ctx context.Context, rounds int, file string) error {
		return run(ctx, rounds, *only, file, *note)
	})
}

func run(ctx context.Context, rounds int, only, file, note string) (err error) {
	pattern, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	bed, err := testbed.New(ctx, rounds)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bed.Lab.Close()) }()
	c := &contest{World: bed, only: pattern}
	if err := c.prepare(ctx); err != nil {
		return err
	}
	for _, l := range links {
		err := testbed.Turns(rounds, len(c.contestants), func(round, i int) error {
			if err := c.turn(ctx, c.contestants[i], l, round); err != nil {
				return fmt.Errorf("%s, %s: %w", c.contestants[i].name, l.Name, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	all := report.Report{Name: "peers", Tables: c.tables(note)}
	if file != "" {
		if err := c.plots(file, &all); err != nil {
			return err
		}
	}
	return all.Write(file)
}
