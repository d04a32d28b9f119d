package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
)

// tables are all figures; a note is on the circumstances.
func (c *contest) tables(note string) []report.Table {
	first := c.startTable()
	first.Notes = strings.TrimSpace(strings.Join(append(c.missing, note, first.Notes), "\n\n"))
	return []report.Table{first, c.knownTable(), c.wantedTable(), c.pullTable(), c.findTable(), c.memoryTable(), c.preparationTable()}
}

// full are the contestants that do everything; ours is the first of them.
func (c *contest) full() []*contestant {
	return slices.DeleteFunc(slices.Clone(c.contestants), func(who *contestant) bool { return !who.complete() })
}

// row is one of a comparison: what it is called, and what a contestant's results have of it.
type row[S testbed.Timed] struct {
	name string
	of   func(*results) []S
}

// compare makes a table of times on each link, written by write, and of how many times the first one's time each of the
// others has taken. What is sooner than the first one is bold.
func compare[S testbed.Timed](title, what, unit string, all []*contestant, write func([]S) string, rows ...row[S]) report.Table {
	t := report.Table{Title: title, Header: []string{"link", what}}
	for _, who := range all {
		t.Header = append(t.Header, who.name+": "+unit)
	}
	for _, who := range all[1:] {
		t.Header = append(t.Header, who.name+" ÷ "+all[0].name)
	}
	for _, l := range links {
		for _, row := range rows {
			cells := []string{l.Name, row.name}
			for _, who := range all {
				cells = append(cells, write(row.of(who.results[l])))
			}
			for _, who := range all[1:] {
				x := report.Decimals(testbed.Ratio(row.of(who.results[l]), row.of(all[0].results[l])))
				if strings.HasPrefix(x, "0.") {
					x = "**" + x + "**"
				}
				cells = append(cells, x)
			}
			t.Add(cells...)
		}
	}
	return t
}

func seconds(all []testbed.Sample) string {
	return report.Decimals(testbed.MedianOf(all, testbed.Took))
}

func secondsAndMoved(all []testbed.Start) string {
	return report.Decimals(testbed.MedianOf(all, testbed.Took)) + " / " +
		testbed.Megabytes(testbed.MedianOf(all, func(s testbed.Start) int64 { return s.Bytes }))
}

func startRows(works []testbed.Work) (rows []row[testbed.Start]) {
	for _, work := range works {
		rows = append(rows, row[testbed.Start]{work.Name, func(r *results) []testbed.Start { return r.starts[work.Name] }})
	}
	return rows
}

func (c *contest) startTable() report.Table {
	t := compare(report.Rounds("Cold: pull and run", c.Rounds), "until", "s / MB", c.full(), secondsAndMoved, startRows(testbed.Works)...)
	t.Notes = "Every file is until all have been read, the others until the first output. Where another one is sooner than ours, its ratio is bold."
	return t
}

// knownTable compares those that know the heavy import beforehand.
func (c *contest) knownTable() report.Table {
	var all []*contestant
	for _, name := range []string{recorded, estargzOptimized, ours} {
		if who := c.named(name); who != nil {
			all = append(all, who)
		}
	}
	t := compare("Cold: with the heavy import known beforehand", "until", "s / MB", all, secondsAndMoved, startRows(knowing)...)
	t.Notes = "`echo` shows what the knowledge costs those who do not need it."
	return t
}

// wanted are the seconds that ours should take at most on the slower link, and those that another one took on the
// machine on which they were set.
var wanted = []struct {
	us, other             string
	work                  testbed.Work
	seconds, otherSeconds float64
}{
	{ours, plain, testbed.Echo, 1, 42.9},
	{ours, "SOCI", testbed.Echo, 1, 6.37},
	{ours, estargz, testbed.Echo, 1, 1.02},
	{ours, plain, testbed.Heavy, 11, 44.3},
	{ours, "SOCI", testbed.Heavy, 11, 23.95},
	{ours, estargz, testbed.Heavy, 11, 16.15},
	{recorded, estargzOptimized, testbed.Echo, 1.2, 7.4},
	{recorded, estargzOptimized, testbed.Heavy, 7.5, 9.24},
}

// wantedTable compares ratios with those that the wanted seconds stand for: a machine has its share in all seconds.
func (c *contest) wantedTable() report.Table {
	t := report.Table{
		Title:  "What is wanted in seconds, as ratios: " + testbed.Fast.Name,
		Header: []string{"until", "", "wanted: s", "", "where that was set: s", "ratio here", "wanted"},
		Notes:  "What is wanted of the ratio is what the seconds of the two make, where they were set.",
	}
	for _, w := range wanted {
		us, other := c.named(w.us), c.named(w.other)
		if us == nil || other == nil {
			continue
		}
		starts := func(who *contestant) []testbed.Start { return who.results[testbed.Fast].starts[w.work.Name] }
		times := testbed.Ratio(starts(other), starts(us))
		t.Add(w.work.Name, w.us, report.Decimals(w.seconds), w.other, report.Decimals(w.otherSeconds), report.Decimals(times), report.AtLeast(times, w.otherSeconds/w.seconds))
	}
	return t
}

// named returns a contestant, or nil if it does not take part.
func (c *contest) named(name string) *contestant {
	if i := slices.IndexFunc(c.contestants, func(who *contestant) bool { return who.name == name }); i >= 0 {
		return c.contestants[i]
	}
	return nil
}

func (c *contest) pullTable() report.Table {
	return compare("Pull alone", "layers", "s", c.full(), seconds,
		row[testbed.Sample]{"1", func(r *results) []testbed.Sample { return r.one }},
		row[testbed.Sample]{"40", func(r *results) []testbed.Sample { return r.forty }})
}

func (c *contest) findTable() report.Table {
	return compare("`find /` in a container", "", "s", c.full(), seconds,
		row[testbed.Sample]{"first", func(r *results) []testbed.Sample { return r.find }},
		row[testbed.Sample]{"again", func(r *results) []testbed.Sample { return r.again }})
}

func (c *contest) memoryTable() report.Table {
	t := report.Table{
		Title:  "Memory of the daemon, MiB resident",
		Header: []string{"link", ""},
	}
	lazy := slices.DeleteFunc(c.full(), func(who *contestant) bool { return who.name == plain }) // it has no daemon
	for _, who := range lazy {
		t.Header = append(t.Header, who.name)
	}
	for _, l := range links {
		for _, at := range []struct {
			what string
			of   func(*contestant) []int64
		}{
			{"when every file was read", func(who *contestant) []int64 { return who.results[l].resident }},
			{"at most until then", func(who *contestant) []int64 { return who.results[l].most }},
		} {
			row := []string{l.Name, at.what}
			for _, who := range lazy {
				row = append(row, testbed.Mebibytes(testbed.Median(slices.Clone(at.of(who)))))
			}
			t.Add(row...)
		}
	}
	return t
}

func (c *contest) preparationTable() report.Table {
	t := report.Table{
		Title:  "Preparation of the image, once",
		Header: []string{"", "s", "MB more in the registry", ""},
		Notes:  fmt.Sprintf("The image itself has %s MB. A full pull needs none of this.", testbed.Megabytes(c.Whole.Bytes)),
	}
	for _, p := range c.preparations {
		t.Add(p.name, report.Decimals(p.seconds), testbed.Megabytes(p.added), p.remark)
	}
	return t
}
