package modules

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/imports"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// files are a layer: a name, and what the file begins with.
type files [][2]string

// image is an image whose files are told by their names.
type image struct {
	*Modules
	root  *tree.Node
	names map[File]string
}

// newImage makes an image of layers. Every file that is not empty takes more than a
// page, so that a read is of one.
func newImage(t *testing.T, stack ...files) *image {
	t.Helper()
	var layers []*layer.Index
	var lists []imports.List
	for _, all := range stack {
		var tared []testutil.File
		for _, f := range all {
			if f[1] != "" {
				f[1] += strings.Repeat("\n", page+1)
			}
			tared = append(tared, testutil.File{Name: f[0], Data: f[1]})
		}
		x := index(t, tared...)
		list, err := imports.Open(x.Imports)
		require.NoError(t, err)
		layers, lists = append(layers, x), append(lists, list)
	}
	return merged(t, layers, lists)
}

func index(t *testing.T, all ...testutil.File) *layer.Index {
	t.Helper()
	data := testutil.Tar(t, all...)
	x, err := layer.Build(t.Context(), bytes.NewReader(data), ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}, layer.Options{})
	require.NoError(t, err)
	return x
}

func merged(t *testing.T, layers []*layer.Index, lists []imports.List) *image {
	t.Helper()
	root, err := tree.Merge(layers)
	require.NoError(t, err)
	img := &image{New(root, layers, lists), root, map[File]string{}}
	var walk func(n *tree.Node, path string)
	walk = func(n *tree.Node, path string) {
		if n.Mode&unix.S_IFMT == unix.S_IFREG && n.Size > 0 {
			img.names[fileOf(n)] = path
		}
		for _, c := range n.Children {
			walk(c.Node, path+"/"+c.Name)
		}
	}
	walk(root, "")
	return img
}

// read returns what is read after a file.
func (img *image) read(t *testing.T, name string) (next []string) {
	t.Helper()
	n := img.root.Lookup(name)
	require.NotNil(t, n, name)
	for _, f := range img.Touch(n.Layer, int64(n.Off)) {
		require.Contains(t, img.names, f)
		next = append(next, img.names[f])
	}
	return next
}

const (
	site = "usr/lib/python3/dist-packages/"
	std  = "usr/lib/python3.11/"
	slow = "x = 1"
)

func TestModules(t *testing.T) {
	pkg := func(name string) string { return "/" + site + name }
	for _, c := range []struct {
		name  string
		files files
		read  string
		next  []string
	}{
		{"absolute names", files{
			{site + "pkg/__init__.py", "import pkg.a, other"}, {site + "pkg/a.py", slow}, {site + "other.py", slow},
			{site + "nobody.py", slow},
		}, pkg("pkg/__init__.py"), []string{pkg("pkg/a.py"), pkg("other.py")}},
		{"relative names", files{
			{site + "pkg/__init__.py", slow}, {site + "pkg/a.py", slow}, {site + "pkg/sub/__init__.py", slow},
			{site + "pkg/sub/b.py", "from . import c\nfrom .d import x\nfrom .. import a\nfrom ..sub2.e import y"},
			{site + "pkg/sub/c.py", slow}, {site + "pkg/sub/d.py", slow},
			{site + "pkg/sub2/__init__.py", slow}, {site + "pkg/sub2/e.py", slow},
		}, pkg("pkg/sub/b.py"), []string{pkg("pkg/sub/c.py"), pkg("pkg/sub/d.py"), pkg("pkg/a.py"), pkg("pkg/sub2/__init__.py"), pkg("pkg/sub2/e.py")}},
		{"relative names above the root", files{{"a.py", "from ... import b\nfrom .... import c\nfrom . import c"}, {"b.py", slow}, {"c.py", slow}},
			"/a.py", []string{"/c.py"}},
		{"packages before what is in them", files{
			{site + "main.py", "import pkg.sub.mod"}, {site + "pkg/__init__.py", "from . import first"}, {site + "pkg/first.py", slow},
			{site + "pkg/sub/__init__.py", slow}, {site + "pkg/sub/mod.py", slow},
		}, pkg("main.py"), []string{pkg("pkg/__init__.py"), pkg("pkg/first.py"), pkg("pkg/sub/__init__.py"), pkg("pkg/sub/mod.py")}},
		{"a package before a module of its name", files{
			{site + "main.py", "import pkg"}, {site + "pkg.py", slow}, {site + "pkg/__init__.py", slow},
		}, pkg("main.py"), []string{pkg("pkg/__init__.py")}},
		{"a module before a namespace of its name", files{
			{site + "main.py", "import pkg.a"}, {site + "pkg.py", slow}, {site + "pkg/a.py", slow},
		}, pkg("main.py"), []string{pkg("pkg.py")}},
		{"namespace packages", files{
			{site + "main.py", "import ns.deep.a\nfrom ns.deep import b"}, {site + "ns/deep/a.py", slow}, {site + "ns/deep/b.py", slow},
		}, pkg("main.py"), []string{pkg("ns/deep/a.py"), pkg("ns/deep/b.py")}},
		{"modules that are taken from a package", files{
			{site + "main.py", "from pkg import b, Class, a, sub"}, {site + "pkg/__init__.py", slow},
			{site + "pkg/a.py", slow}, {site + "pkg/b.py", slow}, {site + "pkg/sub/__init__.py", slow},
		}, pkg("main.py"), []string{pkg("pkg/__init__.py"), pkg("pkg/b.py"), pkg("pkg/a.py"), pkg("pkg/sub/__init__.py")}},
		{"nothing is taken from a module", files{
			{site + "main.py", "from a import b"}, {site + "a.py", slow}, {site + "b.py", slow},
		}, pkg("main.py"), []string{pkg("a.py")}},
		{"extensions before sources", files{
			{site + "main.py", "import a, b, libc"}, {site + "a.cpython-311-x86_64-linux-gnu.so", "ELF"}, {site + "a.py", slow},
			{site + "b.py", slow}, {site + "b.so", "ELF"}, {site + "libc.so.6", "ELF"},
		}, pkg("main.py"), []string{pkg("a.cpython-311-x86_64-linux-gnu.so"), pkg("b.so")}},
		{"a package that is an extension", files{
			{site + "main.py", "import pkg.a"}, {site + "pkg/__init__.abi3.so", "ELF"}, {site + "pkg/a.py", slow},
		}, pkg("main.py"), []string{pkg("pkg/__init__.abi3.so"), pkg("pkg/a.py")}},
		{"compiled sources", files{
			{site + "main.py", "import a, pkg, b, c, d"},
			{site + "__pycache__/a.cpython-311.opt-1.pyc", "opt"}, {site + "__pycache__/a.cpython-311.pyc", "pyc"}, {site + "a.py", "import e"},
			{site + "pkg/__pycache__/__init__.cpython-311.pyc", "pyc"}, {site + "pkg/__init__.py", slow},
			{site + "__pycache__/b.cpython-311.opt-2.pyc", "opt"}, {site + "b.py", slow},
			{site + "__pycache__/c.cpython-311.pyc", "gone"}, {site + "c.so", "ELF"},
			{site + "__pycache__/d.cpython-311.pyc.140234", "left by a writer"}, {site + "d.py", slow},
			{site + "__pycache__/nobody.cpython-311.pyc", "of no source"}, {site + "e.py", slow},
		}, pkg("main.py"), []string{
			pkg("__pycache__/a.cpython-311.pyc"), pkg("e.py"), pkg("pkg/__pycache__/__init__.cpython-311.pyc"), pkg("b.py"), pkg("c.so"), pkg("d.py"),
		}},
		{"a compiled source is read", files{
			{site + "__pycache__/a.cpython-311.pyc", "pyc"}, {site + "a.py", "import b"}, {site + "b.py", slow},
		}, pkg("__pycache__/a.cpython-311.pyc"), []string{pkg("b.py")}},
		{"a source is read though it is compiled", files{
			{site + "__pycache__/a.cpython-311.pyc", "pyc"}, {site + "a.py", "import b"}, {site + "b.py", slow},
		}, pkg("a.py"), nil},
		{"roots of distributions and pip", files{
			{"app/main.py", "import os, json.decoder, numpy, yaml, _ssl, venv_only, nowhere"},
			{std + "os.py", slow}, {std + "json/__init__.py", slow}, {std + "json/decoder.py", slow},
			{std + "lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so", "ELF"},
			{"usr/local/lib/python3.11/site-packages/numpy/__init__.py", slow}, {site + "yaml/__init__.py", slow},
			{"opt/venv/lib/python3.11/site-packages/venv_only.py", slow}, {"srv/elsewhere/nowhere.py", slow},
		}, "/app/main.py", []string{
			"/" + std + "os.py", "/" + std + "json/__init__.py", "/" + std + "json/decoder.py", "/usr/local/lib/python3.11/site-packages/numpy/__init__.py",
			pkg("yaml/__init__.py"), "/" + std + "lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so", "/opt/venv/lib/python3.11/site-packages/venv_only.py",
		}},
		{"a program's own directory first", files{
			{"app/main.py", "import util, core.base"}, {"app/util.py", slow}, {"app/core/__init__.py", slow}, {"app/core/base.py", "import util2"},
			{"app/util2.py", slow}, {site + "util.py", slow}, {site + "util2.py", slow},
		}, "/app/main.py", []string{"/app/util.py", "/app/core/__init__.py", "/app/core/base.py", "/app/util2.py"}},
		{"a package named like a root is none", files{
			{"app/main.py", "import a"}, {"lib/pythonic/__init__.py", slow}, {"lib/pythonic/a.py", slow},
		}, "/app/main.py", nil},
		{"in the order of execution", files{
			{"app/main.py", "import z\nimport a"}, {"app/z.py", "import y\nimport x"}, {"app/y.py", "import w"}, {"app/x.py", "import w"}, {"app/w.py", slow},
			{"app/a.py", "import z, w"},
		}, "/app/main.py", []string{"/app/z.py", "/app/y.py", "/app/w.py", "/app/x.py", "/app/a.py"}},
		{"cycles", files{{"app/a.py", "import b, a"}, {"app/b.py", "import c"}, {"app/c.py", "import a, b"}}, "/app/a.py", []string{"/app/b.py", "/app/c.py"}},
		{"an empty package", files{
			{"app/main.py", "from pkg import a"}, {"app/pkg/__init__.py", ""}, {"app/pkg/a.py", "from . import b"}, {"app/pkg/b.py", slow},
		}, "/app/main.py", []string{"/app/pkg/a.py", "/app/pkg/b.py"}},
		{"a file that is no module", files{{"app/notes.txt", "import a"}, {"app/main.py", "import a"}, {"app/a.py", slow}}, "/app/notes.txt", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := newImage(t, c.files)
			require.Equal(t, c.next, img.read(t, c.read))
			require.Empty(t, img.read(t, c.read), "each is told once")
		})
	}
}

// TestOnce tells nothing more of what was told, whoever reads it.
func TestOnce(t *testing.T) {
	img := newImage(t, files{
		{"app/one.py", "import a, b"}, {"app/two.py", "import b, c"}, {"app/a.py", "import d"}, {"app/b.py", slow}, {"app/c.py", slow}, {"app/d.py", slow},
	})
	require.Equal(t, []string{"/app/a.py", "/app/d.py", "/app/b.py"}, img.read(t, "/app/one.py"))
	require.Empty(t, img.read(t, "/app/a.py"))
	require.Equal(t, []string{"/app/c.py"}, img.read(t, "/app/two.py"))
	require.False(t, img.Empty())
}

// TestPlaces has reads that are of the page of a file, and others.
func TestPlaces(t *testing.T) {
	all := files{{"app/main.py", "import a"}, {"app/a.py", slow}}
	main := func(img *image) *tree.Node { return img.root.Lookup("/app/main.py") }
	for _, c := range []struct {
		name string
		off  func(n *tree.Node) int64
		told bool
	}{
		{"its first byte", func(n *tree.Node) int64 { return int64(n.Off) }, true},
		{"its header", func(n *tree.Node) int64 { return int64(n.Off) - 512 }, true},
		{"the last page that has a byte of it", func(n *tree.Node) int64 { return int64(n.Off) - page + 1 }, true},
		{"the page before", func(n *tree.Node) int64 { return int64(n.Off) - page }, false},
		{"a page in its middle", func(n *tree.Node) int64 { return int64(n.Off) + 1 }, true},
		{"the page in which it ends, which another one may begin in", func(n *tree.Node) int64 { return int64(n.Off) + n.Size - page }, false},
		{"behind it", func(n *tree.Node) int64 { return int64(n.Off) + n.Size }, false},
	} {
		img := newImage(t, all)
		require.Equal(t, c.told, len(img.Touch(0, c.off(main(img)))) > 0, c.name)
	}
	img := newImage(t, all)
	off := int64(main(img).Off)
	require.Empty(t, img.Touch(1, off), "another layer")
	require.Empty(t, img.Touch(-1, off))
	require.Empty(t, img.Touch(0, 1<<50))
	require.NotEmpty(t, img.Touch(0, off))
}

// TestNeighbours has a page with the end of one file and the beginning of another: who was told of the first reads it for
// that.
func TestNeighbours(t *testing.T) {
	all := files{{"app/main.py", "import a"}, {"app/a.py", slow}, {"app/b.py", "import c"}, {"app/c.py", slow}}
	for _, told := range []bool{false, true} {
		img := newImage(t, all)
		if told {
			require.Equal(t, []string{"/app/a.py"}, img.read(t, "/app/main.py"))
		}
		a, b := img.root.Lookup("/app/a.py"), img.root.Lookup("/app/b.py")
		end := int64(a.Off) + a.Size - 1
		require.Less(t, int64(b.Off), end+page)
		require.Equal(t, told, len(img.Touch(0, end)) == 0)
		require.Equal(t, told, len(img.Touch(0, int64(b.Off))) > 0, "once, and not before it is read itself")
	}
}

// TestLayers has modules that are spread, replaced and deleted in layers.
func TestLayers(t *testing.T) {
	img := newImage(t,
		files{{site + "pkg/__init__.py", "import gone"}, {site + "gone.py", slow}, {site + "base.py", slow}, {site + "pkg/a.py", "import gone"}},
		files{{site + ".wh.gone.py", ""}, {site + "pkg/a.py", "import base\nimport gone\nfrom . import b"}},
		files{{site + "pkg/b.py", slow}, {"app/main.py", "from pkg import a, b"}},
	)
	require.Equal(t, []string{"/" + site + "pkg/__init__.py", "/" + site + "pkg/a.py", "/" + site + "base.py", "/" + site + "pkg/b.py"}, img.read(t, "/app/main.py"))
}

// TestDeep has a chain of imports that is deeper than what is followed at once, and
// goes on where it is read.
func TestDeep(t *testing.T) {
	const n = 3 * maxDepth
	var all files
	for i := range n {
		all = append(all, [2]string{fmt.Sprintf("app/m%04d.py", i), fmt.Sprintf("import m%04d", i+1)})
	}
	img := newImage(t, all)
	var got []string
	for i := 0; i < n; i++ {
		next := img.read(t, fmt.Sprintf("/app/m%04d.py", i))
		require.LessOrEqual(t, len(next), maxDepth)
		got = append(got, next...)
	}
	require.Len(t, got, n-3, "all but those that somebody had to read first")
	require.True(t, slices.IsSorted(got))
}

// TestReader has somebody read all modules that do not import each other.
func TestReader(t *testing.T) {
	var all files
	for i := range askedMost + 2 {
		all = append(all, [2]string{fmt.Sprintf("app/m%03d.py", i), "import gone"})
	}
	all = append(all, [2]string{"app/z.py", "import y"}, [2]string{"app/y.py", slow})
	img := newImage(t, all)
	for i := range askedMost {
		require.Empty(t, img.read(t, fmt.Sprintf("/app/m%03d.py", i)))
	}
	require.False(t, img.Empty())
	img.read(t, fmt.Sprintf("/app/m%03d.py", askedMost))
	require.True(t, img.Empty())
	require.Empty(t, img.read(t, "/app/z.py"))
}

// TestImporter reads as many, of which each imports enough.
func TestImporter(t *testing.T) {
	var all files
	for i := range 2 * askedMost {
		names := make([]string, askedShare)
		for k := range names {
			names[k] = fmt.Sprintf("n%03d_%d", i, k)
			all = append(all, [2]string{"app/" + names[k] + ".py", slow})
		}
		all = append(all, [2]string{fmt.Sprintf("app/m%03d.py", i), "import " + strings.Join(names, ", ")})
	}
	img := newImage(t, all)
	for i := range 2 * askedMost {
		require.Len(t, img.read(t, fmt.Sprintf("/app/m%03d.py", i)), askedShare)
		require.Empty(t, img.read(t, fmt.Sprintf("/app/n%03d_0.py", i)))
	}
	require.False(t, img.Empty())
}

// TestStrangeLists has lists that are not of their layers.
func TestStrangeLists(t *testing.T) {
	list := func(sources ...imports.Source) imports.List {
		l, err := imports.Open(imports.Append(nil, sources))
		require.NoError(t, err)
		return l
	}
	of := func(entry int) imports.Source {
		return imports.Source{Entry: entry, Imports: []imports.Import{{Module: "b"}, {Module: "x..b", Names: []string{"", "."}}, {Level: 64, Module: "b"}, {}}}
	}
	pad := strings.Repeat("\n", page)
	layers := []*layer.Index{
		index(t, testutil.File{Name: "app/a.py", Data: pad}, testutil.File{Name: "app/b.py", Data: pad}, testutil.File{Name: "app/c.py", Data: pad}),
		index(t, testutil.File{Name: "app/d.py", Data: pad}),
	}
	layers[0].Entries = slices.Insert(layers[0].Entries, 0, layer.Entry{Name: "app/", Type: layer.TypeDir, Mode: 0o755})
	read := func(name string, lists ...imports.List) []string {
		return merged(t, layers, lists).read(t, name)
	}
	b := []string{"/app/b.py"}
	require.Equal(t, b, read("/app/a.py", list(of(1)), list()))
	require.Equal(t, b, read("/app/d.py", list(), list(of(0))))
	require.Empty(t, read("/app/a.py", list(of(1), of(4)), list()), "an entry that does not exist")
	require.Equal(t, b, read("/app/d.py", list(of(1), of(4)), list(of(0))), "the other layer's list is good")
	require.Empty(t, read("/app/d.py", list(), list(of(1<<30))))
	require.Equal(t, b, read("/app/a.py", list(of(0), of(1)), list()), "a directory imports nothing")
	require.True(t, merged(t, layers, []imports.List{list(), list()}).Empty())
}

// TestFollowed has a source of many names be many modules.
func TestFollowed(t *testing.T) {
	const links = 400
	names := make([]string, imports.MaxNames)
	for i := range names {
		names[i] = fmt.Sprint("n", i)
	}
	src := strings.Repeat("from . import "+strings.Join(names, ",")+"\n", 2*maxFollowed/imports.MaxNames/links)
	all := []testutil.File{testutil.File{Name: "app/m0.py", Data: src}}
	var rest strings.Builder
	for i := 1; i < links; i++ {
		fmt.Fprintf(&rest, "import m%d\n", i)
	}
	for _, name := range names {
		all = append(all, testutil.File{Name: "lib/" + name + ".py", Data: slow}) // or they would be left out
	}
	all = append(all, testutil.File{Name: "app/z.py", Data: rest.String() + strings.Repeat("\n", page)})
	x := index(t, all...)
	for i := 1; i < links; i++ {
		x.Entries = append(x.Entries, layer.Entry{Name: fmt.Sprintf("app/m%d.py", i), Link: "app/m0.py", Type: layer.TypeLink})
	}
	list, err := imports.Open(x.Imports)
	require.NoError(t, err)
	img := merged(t, []*layer.Index{x}, []imports.List{list})
	require.NotEmpty(t, img.read(t, "/app/z.py"))
	require.True(t, img.Empty(), "it is given up")
	require.LessOrEqual(t, img.followed, maxFollowed+imports.MaxNames+1)
}

// TestRoots has more directories where modules are looked for than are remembered.
func TestRoots(t *testing.T) {
	all := files{{"app/main.py", "import first, last"}}
	for i := range maxRoots + 1 {
		name := "other"
		switch i {
		case 0:
			name = "first"
		case maxRoots:
			name = "last"
		}
		all = append(all, [2]string{fmt.Sprintf("lib/python%03d/%s.py", i, name), slow})
	}
	require.Equal(t, []string{"/lib/python000/first.py"}, newImage(t, all).read(t, "/app/main.py"))
}

// TestSparse tells nothing of a file with holes.
func TestSparse(t *testing.T) {
	all := []testutil.File{{Name: "app/main.py", Data: "import a, b\n" + strings.Repeat("\n", page)}, {Name: "app/a.py", Data: slow}, {Name: "app/b.py", Data: slow}}
	for _, sparse := range []bool{false, true} {
		x := index(t, all...)
		want := []string{"/app/a.py", "/app/b.py"}
		if sparse {
			a := &x.Entries[1]
			a.Type, a.Extents, want = layer.TypeSparse, []layer.Extent{{Len: 1, Off: a.Off}}, want[1:]
		}
		list, err := imports.Open(x.Imports)
		require.NoError(t, err)
		require.Equal(t, want, merged(t, []*layer.Index{x}, []imports.List{list}).read(t, "/app/main.py"))
	}
}
