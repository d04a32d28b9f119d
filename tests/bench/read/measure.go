package main

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
)

// link is a network, and what it is called.
type link struct {
	harness.Link
	name string
}

const megabit = 1e6 / 8

var (
	unshaped = link{name: "unshaped"}
	fast     = link{harness.Link{Rate: 100 * megabit, Latency: 10 * time.Millisecond}, "100 Mbit/s + 10 ms"}
	slow     = link{harness.Link{Rate: 25 * megabit, Latency: 30 * time.Millisecond}, "25 Mbit/s + 30 ms"}
)

// sample is what a piece of work took.
type sample struct {
	seconds         float64
	requests, bytes int64 // that the registry was asked for and sent
}

// meter notes what the registry does, moment by moment.
type meter struct {
	began time.Time
	stop  chan struct{}
	done  sync.WaitGroup
	seen  []sample
}

// meterTick is how far a count may be off the moment that it is asked for.
const meterTick = 5 * time.Millisecond

// measure starts a meter at zero.
func (w *world) measure() *meter {
	m := &meter{began: time.Now(), stop: make(chan struct{})}
	requests, bytes := w.registry.Traffic()
	m.done.Go(func() {
		tick := time.NewTicker(meterTick)
		defer tick.Stop()
		for {
			r, b := w.registry.Traffic()
			m.seen = append(m.seen, sample{time.Since(m.began).Seconds(), r - requests, b - bytes})
			select {
			case <-tick.C:
			case <-m.stop:
				return
			}
		}
	})
	return m
}

// at ends the measurement and returns what had happened at a moment of it.
func (m *meter) at(seconds float64) sample {
	close(m.stop)
	m.done.Wait()
	i, _ := slices.BinarySearchFunc(m.seen, seconds, func(s sample, t float64) int { return cmp.Compare(s.seconds, t) })
	s := m.seen[min(i, len(m.seen)-1)]
	s.seconds = seconds
	return s
}

func median[T cmp.Ordered](all []T) T {
	slices.Sort(all)
	return all[len(all)/2]
}

// medianOf is the median of what of returns for each sample.
func medianOf[S any, T cmp.Ordered](samples []S, of func(S) T) T {
	var all []T
	for _, s := range samples {
		all = append(all, of(s))
	}
	return median(all)
}

func seconds(s sample) float64 { return s.seconds }

// ratio is the median over the rounds of how many times b took what a took.
func ratio(b, a []sample) float64 {
	var all []float64
	for i := range a {
		all = append(all, b[i].seconds/a[i].seconds)
	}
	return median(all)
}

// turns runs f for every contestant in every round; each round begins with another one.
func turns(rounds, contestants int, f func(round, contestant int) error) error {
	for round := range rounds {
		for i := range contestants {
			if err := f(round, (i+round)%contestants); err != nil {
				return err
			}
		}
	}
	return nil
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f", float64(n)/1e6) }

func mebibytes(n int64) string { return fmt.Sprintf("%.0f", float64(n)/(1<<20)) }

func count(n int64) string { return fmt.Sprint(n) }

var decimals = report.Decimals
