package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
)

// What is wanted, by work and link.
var (
	wantedSeconds = map[string]map[string]float64{ // at most
		testbed.Echo.Name:  {testbed.Fast.Name: 1},
		testbed.Heavy.Name: {testbed.Fast.Name: 11},
	}
	wantedRatio = map[string]map[string]float64{ // overlayfs ÷ ours, at least
		testbed.Numpy.Name:      {testbed.Fast.Name: 12},
		testbed.Everything.Name: {testbed.Unshaped.Name: 1, testbed.Fast.Name: 1},
	}
)

// heavy is testbed.Heavy's place among testbed.Works.
var heavy = slices.IndexFunc(testbed.Works, func(w testbed.Work) bool { return w.Name == testbed.Heavy.Name })

// starts measures pull and run on sites where nothing is there yet.
func (w *world) starts(ctx context.Context) ([]report.Table, error) {
	touched, err := w.touched(ctx)
	if err != nil {
		return nil, fmt.Errorf("pages touched: %w", err)
	}
	t := report.Table{
		Title:  report.Rounds("Cold: pull and run", w.Rounds),
		Header: []string{"link", "until", "ours: s", "of it the pull", "requests", "MB", "overlayfs: s", "overlayfs ÷ ours", "wanted"},
	}
	needed := report.Table{
		Title:  "Bytes by the first output of the heavy import",
		Header: []string{"link", "MB", "÷ pages touched", "wanted", "÷ files touched", "÷ the least"},
		Notes: fmt.Sprintf("The pages touched have %s MB and stand for %s MB compressed, the whole files that they are of for %s MB. The least that can be fetched for the pages is %s MB.",
			testbed.Megabytes(touched.pages), testbed.Megabytes(touched.compressed), testbed.Megabytes(touched.files), testbed.Megabytes(touched.least)),
	}
	for _, l := range []testbed.Link{testbed.Unshaped, testbed.Fast, testbed.Slow} {
		o, p, err := w.startsOver(ctx, l)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.Name, err)
		}
		for i, work := range testbed.Works {
			if len(o[i]) > 0 {
				t.Add(row(l, work, o[i], p[i])...)
			}
		}
		moved := testbed.MedianOf(o[heavy], func(s testbed.Start) int64 { return s.Bytes })
		share := float64(moved) / float64(touched.compressed)
		needed.Add(l.Name, testbed.Megabytes(moved), report.Decimals(share), report.AtMost(share, 1.15),
			report.Decimals(float64(moved)/float64(touched.files)), report.Decimals(float64(moved)/float64(touched.least)))
	}
	t.Notes = "Every file is until all have been read, the others until the first output."
	return []report.Table{t, needed}, nil
}

func row(l testbed.Link, work testbed.Work, ours, plain []testbed.Start) []string {
	times, wanted, other := "", "", ""
	took := testbed.MedianOf(ours, testbed.Took)
	if len(plain) > 0 {
		x := testbed.Ratio(plain, ours)
		times = report.Decimals(x)
		if want, ok := wantedRatio[work.Name][l.Name]; ok {
			wanted = "ratio " + report.AtLeast(x, want)
		}
		other = report.Decimals(testbed.MedianOf(plain, testbed.Took))
	}
	if want, ok := wantedSeconds[work.Name][l.Name]; ok {
		wanted = "seconds " + report.AtMost(took, want)
	}
	return []string{l.Name, work.Name, report.Decimals(took), report.Decimals(testbed.MedianOf(ours, func(s testbed.Start) float64 { return s.Pull })),
		fmt.Sprint(testbed.MedianOf(ours, func(s testbed.Start) int64 { return s.Requests })),
		testbed.Megabytes(testbed.MedianOf(ours, func(s testbed.Start) int64 { return s.Bytes })), other, times, wanted}
}

// startsOver does all work on ours and on overlayfs. The slowest link has no overlayfs, which would take minutes, and
// nothing that reads every file.
func (w *world) startsOver(ctx context.Context, l testbed.Link) (o, p [][]testbed.Start, err error) {
	o, p = make([][]testbed.Start, len(testbed.Works)), make([][]testbed.Start, len(testbed.Works))
	contestants := 2
	if l == testbed.Slow {
		contestants = 1
	}
	err = testbed.Turns(w.Rounds, contestants, func(_, i int) error {
		if i == 1 {
			return w.startsPlain(ctx, l, p)
		}
		for k, work := range testbed.Works {
			if l == testbed.Slow && work.Name == testbed.Everything.Name {
				continue
			}
			s, err := w.Open(ctx, testbed.Ours, "")
			if err != nil {
				return err
			}
			got, err := s.Cold(ctx, l, w.Whole.Ref, work)
			if err != nil {
				return err
			}
			o[k] = append(o[k], got)
			if err := s.Close(ctx, w.Whole.Ref); err != nil {
				return err
			}
		}
		return nil
	})
	return o, p, err
}

func (w *world) startsPlain(ctx context.Context, l testbed.Link, to [][]testbed.Start) error {
	s, err := w.Open(ctx, testbed.Plain, "")
	if err != nil {
		return err
	}
	all, err := s.ColdAll(ctx, l, w.Whole.Ref, testbed.Works)
	if err != nil {
		return err
	}
	for k, got := range all {
		to[k] = append(to[k], got)
	}
	return s.Close(ctx, w.Whole.Ref)
}
