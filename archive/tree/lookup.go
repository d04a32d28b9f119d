package tree

import (
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// maxSteps is how many names one Lookup looks at: no real path has as many, but
// links may lead through 40 times the longest.
const maxSteps = 1 << 10

// Lookup returns what a path below the directory n is, or nil. Symlinks are
// followed, absolute ones from n on, as for a process whose root n is.
func (n *Node) Lookup(path string) *Node {
	if len(path) > maxPath {
		return nil
	}
	at := []*Node{n} // the directories from the root to here
	todo := strings.Split(path, "/")
	for links, steps := 0, 0; len(todo) > 0; steps++ {
		if steps == maxSteps {
			return nil
		}
		name := todo[0]
		todo = todo[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			at = at[:max(len(at)-1, 1)]
			continue
		}
		next := at[len(at)-1].child(name)
		switch {
		case next == nil:
			return nil
		case next.Mode&unix.S_IFMT == unix.S_IFDIR:
			at = append(at, next)
			continue
		case next.Mode&unix.S_IFMT != unix.S_IFLNK:
			if len(todo) > 0 {
				return nil
			}
			return next
		}
		if links++; links > maxNestedLinks {
			return nil
		}
		if strings.HasPrefix(next.Target, "/") {
			at = at[:1]
		}
		todo = append(strings.Split(next.Target, "/"), todo...)
	}
	return at[len(at)-1]
}

// child returns what a name in the directory n is, or nil.
func (n *Node) child(name string) *Node {
	i, found := slices.BinarySearchFunc(n.Children, name, func(d Dirent, name string) int { return strings.Compare(d.Name, name) })
	if !found {
		return nil
	}
	return n.Children[i].Node
}
