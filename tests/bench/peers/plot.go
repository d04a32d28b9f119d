package main

import (
	"fmt"
	"html"
	"os"
	"path/filepath"
	"strings"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
)

// plotNames are the plots' files, beside the document.
var plotNames = map[testbed.Link]string{testbed.Unshaped: "benchmarks-peers-unshaped.svg", testbed.Fast: "benchmarks-peers-100mbit.svg"}

// plots writes a plot for each link beside the document, and has the report show them.
func (c *contest) plots(document string, r *report.Report) error {
	first := &r.Tables[0]
	for _, l := range links {
		file := filepath.Join(filepath.Dir(document), plotNames[l])
		if err := os.WriteFile(file, []byte(c.plot(l)), 0o644); err != nil {
			return err
		}
		first.Notes += fmt.Sprintf("\n\n![Seconds from the start of the pull, link %s](%s)", l.Name, plotNames[l])
	}
	return nil
}

// Of a plot, in pixels.
const (
	plotWidth = 640
	plotLeft  = 90 // where bars begin
	plotRight = 60 // kept for the figure behind the longest bar
	barHeight = 14
	barStep   = 18
	headStep  = 26
)

const plotHead = `<svg xmlns="http://www.w3.org/2000/svg" width="%[1]d" height="%[2]d" viewBox="0 0 %[1]d %[2]d" role="img" aria-label="%[3]s">
<style>
text { font: 12px sans-serif; fill: #24292f }
.head { font-weight: bold }
.name { text-anchor: end }
.ours { fill: #2f81c7 }
.other { fill: #9aa4ae }
@media (prefers-color-scheme: dark) { text { fill: #d0d7de } .other { fill: #6e7781 } }
</style>
`

// plot draws the seconds of each work on a link as bars, one block per work with a scale of its own.
func (c *contest) plot(l testbed.Link) string {
	var s strings.Builder
	all := c.full()
	height := len(testbed.Works)*(headStep+len(all)*barStep) + headStep
	title := fmt.Sprintf("Seconds from the start of the pull, link %s", l.Name)
	fmt.Fprintf(&s, plotHead, plotWidth, height, html.EscapeString(title))
	fmt.Fprintf(&s, "<text class=\"head\" x=\"4\" y=\"16\">%s</text>\n", html.EscapeString(title))
	y := headStep
	for _, work := range testbed.Works {
		fmt.Fprintf(&s, "<text x=\"4\" y=\"%d\">%s</text>\n", y+16, html.EscapeString(strings.ReplaceAll(work.Name, "`", "")))
		y += headStep
		most := 0.0
		for _, who := range all {
			most = max(most, testbed.MedianOf(who.results[l].starts[work.Name], testbed.Took))
		}
		for _, who := range all {
			took, class := testbed.MedianOf(who.results[l].starts[work.Name], testbed.Took), "other"
			if who.name == ours {
				class = "ours"
			}
			width := took / most * (plotWidth - plotLeft - plotRight)
			fmt.Fprintf(&s, "<text class=\"name\" x=\"%d\" y=\"%d\">%s</text>", plotLeft-8, y+11, html.EscapeString(who.name))
			fmt.Fprintf(&s, "<rect class=\"%s\" x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%d\"/>", class, plotLeft, y, width, barHeight)
			fmt.Fprintf(&s, "<text x=\"%.1f\" y=\"%d\">%.2f</text>\n", plotLeft+width+6, y+11, took)
			y += barStep
		}
	}
	s.WriteString("</svg>\n")
	return s.String()
}
