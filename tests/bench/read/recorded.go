package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
)

// wantedRecorded is what is wanted of an image whose archive lists what the heavy import reads: seconds at most, by work.
var wantedRecorded = map[string]float64{testbed.Heavy.Name: 7.5, testbed.Echo.Name: 1.2}

// recorded measures starts of an image that has a recorded list, also of a command that reads nothing of it.
func (w *world) recorded(ctx context.Context) ([]report.Table, error) {
	image, err := w.Publish(ctx, "recorded", w.Whole)
	if err != nil {
		return nil, err
	}
	if err := w.record(ctx, image); err != nil {
		return nil, fmt.Errorf("recording a start: %w", err)
	}
	t := report.Table{
		Title:  report.Rounds("Cold, with a recorded list of the heavy import", w.Rounds),
		Header: []string{"link", "until", "s", "of it the pull", "requests", "MB", "wanted"},
	}
	for _, l := range []testbed.Link{testbed.Unshaped, testbed.Fast, testbed.Slow} {
		for _, work := range []testbed.Work{testbed.Echo, testbed.Heavy} {
			samples, err := w.startsOurs(ctx, l, image, work)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", l.Name, err)
			}
			took, wanted := testbed.MedianOf(samples, testbed.Took), ""
			if l == testbed.Fast {
				wanted = report.AtMost(took, wantedRecorded[work.Name])
			}
			t.Add(l.Name, work.Name, report.Decimals(took), report.Decimals(testbed.MedianOf(samples, func(s testbed.Start) float64 { return s.Pull })),
				fmt.Sprint(testbed.MedianOf(samples, func(s testbed.Start) int64 { return s.Requests })),
				testbed.Megabytes(testbed.MedianOf(samples, func(s testbed.Start) int64 { return s.Bytes })), wanted)
		}
	}
	return []report.Table{t}, nil
}

// record has the heavy import recorded and the list pushed.
func (w *world) record(ctx context.Context, image testbed.Image) (err error) {
	s, err := w.Open(ctx, testbed.Ours, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close(ctx, image.Ref)) }()
	if _, err := s.Pull(ctx, image.Ref); err != nil {
		return err
	}
	_, err = s.Clipctl(ctx, append([]string{"record", image.Ref, "--push", "--"}, testbed.Heavy.Command...)...)
	return err
}

// startsOurs does work in every round, on a site of ours of its own.
func (w *world) startsOurs(ctx context.Context, l testbed.Link, image testbed.Image, work testbed.Work) (samples []testbed.Start, err error) {
	for range w.Rounds {
		s, err := w.Open(ctx, testbed.Ours, "")
		if err != nil {
			return nil, err
		}
		got, err := s.Cold(ctx, l, image.Ref, work)
		if err = errors.Join(err, s.Close(ctx, image.Ref)); err != nil {
			return nil, err
		}
		samples = append(samples, got)
	}
	return samples, nil
}
