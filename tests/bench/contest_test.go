package bench

import (
	"cmp"
	"flag"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
)

// contestant is one of several ways to do the same work. The first of a contest is ours.
type contestant struct {
	name string
	run  func() error

	// How many times ours it is to take at least; 0 if nothing is asked for.
	wantWall, wantCPU float64
}

type cost struct{ wall, cpu time.Duration }

// measure returns what run takes. CPU time is that of the whole process: all goroutines, threads of C, the collector.
func measure(run func() error) (cost, error) {
	runtime.GC()
	cpu, start := processCPU(), time.Now()
	err := run()
	return cost{time.Since(start), processCPU() - cpu}, err
}

func processCPU() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err) // only a bad argument can fail
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// compare holds a contest over work of n bytes. Every iteration is a round in which each contestant runs once, and each
// round starts with another one, so that what else the machine does hits all alike. A ratio is the median of the
// rounds' ratios.
func compare(b *testing.B, title string, n int64, contestants ...contestant) {
	b.Helper()
	costs := make([][]cost, len(contestants))
	for round := 0; b.Loop(); round++ {
		for i := range contestants {
			k := (i + round) % len(contestants)
			c, err := measure(contestants[k].run)
			if err != nil {
				b.Fatalf("%s: %v", contestants[k].name, err)
			}
			costs[k] = append(costs[k], c)
		}
	}
	b.ReportMetric(0, "ns/op") // of a whole round: it says nothing
	t := report.Table{
		Title:  report.Rounds(title, len(costs[0])),
		Header: []string{"", "wall s", "CPU s", "MB/s of CPU", "wall ÷ ours", "CPU ÷ ours", "wanted"},
	}
	wall := func(c cost) float64 { return c.wall.Seconds() }
	cpu := func(c cost) float64 { return c.cpu.Seconds() }
	for i, c := range contestants {
		wallRatio, cpuRatio := ratio(costs[i], costs[0], wall), ratio(costs[i], costs[0], cpu)
		cpuSeconds := medianOf(costs[i], cpu)
		b.ReportMetric(cpuSeconds, unit(c.name)+"-cpu-s")
		if i > 0 {
			b.ReportMetric(wallRatio, unit(c.name)+"-wall-x")
			b.ReportMetric(cpuRatio, unit(c.name)+"-cpu-x")
		}
		t.Add(c.name, report.Decimals(medianOf(costs[i], wall)), report.Decimals(cpuSeconds), fmt.Sprintf("%.0f", float64(n)/1e6/cpuSeconds),
			report.Decimals(wallRatio), report.Decimals(cpuRatio), strings.TrimSpace(verdict("wall", wallRatio, c.wantWall)+" "+verdict("CPU", cpuRatio, c.wantCPU)))
	}
	tables.Tables = append(tables.Tables, t)
}

// once ends a benchmark that measures no time, whose work does not need repeating.
func once(b *testing.B) {
	for b.Loop() {
	}
	b.ReportMetric(0, "ns/op")
}

func unit(name string) string { return strings.ReplaceAll(name, " ", "-") }

func verdict(what string, got, want float64) string {
	if want == 0 {
		return ""
	}
	return what + " " + report.AtLeast(got, want)
}

func medianOf(costs []cost, of func(cost) float64) float64 {
	var all []float64
	for _, c := range costs {
		all = append(all, of(c))
	}
	return median(all)
}

func ratio(costs, to []cost, of func(cost) float64) float64 {
	var all []float64
	for i := range costs {
		all = append(all, of(costs[i])/of(to[i]))
	}
	return median(all)
}

func median[T cmp.Ordered](all []T) T {
	slices.Sort(all)
	return all[len(all)/2]
}

var (
	tables     = report.Report{Name: "index"} // of all benchmarks that ran
	reportFile = flag.String("report", "", "`file` in which the tables replace those of an earlier run")
)
