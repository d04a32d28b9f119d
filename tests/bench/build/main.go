// Build measures the build side from end to end: how long it takes until an image of 2 GB that BuildKit builds can be
// run lazily, and what that moves over the network, with the watcher that indexes out of containerd's store and with
// upstream CLIP that indexes out of the registry.
//
// Everything is real: buildkitd with its containerd worker, containerd, the daemon with its defaults, and a registry
// whose bytes are counted. Every run has all of it for itself, new and empty. The two take turns, and a ratio is the
// median over the rounds.
//
// docs/benchmarks.md has the method in detail and the figures; `make bench-build` writes them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"

	"github.com/rs/zerolog"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
)

func main() {
	size := flag.Float64("gb", 2, "size of the image in the registry, in GB")
	zerolog.SetGlobalLevel(zerolog.Disabled) // upstream CLIP logs each file of an image
	report.Main("bench-build", 3, func(ctx context.Context, rounds int, file string) error {
		return run(ctx, rounds, int64(*size*1e9), file)
	})
}

func run(ctx context.Context, rounds int, size int64, file string) (err error) {
	p, err := prepare(ctx, size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.remove()) }()
	var ours, theirs []outcome
	for round := range rounds {
		runs := []func() error{
			func() error { o, err := p.hooked(ctx); ours = append(ours, o); return err },
			func() error { o, err := p.upstream(ctx); theirs = append(theirs, o); return err },
		}
		if round%2 == 1 {
			slices.Reverse(runs)
		}
		for _, run := range runs {
			if err := run(); err != nil {
				return err
			}
		}
	}
	all := report.Report{Name: "build", Tables: []report.Table{table(p, ours, theirs)}}
	return all.Write(file)
}

// What the project claims.
const (
	wantedTime  = 43   // per cent less
	wantedShare = 0.97 // of the image's bytes that are not fetched: 2 GB of 2 GB, and the archive's own bytes
)

func table(p *prepared, ours, theirs []outcome) report.Table {
	t := report.Table{
		Title:  fmt.Sprintf("From the start of a build to an image that runs lazily (%d rounds)", len(ours)),
		Header: []string{"", "seconds", "build and push", "after that", "fetched MB", "sent MB", "time saved by ours, %", "network saved by ours, MB"},
		Notes: fmt.Sprintf("The image has %.2f GB in the registry, %.2f GB of them in layers of its base. Wanted: time %s; network %s.",
			float64(ours[0].image)/1e9, float64(p.base)/1e9,
			report.AtLeast(saved(ours, theirs, loopback), wantedTime), report.AtLeast(less(ours, theirs), wantedShare*float64(ours[0].image)/1e6)),
	}
	median := func(all []outcome, of func(outcome) float64) string {
		var values []float64
		for _, o := range all {
			values = append(values, of(o))
		}
		slices.Sort(values)
		return report.Decimals(values[len(values)/2])
	}
	mb := func(of func(outcome) int64) func(outcome) float64 {
		return func(o outcome) float64 { return float64(of(o)) / 1e6 }
	}
	built := func(o outcome) float64 { return o.build.Seconds() }
	after := func(o outcome) float64 { return (o.total - o.build).Seconds() }
	afterLinked := func(o outcome) float64 { return (o.linked - o.build).Seconds() }
	fetched, sent := mb(func(o outcome) int64 { return o.fetched }), mb(func(o outcome) int64 { return o.sent })
	t.Add("ours, by itself", median(ours, loopback), median(ours, built), median(ours, after), median(ours, fetched), median(ours, sent), "", "")
	t.Add("upstream CLIP", median(theirs, loopback), median(theirs, built), median(theirs, after), median(theirs, fetched), median(theirs, sent),
		report.Decimals(saved(ours, theirs, loopback)), report.Decimals(less(ours, theirs)))
	t.Add("upstream CLIP, 1 Gbit/s", median(theirs, linked), median(theirs, built), median(theirs, afterLinked), median(theirs, fetched), median(theirs, sent),
		report.Decimals(saved(ours, theirs, linked)), report.Decimals(less(ours, theirs)))
	return t
}

// loopback and linked are the seconds of a whole run.
func loopback(o outcome) float64 { return o.total.Seconds() }
func linked(o outcome) float64   { return o.linked.Seconds() }

// saved is by how many per cent ours is faster, as the median over the rounds.
func saved(ours, theirs []outcome, of func(outcome) float64) float64 {
	var all []float64
	for i := range ours {
		all = append(all, 100*(1-loopback(ours[i])/of(theirs[i])))
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// less is how many MB ours moves less.
func less(ours, theirs []outcome) float64 {
	var all []float64
	for i := range ours {
		all = append(all, float64(theirs[i].fetched+theirs[i].sent-ours[i].fetched-ours[i].sent)/1e6)
	}
	slices.Sort(all)
	return all[len(all)/2]
}
