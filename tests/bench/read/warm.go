package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
)

// warmScript measures inside a container and prints seconds by name, the least of three. Its argument says how often it goes over
// everything before, so that all of it is in memory.
//
//go:embed warm.py
var warmScript string

var warmRows = []struct {
	name, what string
	most       float64 // wanted: times overlayfs
}{
	{"walk", "metadata walk: `lstat` of every name", 1.05},
	{"small", "every file of at most 64 KiB", 1.05},
	{"exec", "200 times `/bin/true`", 1.05},
	{"find", "`find /` in a container", 1},
}

// warm measures containers for which everything is there already.
func (w *world) warm(ctx context.Context) (_ []report.Table, err error) {
	sites := make([]*testbed.Site, 2)
	for i, snapshotter := range []string{testbed.Ours, testbed.Plain} {
		s, err := w.Open(ctx, snapshotter, "")
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.Close(ctx, w.Whole.Ref)) }()
		if _, err := s.Pull(ctx, w.Whole.Ref); err != nil {
			return nil, err
		}
		if err := s.StartContainer(ctx, snapshotter, w.Whole.Ref, "warm", "sleep", "100000"); err != nil {
			return nil, err
		}
		if _, err := warm(ctx, s, 2); err != nil {
			return nil, err
		}
		sites[i] = s
	}
	rounds := w.Rounds + 2
	taken := make([]map[string][]float64, 2)
	err = testbed.Turns(rounds, 2, func(_, i int) error {
		got, err := warm(ctx, sites[i], 0)
		if taken[i] == nil {
			taken[i] = map[string][]float64{}
		}
		for name, seconds := range got {
			taken[i][name] = append(taken[i][name], seconds)
		}
		testbed.Say("warm, %s: %v", sites[i].Snapshotter, got)
		return err
	})
	if err != nil {
		return nil, err
	}
	t := report.Table{
		Title:  report.Rounds("Warm: the same in one container", rounds),
		Header: []string{"", "ours: s", "overlayfs: s", "ours ÷ overlayfs", "wanted"},
	}
	for _, row := range warmRows {
		var ratios []float64
		for i := range rounds {
			ratios = append(ratios, taken[0][row.name][i]/taken[1][row.name][i])
		}
		x := testbed.Median(ratios)
		t.Add(row.what, fmt.Sprintf("%.3f", testbed.Median(taken[0][row.name])), fmt.Sprintf("%.3f", testbed.Median(taken[1][row.name])), report.Decimals(x), report.AtMost(x, row.most))
	}
	return []report.Table{t}, nil
}

// warm runs the script in the site's container.
func warm(ctx context.Context, s *testbed.Site, before int) (took map[string]float64, err error) {
	result, err := s.Exec(ctx, "warm", "python3", "-c", warmScript, strconv.Itoa(before))
	if err != nil {
		return nil, err
	}
	return took, json.Unmarshal([]byte(result.Stdout), &took)
}
