package main

import (
	"context"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
)

// pulls measures what a pull costs that downloads no layer, with one layer and with many.
func (w *world) pulls(ctx context.Context) ([]report.Table, error) {
	t := report.Table{
		Title:  report.Rounds("Pull", w.Rounds+2),
		Header: []string{"link", "1 layer: s", "40 layers: s", "wanted, each", "40 ÷ 1", "wanted"},
	}
	for _, l := range []testbed.Link{testbed.Unshaped, testbed.Fast} {
		var took [2][]testbed.Sample
		err := testbed.Turns(w.Rounds+2, 2, func(_, i int) error {
			s, err := w.pulled(ctx, l, []testbed.Image{w.One, w.Forty}[i])
			took[i] = append(took[i], s)
			return err
		})
		if err != nil {
			return nil, err
		}
		few, many := testbed.MedianOf(took[0], testbed.Took), testbed.MedianOf(took[1], testbed.Took)
		times := testbed.Ratio(took[1], took[0])
		t.Add(l.Name, report.Decimals(few), report.Decimals(many), report.AtMost(max(few, many), 1), report.Decimals(times), report.AtMost(times, 1.3))
	}
	return []report.Table{t}, nil
}

// pulled pulls an image to a new site.
func (w *world) pulled(ctx context.Context, l testbed.Link, img testbed.Image) (testbed.Sample, error) {
	s, err := w.Open(ctx, testbed.Ours, "")
	if err != nil {
		return testbed.Sample{}, err
	}
	got, err := s.Pulled(ctx, l, img.Ref)
	if err != nil {
		return testbed.Sample{}, err
	}
	return got, s.Close(ctx, img.Ref)
}
