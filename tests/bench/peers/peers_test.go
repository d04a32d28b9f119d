package main

import (
	"encoding/xml"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
)

// contestOf is a contest in which every contestant has taken, in each round, so many seconds for everything.
func contestOf(rounds int, took map[string][]float64, names ...string) *contest {
	c := &contest{World: &testbed.World{Rounds: rounds}, only: regexp.MustCompile("")}
	for _, name := range names {
		c.add(contestant{name: name, forty: "forty"})
		who := c.contestants[len(c.contestants)-1]
		for _, l := range links {
			r := who.results[l]
			for _, s := range took[name] {
				sample := testbed.Sample{Seconds: s, Bytes: 2_000_000}
				for _, work := range testbed.Works {
					r.starts[work.Name] = append(r.starts[work.Name], testbed.Start{Sample: sample})
				}
				r.one, r.forty = append(r.one, sample), append(r.forty, sample)
				r.find, r.again = append(r.find, sample), append(r.again, sample)
				r.resident, r.most = append(r.resident, 1<<20), append(r.most, 2<<20)
			}
		}
	}
	return c
}

// TestTables checks that a ratio is of the same round, that losing is bold, and that who is missing is named and has
// no column.
func TestTables(t *testing.T) {
	c := contestOf(3, map[string][]float64{ours: {1, 10, 100}, plain: {4, 30, 500}, "SOCI": {0.5, 20, 1}}, ours, plain, "SOCI")
	c.missing = []string{"eStargz is missing."}
	tables := c.tables("A note.")
	first := tables[0]
	if want := []string{"link", "until", "ours: s / MB", "overlayfs: s / MB", "SOCI: s / MB", "overlayfs ÷ ours", "SOCI ÷ ours"}; !slices.Equal(first.Header, want) {
		t.Errorf("header is %q", first.Header)
	}
	if want := []string{"unshaped", "`echo`", "10.00 / 2.0", "30.00 / 2.0", "1.00 / 2.0", "4.00", "**0.50**"}; !slices.Equal(first.Rows[0], want) {
		t.Errorf("first row is %q", first.Rows[0])
	}
	if !strings.HasPrefix(first.Notes, "eStargz is missing.\n\nA note.\n\n") {
		t.Errorf("notes are %q", first.Notes)
	}
	if want := [][]string{
		{"`echo`", ours, "1.00", plain, "42.90", "4.00", "≥ 42.90: **missed**"},
		{"`echo`", ours, "1.00", "SOCI", "6.37", "0.50", "≥ 6.37: **missed**"},
		{"heavy import", ours, "11.00", plain, "44.30", "4.00", "≥ 4.03: **missed**"},
		{"heavy import", ours, "11.00", "SOCI", "23.95", "0.50", "≥ 2.18: **missed**"},
	}; !reflect.DeepEqual(c.wantedTable().Rows, want) {
		t.Errorf("of what is wanted there is %q", c.wantedTable().Rows)
	}
	for _, table := range tables {
		for _, row := range table.Rows {
			if len(row) != len(table.Header) {
				t.Errorf("%s: %q has not the columns %q", table.Title, row, table.Header)
			}
		}
	}
}

// TestPlot checks that a plot is XML and that bars are as long as what they stand for.
func TestPlot(t *testing.T) {
	c := contestOf(1, map[string][]float64{ours: {1}, "<others>": {4}}, ours, "<others>")
	svg := xml.NewDecoder(strings.NewReader(c.plot(testbed.Fast)))
	var bars []string
	for {
		token, err := svg.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "rect" {
			for _, a := range e.Attr {
				if a.Name.Local == "class" || a.Name.Local == "width" {
					bars = append(bars, a.Value)
				}
			}
		}
	}
	if want := slices.Repeat([]string{"ours", "122.5", "other", "490.0"}, len(testbed.Works)); !slices.Equal(bars, want) {
		t.Errorf("bars are %q, want %q", bars, want)
	}
}
