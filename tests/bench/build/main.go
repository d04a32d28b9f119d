// Build measures the build side from end to end: how long it takes until an image of 2 GB that BuildKit builds can be
// run lazily, and what that moves over the network, with the watcher that indexes out of containerd's store and with
// upstream CLIP that indexes out of the registry.
//
// Everything is real: buildkitd with its containerd worker, containerd, the daemon with its defaults, and a registry
// whose bytes are counted, on loopback and behind a link that all of a run goes through. Every run has all of it for
// itself, new and empty. The two take turns, and a ratio is the median over the rounds.
//
// docs/benchmarks.md has the method in detail and the figures; `make bench-build` writes them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"

	"github.com/rs/zerolog"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
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
	first := make([][]outcome, len(links)*len(contestants)) // those of a link beside each other
	again := make([][]outcome, len(first))
	err = testbed.Turns(rounds, len(first), func(_, i int) error {
		both, err := p.run(ctx, contestants[i%len(contestants)], links[i/len(contestants)])
		first[i], again[i] = append(first[i], both[0]), append(again[i], both[1])
		return err
	})
	if err != nil {
		return err
	}
	return report.Report{Name: "build", Tables: []report.Table{
		table("From the start of a build to an image that runs lazily", p, first),
		table("The same after a change of the last step, on the same builder", p, again),
	}}.Write(file)
}

// What the project claims.
const (
	wantedTime  = 43   // per cent less
	wantedShare = 0.97 // of the image's bytes that are not fetched: 2 GB of 2 GB, and the archive's own bytes
)

func table(title string, p *prepared, results [][]outcome) report.Table {
	image := results[0][0].image
	t := report.Table{
		Title:  report.Rounds(title, len(results[0])),
		Header: []string{"", "seconds", "build and push", "after that", "fetched MB", "sent MB", "time saved by ours, %", "network saved by ours, MB"},
		Notes:  fmt.Sprintf("The image has %.2f GB in the registry, %.2f GB of them in layers of its base.", float64(image)/1e9, float64(p.base)/1e9),
	}
	for i, l := range links {
		ours, theirs := results[2*i], results[2*i+1]
		t.Add(row(contestants[0].name+", "+l.Name, ours, "", "")...)
		t.Add(row(contestants[1].name+", "+l.Name, theirs, report.Decimals(saved(ours, theirs)), report.Decimals(less(ours, theirs)))...)
		t.Notes += fmt.Sprintf(" Wanted with %s: time %s; network %s.", l.Name,
			report.AtLeast(saved(ours, theirs), wantedTime), report.AtLeast(less(ours, theirs), wantedShare*float64(image)/1e6))
	}
	return t
}

// row has the medians of all rounds.
func row(name string, all []outcome, more ...string) []string {
	median := func(of func(outcome) float64) string { return report.Decimals(testbed.MedianOf(all, of)) }
	return append([]string{
		name,
		median(func(o outcome) float64 { return o.total.Seconds() }),
		median(func(o outcome) float64 { return o.build.Seconds() }),
		median(func(o outcome) float64 { return (o.total - o.build).Seconds() }),
		median(func(o outcome) float64 { return float64(o.fetched) / 1e6 }),
		median(func(o outcome) float64 { return float64(o.sent) / 1e6 }),
	}, more...)
}

// saved is by how many per cent ours is faster, as the median over the rounds.
func saved(ours, theirs []outcome) float64 {
	var all []float64
	for i := range ours {
		all = append(all, 100*(1-ours[i].total.Seconds()/theirs[i].total.Seconds()))
	}
	return testbed.Median(all)
}

// less is how many MB ours moves less.
func less(ours, theirs []outcome) float64 {
	var all []float64
	for i := range ours {
		all = append(all, float64(theirs[i].fetched+theirs[i].sent-ours[i].fetched-ours[i].sent)/1e6)
	}
	return testbed.Median(all)
}
