package tree

import (
	"path"
	"testing"
)

func TestCleanPath(t *testing.T) {
	for _, name := range []string{
		"", ".", "./", "..", "../", "/", "//", "a", "a/", "a//", "./a", "./a/", ".//a", "././a", "./.a", ".a", "a/.b", "a/./b",
		"a/../b", "../a", "/a", "/a/", "/../a", "a.", "a./b", "a../b", "a/..", "a/.", "a/...", "./..", "./a//b",
	} {
		if got, want := cleanPath(name), path.Clean(name); got != want {
			t.Errorf("%q: got %q, want %q", name, got, want)
		}
	}
}
