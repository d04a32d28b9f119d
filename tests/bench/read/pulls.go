package main

import (
	"context"

	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
)

// pull is one to a new site, and the same again in another namespace: all but containerd's part of that is there.
type pull struct{ first, again testbed.Sample }

// pulls measures what a pull costs that downloads no layer, with one layer and with many.
func (w *world) pulls(ctx context.Context) ([]report.Table, error) {
	t := report.Table{
		Title: report.Rounds("Pull", w.Rounds+2),
		Header: []string{"link", "1 layer: s", "40 layers: s", "wanted, each", "40 ÷ 1", "wanted",
			"1 layer, in another namespace then: s", "40 layers: s"},
		Notes: "In another namespace everything is there but what containerd writes down itself, layer by layer.",
	}
	for _, l := range []testbed.Link{testbed.Unshaped, testbed.Fast} {
		var first, again [2][]testbed.Sample
		err := testbed.Turns(w.Rounds+2, 2, func(_, i int) error {
			p, err := w.pulled(ctx, l, []testbed.Image{w.One, w.Forty}[i])
			first[i], again[i] = append(first[i], p.first), append(again[i], p.again)
			return err
		})
		if err != nil {
			return nil, err
		}
		few, many := testbed.MedianOf(first[0], testbed.Took), testbed.MedianOf(first[1], testbed.Took)
		times := testbed.Ratio(first[1], first[0])
		t.Add(l.Name, report.Decimals(few), report.Decimals(many), report.AtMost(max(few, many), 1), report.Decimals(times), report.AtMost(times, 1.3),
			report.Decimals(testbed.MedianOf(again[0], testbed.Took)), report.Decimals(testbed.MedianOf(again[1], testbed.Took)))
	}
	return []report.Table{t}, nil
}

// pulled pulls an image to a new site, and then in another namespace.
func (w *world) pulled(ctx context.Context, l testbed.Link, img testbed.Image) (p pull, err error) {
	s, err := w.Open(ctx, testbed.Ours, "")
	if err != nil {
		return p, err
	}
	if p.first, err = s.Pulled(ctx, l, img.Ref); err != nil {
		return p, err
	}
	if p.again, err = s.Pulled(namespaces.WithNamespace(ctx, "another"), l, img.Ref); err != nil {
		return p, err
	}
	return p, s.Close(ctx, img.Ref)
}
