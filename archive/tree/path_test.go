package tree

import (
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strconv"
	"testing"
)

func TestCleanPath(t *testing.T) {
	for _, name := range []string{
		"", ".", "./", "..", "../", "/", "//", "a", "a/", "a//", "./a", "./a/", ".//a", "././a", "./.a", ".a", "a/.b", "a/./b",
		"a/../b", "a/b", "a/b/", "a/b//", "a/b/.c/", "a/b/c/..", "a//b/c", "a/b//c", "a/ /b", "../a", "/a", "/a/", "/../a", "a.", "a./b", "a../b", "a/..", "a/.", "a/...", "./..", "./a//b",
	} {
		if got, want := cleanPath(name), path.Clean(name); got != want {
			t.Errorf("%q: got %q, want %q", name, got, want)
		}
	}
}

// TestSplit has entries follow each other in one directory and leave it.
func TestSplit(t *testing.T) {
	u := newUpper(0, nil, newBudget(baseSteps))
	for _, name := range []string{
		"a/b/c", "a/b/d", "a/b/.", "a/b/..", "a/b/", "a/b/.wh.c", "a/b//e", "./a/b/f", "a/b/g", "h", "i", ".", "./j", "/k", "/l", "/.", "//m", "../n", "../o", "../..",
	} {
		parent, base := u.split(name)
		wantParent, wantBase := path.Split(path.Clean(name))
		if parent != wantParent || base != wantBase {
			t.Errorf("%q: got %q and %q, want %q and %q", name, parent, base, wantParent, wantBase)
		}
		u.last.name = parent
	}
}

// TestKids does with kids and with a map what a tar may make of a directory.
func TestKids(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	inOrder, outOfOrder, removed := 0, 0, 0
	for range 2000 {
		k, want := new(kids), map[string]*inode{}
		next := 0
		for range random.IntN(30) {
			name := strconv.Itoa(100 + random.IntN(20))
			if random.IntN(2) == 0 { // as in a sorted tar
				next++
				name = strconv.Itoa(200 + next)
			}
			in := new(inode)
			if random.IntN(4) == 0 {
				in = nil
			}
			if k.set(name, in); in != nil {
				want[name] = in
			} else {
				delete(want, name)
				removed++
			}
			for i := 90; i < 240; i++ {
				if name := strconv.Itoa(i); k.get(name) != want[name] {
					t.Fatalf("%s is not what was set", name)
				}
			}
			got := maps.Collect(k.all())
			if !maps.Equal(got, want) || k.steps() < len(want) {
				t.Fatalf("got %v, want %v", got, want)
			}
			var names []string
			for name := range k.all() {
				names = append(names, name)
			}
			if k.ordered() && !slices.IsSorted(names) {
				t.Fatalf("%q are out of order", names)
			}
			if k.ordered() {
				inOrder++
			} else {
				outOfOrder++
			}
		}
	}
	if inOrder == 0 || outOfOrder == 0 || removed == 0 {
		t.Error("a case did not occur")
	}
	var none *kids
	if none.get("a") != nil || none.steps() != 0 || len(maps.Collect(none.all())) != 0 {
		t.Error("no kids are some")
	}
}
