package main

import (
	"context"
	"fmt"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
)

// pulls measures what a pull costs that downloads no layer, with one layer and with many.
func (w *world) pulls(ctx context.Context) ([]report.Table, error) {
	t := report.Table{
		Title:  fmt.Sprintf("Pull (%d rounds)", w.rounds+2),
		Header: []string{"link", "1 layer: s", "40 layers: s", "wanted, each", "40 ÷ 1", "wanted"},
	}
	for _, l := range []link{unshaped, fast} {
		var took [2][]sample
		err := turns(w.rounds+2, 2, func(_, i int) error {
			s, err := w.pulled(ctx, l, []image{w.one, w.forty}[i])
			took[i] = append(took[i], s)
			return err
		})
		if err != nil {
			return nil, err
		}
		few, many := medianOf(took[0], seconds), medianOf(took[1], seconds)
		times := ratio(took[1], took[0])
		t.Add(l.name, decimals(few), decimals(many), report.AtMost(max(few, many), 1), decimals(times), report.AtMost(times, 1.3))
	}
	return []report.Table{t}, nil
}

// pulled pulls an image to a new site.
func (w *world) pulled(ctx context.Context, l link, img image) (sample, error) {
	s, err := w.open(ctx, ours, "")
	if err != nil {
		return sample{}, err
	}
	w.registry.Shape(l.Link)
	m := w.measure()
	result, err := s.pull(ctx, img.ref)
	if err != nil {
		return sample{}, err
	}
	got := m.at(result.Took.Seconds())
	say("pull of %s, %s: %.2f s, %d requests, %d kB", img.ref, l.name, got.seconds, got.requests, got.bytes/1000)
	return got, s.close(ctx, img.ref)
}
