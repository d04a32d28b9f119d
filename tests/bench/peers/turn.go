package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
)

var links = []testbed.Link{testbed.Unshaped, testbed.Fast}

// turn has a contestant do its work on a link.
func (c *contest) turn(ctx context.Context, who *contestant, l testbed.Link, round int) error {
	r := who.results[l]
	works := who.works
	// What takes long because of the link, and is little else, is done once.
	done := l != testbed.Unshaped && round > 0
	if done {
		works = slices.DeleteFunc(slices.Clone(works), func(w testbed.Work) bool { return w.Name == testbed.Everything.Name })
	}
	var err error
	if who.name == plain {
		err = c.coldAll(ctx, who, l, works, r)
	} else {
		for _, work := range works {
			if err = c.cold(ctx, who, l, work, r); err != nil {
				return fmt.Errorf("%s: %w", work.Name, err)
			}
		}
	}
	if err != nil || done || !who.complete() {
		return err
	}
	if err := pulled(ctx, who, l, who.one, &r.one); err != nil {
		return err
	}
	return pulled(ctx, who, l, who.forty, &r.forty)
}

// cold does a piece of work on a site of its own. After the shortest one it walks the image, after the longest
// one it looks at the daemon.
func (c *contest) cold(ctx context.Context, who *contestant, l testbed.Link, work testbed.Work, r *results) error {
	s, err := who.open(ctx)
	if err != nil {
		return err
	}
	got, err := s.Cold(ctx, l, who.whole, work)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, tail(s))
	}
	r.starts[work.Name] = append(r.starts[work.Name], got)
	switch work.Name {
	case testbed.Echo.Name:
		if !who.complete() {
			break
		}
		if err := find(ctx, s, who.whole, r); err != nil {
			return err
		}
	case testbed.Everything.Name:
		resident, most := s.Process.Resident(), s.Process.Memory()
		testbed.Say("memory, %s, %s: %s MiB, at most %s", l.Name, who.name, testbed.Mebibytes(resident), testbed.Mebibytes(most))
		r.resident, r.most = append(r.resident, resident), append(r.most, most)
	}
	return s.Close(ctx, who.whole)
}

// coldAll does all work on one site, as the pull has brought everything.
func (c *contest) coldAll(ctx context.Context, who *contestant, l testbed.Link, works []testbed.Work, r *results) error {
	s, err := who.open(ctx)
	if err != nil {
		return err
	}
	all, err := s.ColdAll(ctx, l, who.whole, works)
	if err != nil {
		return err
	}
	for i, work := range works {
		r.starts[work.Name] = append(r.starts[work.Name], all[i])
	}
	if err := find(ctx, s, who.whole, r); err != nil {
		return err
	}
	return s.Close(ctx, who.whole)
}

// findScript prints the time, and after each of two walks the number of names and the time.
const findScript = "date +%s.%N; find / -xdev | wc -l; date +%s.%N; find / -xdev | wc -l; date +%s.%N"

// find has a running container walk its root twice.
func find(ctx context.Context, s *testbed.Site, ref string, r *results) error {
	if err := s.StartContainer(ctx, s.Snapshotter, ref, "find", "sleep", "100000"); err != nil {
		return err
	}
	result, err := s.Exec(ctx, "find", "sh", "-c", findScript)
	if err != nil {
		return err
	}
	var at [3]float64
	var names [2]int
	if _, err := fmt.Sscan(result.Stdout, &at[0], &names[0], &at[1], &names[1], &at[2]); err != nil {
		return fmt.Errorf("%q: %w", result.Stdout, err)
	}
	if names[0] != names[1] || names[0] < 50_000 {
		return fmt.Errorf("find has found %d names and then %d", names[0], names[1])
	}
	testbed.Say("find /, %s: %d names in %.2f s, again in %.2f s", s.Snapshotter, names[0], at[1]-at[0], at[2]-at[1])
	r.find = append(r.find, testbed.Sample{Seconds: at[1] - at[0]})
	r.again = append(r.again, testbed.Sample{Seconds: at[2] - at[1]})
	return nil
}

// pulled pulls an image to a new site.
func pulled(ctx context.Context, who *contestant, l testbed.Link, ref string, to *[]testbed.Sample) error {
	s, err := who.open(ctx)
	if err != nil {
		return err
	}
	got, err := s.Pulled(ctx, l, ref)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, tail(s))
	}
	*to = append(*to, got)
	return s.Close(ctx, ref)
}

// tail is the end of the log of a site's snapshotter.
func tail(s *testbed.Site) string {
	if s.Process == nil {
		return ""
	}
	text := strings.TrimSpace(s.Process.Log())
	return text[max(0, len(text)-3000):]
}
