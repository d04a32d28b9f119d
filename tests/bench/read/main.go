// Read measures the run side: how long a container takes from the pull to its first output, what that moves over the
// network, and what reading costs once everything is there, next to containerd's overlayfs snapshotter.
//
// It is held on package testbed's sites, with the daemon's default configuration unless a row says otherwise. Ours and
// overlayfs take turns round by round, and a ratio is the median over the rounds, so that it holds on a machine that
// does other work too.
//
// docs/benchmarks.md has the method in detail and the figures; `make bench-read` writes them.
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
	only := flag.String("only", "", "`pattern` of the tables to make; with -report, the others are gone")
	// Contests that take seconds have two rounds more.
	report.Main("bench-read", 3, func(ctx context.Context, rounds int, file string) error { return run(ctx, rounds, *only, file) })
}

// world is the test bed, and what was added to it.
type world struct {
	*testbed.World
}

func run(ctx context.Context, rounds int, only, file string) (err error) {
	pattern, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	bed, err := testbed.New(ctx, rounds)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bed.Lab.Close()) }()
	w := &world{World: bed}
	all := report.Report{Name: "read"}
	for _, part := range []struct {
		name string
		run  func(context.Context) ([]report.Table, error)
	}{
		{"pull", w.pulls},
		{"start", w.starts},
		{"recorded", w.recorded},
		{"warm", w.warm},
		{"memory", w.memory},
	} {
		if !pattern.MatchString(part.name) {
			continue
		}
		tables, err := part.run(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		all.Tables = append(all.Tables, tables...)
	}
	return all.Write(file)
}
