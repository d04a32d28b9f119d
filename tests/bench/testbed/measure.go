package testbed

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
)

// Link is a network, and what it is called.
type Link struct {
	harness.Link
	Name string
}

const megabit = 1e6 / 8

// Links that figures are given for.
var (
	Unshaped = Link{Name: "unshaped"}
	Fast     = Link{harness.Link{Rate: 100 * megabit, Latency: 10 * time.Millisecond}, "100 Mbit/s + 10 ms"}
	Slow     = Link{harness.Link{Rate: 25 * megabit, Latency: 30 * time.Millisecond}, "25 Mbit/s + 30 ms"}
)

// Sample is what a piece of work took.
type Sample struct {
	Seconds         float64
	Requests, Bytes int64 // that the registry was asked for and sent
}

// meter notes what the registry does, moment by moment.
type meter struct {
	began time.Time
	stop  chan struct{}
	done  sync.WaitGroup
	seen  []Sample
}

// meterTick is how far a count may be off the moment that it is asked for.
const meterTick = 5 * time.Millisecond

// measure starts a meter at zero.
func (w *World) measure() *meter {
	m := &meter{began: time.Now(), stop: make(chan struct{})}
	requests, bytes := w.Registry.Traffic()
	m.done.Go(func() {
		tick := time.NewTicker(meterTick)
		defer tick.Stop()
		for {
			r, b := w.Registry.Traffic()
			m.seen = append(m.seen, Sample{time.Since(m.began).Seconds(), r - requests, b - bytes})
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
func (m *meter) at(seconds float64) Sample {
	close(m.stop)
	m.done.Wait()
	i, _ := slices.BinarySearchFunc(m.seen, seconds, func(s Sample, t float64) int { return cmp.Compare(s.Seconds, t) })
	s := m.seen[min(i, len(m.seen)-1)]
	s.Seconds = seconds
	return s
}

// Median is the middle one, and the upper of two. It sorts its argument.
func Median[T cmp.Ordered](all []T) T {
	slices.Sort(all)
	return all[len(all)/2]
}

// MedianOf is the median of what of returns for each sample.
func MedianOf[S any, T cmp.Ordered](samples []S, of func(S) T) T {
	var all []T
	for _, s := range samples {
		all = append(all, of(s))
	}
	return Median(all)
}

// Timed is what has taken a time.
type Timed interface{ took() float64 }

func (s Sample) took() float64 { return s.Seconds }

// Took is the seconds that something took.
func Took[S Timed](s S) float64 { return s.took() }

// Ratio is the median over the rounds of how many times b took what a took.
func Ratio[S Timed](b, a []S) float64 {
	var all []float64
	for i := range a {
		all = append(all, b[i].took()/a[i].took())
	}
	return Median(all)
}

// Turns runs f for every contestant in every round; each round begins with another one.
func Turns(rounds, contestants int, f func(round, contestant int) error) error {
	for round := range rounds {
		for i := range contestants {
			if err := f(round, (i+round)%contestants); err != nil {
				return err
			}
		}
	}
	return nil
}

// Megabytes writes a number of bytes.
func Megabytes(n int64) string { return fmt.Sprintf("%.1f", float64(n)/1e6) }

// Mebibytes writes a number of bytes of memory.
func Mebibytes(n int64) string { return fmt.Sprintf("%.0f", float64(n)/(1<<20)) }
