package main

import (
	"context"
	"fmt"
	"time"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
)

// work is what a container does.
type work struct {
	name    string
	command []string
	atEnd   bool // the clock runs until it has ended, not until its first output

	most   map[string]float64 // wanted: seconds, by link
	sooner map[string]float64 // wanted: how many times sooner than overlayfs, by link
}

const heavyImport = "import numpy, scipy.stats, pandas, sklearn.linear_model, matplotlib.pyplot"

var works = []work{
	{name: "`echo`", command: []string{"/bin/echo", "done"}, most: map[string]float64{fast.name: 1}},
	{name: "`import numpy`", command: python("import numpy"), sooner: map[string]float64{fast.name: 12}},
	{name: "heavy import", command: python(heavyImport), most: map[string]float64{fast.name: 11}},
	{name: "every file", command: []string{"sh", "-c", "tar cf - --one-file-system -C / . | wc -c"}, atEnd: true,
		sooner: map[string]float64{unshaped.name: 1, fast.name: 1}},
}

const heavy, everything = 2, 3 // in works

func python(script string) []string {
	return []string{"env", "MPLCONFIGDIR=/tmp", "python3", "-c", script + "; print('done', flush=True)"}
}

// starts measures pull and run on sites where nothing is there yet.
func (w *world) starts(ctx context.Context) ([]report.Table, error) {
	touched, err := w.touched(ctx)
	if err != nil {
		return nil, fmt.Errorf("pages touched: %w", err)
	}
	t := report.Table{
		Title:  fmt.Sprintf("Cold: pull and run (%d rounds)", w.rounds),
		Header: []string{"link", "until", "ours: s", "of it the pull", "requests", "MB", "overlayfs: s", "overlayfs ÷ ours", "wanted"},
	}
	needed := report.Table{
		Title:  "Bytes by the first output of the heavy import",
		Header: []string{"link", "MB", "÷ pages touched", "wanted", "÷ files touched", "÷ the least"},
		Notes: fmt.Sprintf("The pages touched have %s MB and stand for %s MB compressed, the whole files that they are of for %s MB. The least that can be fetched for the pages is %s MB.",
			megabytes(touched.pages), megabytes(touched.compressed), megabytes(touched.files), megabytes(touched.least)),
	}
	for _, l := range []link{unshaped, fast, slow} {
		o, p, err := w.startsOver(ctx, l)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.name, err)
		}
		for i, work := range works {
			if len(o[i]) > 0 {
				t.Add(work.row(l, o[i], p[i])...)
			}
		}
		moved := medianOf(o[heavy], func(s start) int64 { return s.bytes })
		share := float64(moved) / float64(touched.compressed)
		needed.Add(l.name, megabytes(moved), decimals(share), report.AtMost(share, 1.15),
			decimals(float64(moved)/float64(touched.files)), decimals(float64(moved)/float64(touched.least)))
	}
	t.Notes = "Every file is until all have been read, the others until the first output."
	return []report.Table{t, needed}, nil
}

// start is a run and the pull before it.
type start struct {
	sample
	pull float64 // seconds
}

func (work work) row(l link, ours, plain []start) []string {
	times, wanted := "", ""
	if len(plain) > 0 {
		var all []float64
		for i := range ours {
			all = append(all, plain[i].seconds/ours[i].seconds)
		}
		x := median(all)
		times = decimals(x)
		if want, ok := work.sooner[l.name]; ok {
			wanted = "ratio " + report.AtLeast(x, want)
		}
	}
	took := medianOf(ours, func(s start) float64 { return s.seconds })
	if want, ok := work.most[l.name]; ok {
		wanted = "seconds " + report.AtMost(took, want)
	}
	other := ""
	if len(plain) > 0 {
		other = decimals(medianOf(plain, func(s start) float64 { return s.seconds }))
	}
	return []string{l.name, work.name, decimals(took), decimals(medianOf(ours, func(s start) float64 { return s.pull })),
		count(medianOf(ours, func(s start) int64 { return s.requests })), megabytes(medianOf(ours, func(s start) int64 { return s.bytes })),
		other, times, wanted}
}

// startsOver does all work on ours and on overlayfs. The slowest link has no overlayfs, which would take minutes, and
// nothing that reads every file.
func (w *world) startsOver(ctx context.Context, l link) (o, p [][]start, err error) {
	o, p = make([][]start, len(works)), make([][]start, len(works))
	contestants := 2
	if l == slow {
		contestants = 1
	}
	err = turns(w.rounds, contestants, func(_, i int) error {
		if i == 1 {
			return w.startsPlain(ctx, l, p)
		}
		for k := range works {
			if l == slow && k == everything {
				continue
			}
			if err := w.startOurs(ctx, l, k, o); err != nil {
				return err
			}
		}
		return nil
	})
	return o, p, err
}

func (w *world) startOurs(ctx context.Context, l link, k int, to [][]start) error {
	s, err := w.open(ctx, ours, "")
	if err != nil {
		return err
	}
	w.registry.Shape(l.Link)
	m := w.measure()
	pull, err := s.pull(ctx, w.whole.ref)
	if err != nil {
		return err
	}
	took, err := s.work(ctx, w.whole.ref, works[k])
	if err != nil {
		return err
	}
	got := start{m.at((pull.Took + took).Seconds()), pull.Took.Seconds()}
	say("%s, %s: %.2f s after a pull of %.2f s, %d requests, %.1f MB", works[k].name, l.name, got.seconds, got.pull, got.requests, float64(got.bytes)/1e6)
	to[k] = append(to[k], got)
	return s.close(ctx, w.whole.ref)
}

// startsPlain pulls once for all work, and has it done one after the other: each is charged with the pull.
func (w *world) startsPlain(ctx context.Context, l link, to [][]start) error {
	s, err := w.open(ctx, plain, "")
	if err != nil {
		return err
	}
	w.registry.Shape(l.Link)
	pull, err := s.pull(ctx, w.whole.ref)
	if err != nil {
		return err
	}
	for k, work := range works {
		took, err := s.work(ctx, w.whole.ref, work)
		if err != nil {
			return err
		}
		got := start{sample{seconds: (pull.Took + took).Seconds()}, pull.Took.Seconds()}
		say("%s, %s, overlayfs: %.2f s after a pull of %.2f s", work.name, l.name, got.seconds, got.pull)
		to[k] = append(to[k], got)
	}
	return s.close(ctx, w.whole.ref)
}

// work does a piece of work and returns how long that took.
func (s *site) work(ctx context.Context, ref string, work work) (time.Duration, error) {
	result, err := s.run(ctx, ref, work.command...)
	return work.took(result), err
}

func (work work) took(r harness.Result) time.Duration {
	if work.atEnd {
		return r.Took
	}
	return r.First
}
