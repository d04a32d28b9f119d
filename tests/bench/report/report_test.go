package report

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestWrite replaces one command's tables, and nothing else.
func TestWrite(t *testing.T) {
	file := filepath.Join(t.TempDir(), "doc.md")
	text := "before\n<!-- begin a -->\nold\n<!-- end a -->\n<!-- begin b -->\nother\n<!-- end b -->\nafter\n"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	table := Table{Title: "New", Header: []string{"x", "y"}, Notes: "Note."}
	table.Add("1", AtMost(2, 1))
	for range 2 {
		if err := (Report{Name: "a", Tables: []Table{table}}).Write(file); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"before\n<!-- begin a -->\n\nGo ", "\n### New\n\n| x | y |\n| --- | --- |\n| 1 | ≤ 1.00: **missed** |\n\nNote.\n", "\n<!-- end a -->\n<!-- begin b -->\nother\n<!-- end b -->\nafter\n"} {
		if strings.Count(string(got), want) != 1 {
			t.Errorf("%q is not there once in:\n%s", want, got)
		}
	}
	if err := (Report{Name: "c"}).Write(file); err == nil {
		t.Error("a document without the lines is accepted")
	}
}

func TestRounds(t *testing.T) {
	for n, want := range map[int]string{1: "Cold (1 round)", 3: "Cold (3 rounds)"} {
		if got := Rounds("Cold", n); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
