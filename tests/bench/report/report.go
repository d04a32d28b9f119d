// Package report writes the tables of benchmarks: to the terminal, and into the document that keeps them.
package report

import (
	"fmt"
	"os"
	"runtime"
	"strings"
)

// Report is the tables of one command.
type Report struct {
	Name   string // of the command's part of the document
	Tables []Table
}

// Table is one of a report.
type Table struct {
	Title  string
	Header []string
	Rows   [][]string
	Notes  string // a paragraph behind it
}

// Add adds a row.
func (t *Table) Add(row ...string) { t.Rows = append(t.Rows, row) }

// String is the table in Markdown.
func (t Table) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "### %s\n\n| %s |\n|%s\n", t.Title, strings.Join(t.Header, " | "), strings.Repeat(" --- |", len(t.Header)))
	for _, row := range t.Rows {
		fmt.Fprintf(&s, "| %s |\n", strings.Join(row, " | "))
	}
	if t.Notes != "" {
		fmt.Fprintf(&s, "\n%s\n", t.Notes)
	}
	return s.String() + "\n"
}

// Write prints the tables. A file is a document in which they replace what stands between the lines
// "<!-- begin NAME -->" and "<!-- end NAME -->"; no file is none.
func (r Report) Write(file string) error {
	var text strings.Builder
	fmt.Fprintf(&text, "Go %s, %s/%s, %d CPUs.\n\n", strings.TrimPrefix(runtime.Version(), "go"), runtime.GOOS, runtime.GOARCH, runtime.NumCPU())
	for _, t := range r.Tables {
		text.WriteString(t.String())
	}
	fmt.Print("\n", text.String())
	if file == "" {
		return nil
	}
	old, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	begin, end := fmt.Sprintf("<!-- begin %s -->\n", r.Name), fmt.Sprintf("<!-- end %s -->\n", r.Name)
	head, rest, ok := strings.Cut(string(old), begin)
	_, tail, ended := strings.Cut(rest, end)
	if !ok || !ended {
		return fmt.Errorf("%s has no lines %q and %q", file, strings.TrimSpace(begin), strings.TrimSpace(end))
	}
	return os.WriteFile(file, []byte(head+begin+"\n"+text.String()+end+tail), 0o644)
}

// Rounds is the title of a table of what took so many rounds.
func Rounds(title string, n int) string {
	if n == 1 {
		return title + " (1 round)"
	}
	return fmt.Sprintf("%s (%d rounds)", title, n)
}

// Decimals writes a number with two decimals.
func Decimals(x float64) string { return fmt.Sprintf("%.2f", x) }

// AtLeast says whether a figure is what is wanted of it.
func AtLeast(got, want float64) string { return verdict("≥", want, got >= want) }

// AtMost says whether a figure is what is wanted of it.
func AtMost(got, want float64) string { return verdict("≤", want, got <= want) }

func verdict(sign string, want float64, met bool) string {
	if met {
		return fmt.Sprintf("%s %.2f: met", sign, want)
	}
	return fmt.Sprintf("%s %.2f: **missed**", sign, want)
}
