package tree_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// maxSteps is how many names a lookup looks at.
const maxSteps = 1 << 10

// TestLookup finds what a process would find whose root the tree is.
func TestLookup(t *testing.T) {
	file := &tree.Node{Mode: unix.S_IFREG, Size: 1}
	dir := func(children ...tree.Dirent) *tree.Node { return &tree.Node{Mode: unix.S_IFDIR, Children: children} }
	link := func(target string) *tree.Node { return &tree.Node{Mode: unix.S_IFLNK, Target: target} }
	lib := dir(tree.Dirent{Name: "libc.so", Node: file}, tree.Dirent{Name: "up", Node: link("../../../usr/lib")})
	root := dir(
		tree.Dirent{Name: "a", Node: link("b")},
		tree.Dirent{Name: "b", Node: link("a")},
		tree.Dirent{Name: "etc", Node: dir(tree.Dirent{Name: "alt", Node: link("/lib/libc.so")})},
		tree.Dirent{Name: "lib", Node: link("usr/lib")},
		tree.Dirent{Name: "usr", Node: dir(tree.Dirent{Name: "lib", Node: lib})},
	)
	for path, want := range map[string]*tree.Node{
		"/":                  root,
		"":                   root,
		"/usr/lib/libc.so":   file,
		"usr//lib/./libc.so": file,
		"/lib/libc.so":       file,
		"/etc/alt":           file,
		"/lib/up/libc.so":    file,
		"/../../lib/../lib":  lib,
		"/lib/libc.so.6":     nil,
		"/lib/libc.so/x":     nil,
		"/lib/libc.so/":      nil,
		"/lib/libc.so/..":    nil,
		"/lib/":              lib,
		"/usr" + strings.Repeat("/.", maxSteps-3) + "/lib": lib,
		"/usr" + strings.Repeat("/.", maxSteps) + "/lib":   nil,
		strings.Repeat("/", 4096):                          nil,
		"/a":                                               nil,
		"/usr/a":                                           nil,
		"/" + strings.Repeat("x", 9):                       nil,
	} {
		require.Same(t, want, root.Lookup(path), path)
	}
}
