package tree

import (
	"iter"
	"slices"
	"strings"
)

// kids are the names in a directory. Tars list most of them in order: what
// comes in order is in a list, which needs neither hashing nor sorting, and
// what does not in a map. No kids, as of what is no directory, are nil.
type kids struct {
	sorted []kid             // ascending; one without an inode has been removed
	rest   map[string]*inode // names that are not in sorted, all below its last one
}

type kid struct {
	name string
	in   *inode
}

func byName(k kid, name string) int { return strings.Compare(k.name, name) }

// get returns what name is, or nil.
func (k *kids) get(name string) *inode {
	if k == nil || len(k.sorted) == 0 {
		return nil
	}
	last := &k.sorted[len(k.sorted)-1]
	switch c := strings.Compare(name, last.name); {
	case c > 0:
		return nil
	case c == 0:
		return last.in
	}
	if i, found := slices.BinarySearchFunc(k.sorted, name, byName); found {
		return k.sorted[i].in
	}
	return k.rest[name]
}

// set makes name in; nil removes it.
func (k *kids) set(name string, in *inode) {
	if n := len(k.sorted); n == 0 || k.sorted[n-1].name < name {
		if in != nil {
			k.sorted = append(k.sorted, kid{name, in})
		}
		return
	}
	if i, found := slices.BinarySearchFunc(k.sorted, name, byName); found {
		k.sorted[i].in = in
		return
	}
	if in == nil {
		delete(k.rest, name)
		return
	}
	if k.rest == nil {
		k.rest = map[string]*inode{}
	}
	k.rest[name] = in
}

// steps is how many steps it takes to go over all names.
func (k *kids) steps() int {
	if k == nil {
		return 0
	}
	return len(k.sorted) + len(k.rest)
}

// ordered says whether all goes over the names in ascending order.
func (k *kids) ordered() bool { return len(k.rest) == 0 }

// all goes over the names that are there, in no particular order. They may be
// removed meanwhile.
func (k *kids) all() iter.Seq2[string, *inode] {
	return func(yield func(string, *inode) bool) {
		if k == nil {
			return
		}
		for i := range k.sorted {
			if in := k.sorted[i].in; in != nil && !yield(k.sorted[i].name, in) {
				return
			}
		}
		for name, in := range k.rest {
			if !yield(name, in) {
				return
			}
		}
	}
}
