// Read measures the run side: how long a container takes from the pull to its first output, what that moves over the
// network, and what reading costs once everything is there, next to containerd's overlayfs snapshotter.
//
// Everything is real: a registry behind a link of a rate and a latency (package harness), containerd with ctr and runc,
// and the daemon with its default configuration unless a row says otherwise. A site is one containerd, with or without
// the daemon; every cold run has a site of its own, made before the clock starts. Ours and overlayfs take turns round
// by round, and a ratio is the median over the rounds, so that it holds on a machine that does other work too.
//
// docs/benchmarks.md has the method in detail and the figures; `make bench-read` writes them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
)

func main() {
	rounds := flag.Int("rounds", 3, "`rounds` of each contest; those that take seconds have two more")
	only := flag.String("only", "", "`pattern` of the tables to make; with -report, the others are gone")
	file := flag.String("report", "", "`file` in which the tables replace those of an earlier run")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, *rounds, *only, *file)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-read:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds int, only, file string) (err error) {
	pattern, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	w, err := newWorld(ctx, rounds)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.lab.Close()) }()
	all := report.Report{Name: "read"}
	for _, part := range []struct {
		name string
		run  func(context.Context) ([]report.Table, error)
	}{
		{"pull", w.pulls},
		{"start", w.starts},
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
