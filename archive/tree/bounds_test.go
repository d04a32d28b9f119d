package tree_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// TestHostilePaths checks that paths made to be expensive are given up on.
func TestHostilePaths(t *testing.T) {
	deep := strings.Repeat("d/", 1000)
	entries := []layer.Entry{{Name: deep, Type: layer.TypeDir}, {Name: "l0", Type: layer.TypeSymlink, Link: "."}}
	for i := range 35 {
		entries = append(entries, layer.Entry{Name: fmt.Sprintf("l%d", i+1), Type: layer.TypeSymlink, Link: fmt.Sprintf("l%d", i)})
	}
	for i := range 2000 {
		entries = append(entries, layer.Entry{Name: fmt.Sprintf("l%d/%s/x", 30+i%5, deep), Type: layer.TypeReg})
	}
	if _, err := tree.Merge([]*layer.Index{{Entries: entries}}); !errors.Is(err, tree.ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
}

// TestDeepPaths checks the deepest path that Linux has, in every layer.
func TestDeepPaths(t *testing.T) {
	var layers []*layer.Index
	for range 127 {
		layers = append(layers, &layer.Index{Entries: []layer.Entry{{Name: strings.Repeat("d/", 2046) + "f", Type: layer.TypeReg}}})
	}
	root, err := tree.Merge(layers)
	if err != nil {
		t.Fatal(err)
	}
	depth := 0
	for ; len(root.Children) > 0; depth++ {
		root = root.Children[0].Node
	}
	if depth != 2047 || root.Layer != 126 {
		t.Errorf("depth %d, file of layer %d", depth, root.Layer)
	}
}

// TestRepeatedEntries merges the same huge list in every layer.
func TestRepeatedEntries(t *testing.T) {
	l := &layer.Index{}
	for i := range 250_000 {
		l.Entries = append(l.Entries, layer.Entry{Name: fmt.Sprintf("%d/%d", i%500, i), Type: layer.TypeReg})
	}
	root, err := tree.Merge([]*layer.Index{l, l, l, l})
	if err != nil {
		t.Fatal(err)
	}
	if len(root.Children) != 500 || len(root.Children[0].Node.Children) != 500 {
		t.Errorf("%d directories of %d files", len(root.Children), len(root.Children[0].Node.Children))
	}
}

// FuzzMerge merges two layers of entries that are spelled by the input, one
// per line.
func FuzzMerge(f *testing.F) {
	f.Add("5 a\n0 a/b\n1 c a/b\n2 d a\n0 d/x", "0 a/.wh.b\n0 .wh.d\n5 d\n0 a/.wh..wh..opq")
	f.Add("2 a b\n2 b a\n0 a/x", "3 .\n0 /\n5 ..\n4 //x/../y")
	f.Add("2 a ../../a/..\n5 a/b/../c\n1 x a/../a", "0 \xff\x00\n9 z")
	f.Fuzz(func(t *testing.T, lower, upper string) {
		layers := []*layer.Index{parseEntries(lower), parseEntries(upper)}
		root, err := tree.Merge(layers)
		if err != nil {
			if !errors.Is(err, tree.ErrInvalid) && !errors.Is(err, tree.ErrUnsupported) {
				t.Fatal(err)
			}
			return
		}
		links := map[*tree.Node]uint32{}
		todo := []*tree.Node{root}
		for len(todo) > 0 {
			n := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			if !slices.IsSortedFunc(n.Children, func(a, b tree.Dirent) int { return strings.Compare(a.Name, b.Name) }) {
				t.Fatalf("unsorted: %v", n.Children)
			}
			for i, c := range n.Children {
				if c.Name == "" || c.Name == "." || c.Name == ".." || strings.ContainsAny(c.Name, "/\x00") || i > 0 && n.Children[i-1].Name == c.Name {
					t.Fatalf("name %q", c.Name)
				}
				if links[c.Node]++; c.Node.Mode&0o170000 == 0o040000 {
					if links[c.Node] > 1 {
						t.Fatalf("directory %q has two names", c.Name)
					}
					todo = append(todo, c.Node)
				} else if links[c.Node] > c.Node.Nlink {
					t.Fatalf("%q has %d links of %d", c.Name, links[c.Node], c.Node.Nlink)
				}
			}
		}
	})
}

func parseEntries(s string) *layer.Index {
	l := &layer.Index{}
	for line := range strings.SplitSeq(s, "\n") {
		fields := append(strings.SplitN(line, " ", 3), "", "")
		e := layer.Entry{Name: fields[1], Link: fields[2]}
		if fields[0] != "" {
			e.Type = fields[0][0]
		}
		l.Entries = append(l.Entries, e)
	}
	return l
}

// benchLayers resemble a distribution, its packages, an application and a
// change to it.
func benchLayers(entries int) []*layer.Index {
	r := rand.New(rand.NewPCG(7, 7))
	layers := make([]*layer.Index, 4)
	for i := range layers {
		l := &layer.Index{}
		last := ""
		for len(l.Entries) < entries/len(layers) {
			top := fmt.Sprintf("usr/lib/python3/dist-packages/package-%03d", r.IntN(200))
			dir := fmt.Sprintf("%s/module-%d", top, r.IntN(5))
			for _, d := range []string{"usr", "usr/lib", "usr/lib/python3", "usr/lib/python3/dist-packages", top, dir} {
				if d > last {
					l.Entries = append(l.Entries, layer.Entry{Name: d + "/", Type: layer.TypeDir, Mode: 0o755, ModTime: 1e9})
				}
			}
			last = dir
			for range 12 {
				l.Entries = append(l.Entries, layer.Entry{
					Name: fmt.Sprintf("%s/file_%x.py", dir, r.IntN(1e6)), Type: layer.TypeReg, Mode: 0o644,
					ModTime: int64(r.IntN(1e9)), Size: 1000, Off: inflate.Out(len(l.Entries) * 2048),
				})
			}
		}
		if i > 0 {
			for j := range 100 {
				e := layers[0].Entries[len(layers[0].Entries)-1-j*7]
				dir, base := e.Name[:strings.LastIndexByte(strings.TrimSuffix(e.Name, "/"), '/')], e.Name[strings.LastIndexByte(strings.TrimSuffix(e.Name, "/"), '/')+1:]
				l.Entries = append(l.Entries, layer.Entry{Name: dir + "/.wh." + strings.TrimSuffix(base, "/") + fmt.Sprint(j), Type: layer.TypeReg})
			}
		}
		layers[i] = l
	}
	return layers
}

func BenchmarkMerge(b *testing.B) {
	for _, n := range []int{65_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			layers := benchLayers(n)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := tree.Merge(layers); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func Example() {
	base := &layer.Index{Entries: []layer.Entry{
		{Name: "etc/", Type: layer.TypeDir, Mode: 0o755},
		{Name: "etc/motd", Type: layer.TypeReg, Mode: 0o644, Size: 12, Off: 1024},
		{Name: "etc/passwd", Type: layer.TypeReg, Mode: 0o644, Size: 30, Off: 2048},
	}}
	change := &layer.Index{Entries: []layer.Entry{
		{Name: "etc/.wh.motd", Type: layer.TypeReg},
		{Name: "etc/hostname", Type: layer.TypeReg, Mode: 0o644, Size: 5, Off: 1024},
	}}
	root, err := tree.Merge([]*layer.Index{base, change})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, c := range root.Children[0].Node.Children {
		fmt.Printf("%s: %d bytes at %d of layer %d\n", c.Name, c.Node.Size, c.Node.Off, c.Node.Layer)
	}
	// Output:
	// hostname: 5 bytes at 1024 of layer 1
	// passwd: 30 bytes at 2048 of layer 0
}

// TestBounds gives up on what no EROFS image can hold, which containerd may
// unpack.
func TestBounds(t *testing.T) {
	big := func(name string) layer.Entry {
		return layer.Entry{Name: "d", Type: layer.TypeDir, Xattrs: []layer.Xattr{{Name: "user." + name, Value: strings.Repeat("v", 60<<10)}}}
	}
	fine := layer.Entry{Name: "f", Type: layer.TypeSparse, Size: 3 << 29, Extents: []layer.Extent{{Pos: 512, Len: 512}}}
	for name, c := range map[string]struct {
		entries []layer.Entry
		layers  int
		ok      bool
	}{
		"xattrs of one directory":    {[]layer.Entry{big("a"), big("b"), big("c"), big("d"), big("e")}, 1, false},
		"xattrs that just fit":       {[]layer.Entry{big("a"), big("b"), big("c"), big("d")}, 1, true},
		"holes of all layers":        {[]layer.Entry{fine}, 6, false},
		"holes that are not so many": {[]layer.Entry{fine}, 5, true},
	} {
		t.Run(name, func(t *testing.T) {
			var layers []*layer.Index
			for range c.layers {
				layers = append(layers, &layer.Index{Entries: c.entries})
			}
			_, err := tree.Merge(layers)
			if c.ok != (err == nil) || err != nil && !errors.Is(err, tree.ErrUnsupported) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// TestTotal has layers that each are all right and together are too much.
func TestTotal(t *testing.T) {
	entries := make([]layer.Entry, 1<<16)
	for i := range entries {
		entries[i] = layer.Entry{Name: fmt.Sprint(i), Type: layer.TypeReg, Mode: 0o644}
	}
	full := slices.Repeat([]*layer.Index{{Entries: entries}}, tree.MaxEntries>>16)
	var total tree.Total
	for _, l := range full {
		if err := total.Add(l); err != nil {
			t.Fatal(err)
		}
	}
	for what, layers := range map[string][]*layer.Index{
		"entries in all layers": append(full[:len(full):len(full)], &layer.Index{Entries: entries[:1]}),
		"512 layers":            slices.Repeat([]*layer.Index{{}}, tree.MaxLayers+1),
	} {
		if _, err := tree.Merge(layers); !errors.Is(err, tree.ErrUnsupported) || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: got %v, want ErrUnsupported", what, err)
		}
	}
	if _, err := tree.Merge(slices.Repeat([]*layer.Index{{}}, tree.MaxLayers)); err != nil {
		t.Error(err)
	}
}
