package modules

import (
	"archive/tar"
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/imports"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testelf"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// entry is a file of a layer.
type entry struct {
	name, data, link string
	mode             int64
}

// lib is a library, or an extension, that is small.
func lib(name string, needs ...string) entry { return sized(name, 0x3000, needs...) }

// sized is a library with text bytes of code.
func sized(name string, text int, needs ...string) entry {
	return entry{name: name, data: string(testelf.New(text, needs...).Bytes()), mode: 0o644}
}

// program is a small program.
func program(name string, needs ...string) entry {
	e := lib(name, needs...)
	e.mode = 0o755
	return e
}

func symlink(name, target string) entry { return entry{name: name, link: target, mode: 0o777} }

func source(name, src string) entry {
	return entry{name: name, data: src + string(bytes.Repeat([]byte("\n"), page)), mode: 0o644}
}

// natives is an image of such layers. Of what is read of them it tells parts, too.
func natives(t *testing.T, stack ...[]entry) *image {
	t.Helper()
	var layers []*layer.Index
	var lists []imports.List
	for _, entries := range stack {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, e := range entries {
			h := &tar.Header{Typeflag: tar.TypeReg, Name: e.name, Mode: e.mode, Size: int64(len(e.data))}
			if e.link != "" {
				h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
			}
			require.NoError(t, w.WriteHeader(h))
			_, err := w.Write([]byte(e.data))
			require.NoError(t, err)
		}
		require.NoError(t, w.Close())
		x, err := layer.Build(t.Context(), &b, ocispec.Descriptor{Digest: digest.FromBytes(b.Bytes()), Size: int64(b.Len())}, layer.Options{})
		require.NoError(t, err)
		list, err := imports.Open(x.Imports)
		require.NoError(t, err)
		layers, lists = append(layers, x), append(lists, list)
	}
	return merged(t, layers, lists)
}

// touch returns what is read after the byte at of a file, and of what is no whole file
// how much is before it.
func (img *image) touch(t *testing.T, name string, at int64) (next []string) {
	t.Helper()
	n := img.root.Lookup(name)
	require.NotNil(t, n, name)
	for _, f := range img.Touch(n.Layer, int64(n.Off)+at) {
		name, whole := img.names[f]
		for file, of := range img.names {
			if !whole && f.Layer == file.Layer && f.Off >= file.Off && f.Off+f.Len <= file.Off+file.Len {
				name = fmt.Sprintf("%s+%d+%d", of, f.Off-file.Off, f.Len)
			}
		}
		require.NotEmpty(t, name, "%v is of no file", f)
		next = append(next, name)
	}
	return next
}

// parts are how touch tells of a library that is not small.
func parts(name string, text int, needs ...string) (all []string) {
	f := testelf.New(text, needs...)
	return []string{fmt.Sprintf("/%s+0+%d", name, f.TablesEnd), fmt.Sprintf("/%s+%d+%d", name, f.DataOff, f.Progs[testelf.Data].Filesz)}
}

const usr = "usr/lib/x86_64-linux-gnu/"

func TestLibraries(t *testing.T) {
	const large = smallLibrary // of code, so that all of it is larger
	ext := site + "ext.cpython-311-x86_64-linux-gnu.so"
	for _, c := range []struct {
		name    string
		entries []entry
		read    string
		next    []string
	}{
		{"what a program needs, and what that needs", []entry{
			program("usr/bin/prog", "liba.so.1", "libb.so"), lib(usr+"liba.so.1", "libc.so.6"), lib(usr+"libb.so", "libc.so.6"),
			lib(usr + "libc.so.6"), lib(usr + "nobody.so"), program("usr/bin/other"),
		}, "/usr/bin/prog", []string{"/usr/bin/prog", "/" + usr + "liba.so.1", "/" + usr + "libc.so.6", "/" + usr + "libb.so"}},
		{"through symlinks", []entry{
			symlink("lib", "usr/lib"), symlink("lib64", "usr/lib"), program("usr/bin/prog", "liba.so.1", "libb.so"),
			lib(usr + "liba.so.1.2.3"), symlink(usr+"liba.so.1", "liba.so.1.2"), symlink(usr+"liba.so.1.2", "liba.so.1.2.3"),
			symlink(usr+"libb.so", "/opt/b/any.so"), lib("opt/b/any.so"),
		}, "/usr/bin/prog", []string{"/usr/bin/prog", "/" + usr + "liba.so.1.2.3", "/opt/b/any.so"}},
		{"a library is read", []entry{lib(usr+"liba.so", "libb.so"), lib(usr + "libb.so")}, "/" + usr + "liba.so", []string{"/" + usr + "liba.so", "/" + usr + "libb.so"}},
		{"the shortest path", []entry{
			program("bin/prog", "liba.so"), lib("opt/long/way/liba.so"), lib("usr/lib/liba.so"), lib("var/lib/app/liba.so"),
		}, "/bin/prog", []string{"/bin/prog", "/usr/lib/liba.so"}},
		{"the first of paths as short", []entry{program("bin/prog", "liba.so"), lib("lib1/liba.so"), lib("lib2/liba.so")}, "/bin/prog", []string{"/bin/prog", "/lib1/liba.so"}},
		{"what is missing", []entry{
			program("bin/prog", "libgone.so", "libdangling.so", "libdir.so", "libscript.so", "libz.so"), symlink("lib/libdangling.so", "gone.so"),
			{name: "lib/libdir.so/file", mode: 0o644}, {name: "lib/libscript.so", data: "INPUT(libz.so)", mode: 0o644}, lib("lib/libz.so", "libgone.so"),
		}, "/bin/prog", []string{"/bin/prog", "/lib/libz.so"}},
		{"cycles", []entry{lib("lib/a.so", "b.so"), lib("lib/b.so", "c.so", "b.so"), lib("lib/c.so", "a.so", "b.so")}, "/lib/a.so", []string{"/lib/a.so", "/lib/b.so", "/lib/c.so"}},
		{"a large library", []entry{program("bin/prog", "a.so"), sized("lib/a.so", large, "b.so"), lib("lib/b.so")}, "/bin/prog",
			append(append([]string{"/bin/prog"}, parts("lib/a.so", large, "b.so")...), "/lib/b.so")},
		{"a program as large", []entry{{name: "bin/prog", data: string(testelf.New(large, "b.so").Bytes()), mode: 0o755}, lib("lib/b.so")}, "/bin/prog",
			[]string{"/bin/prog", "/lib/b.so"}},
		{"a large program", []entry{{name: "bin/prog", data: string(testelf.New(smallProgram, "b.so").Bytes()), mode: 0o755}, lib("lib/b.so")}, "/bin/prog",
			append(parts("bin/prog", smallProgram, "b.so"), "/lib/b.so")},
		{"an extension and what it needs", []entry{
			source("app/main.py", "import ext, a"), lib(ext, "libx.so"), lib(usr+"libx.so", "liby.so"), lib(usr + "liby.so"), source("app/a.py", slow),
		}, "/app/main.py", []string{"/" + ext, "/" + usr + "libx.so", "/" + usr + "liby.so", "/app/a.py"}},
		{"a large extension: what it needs before all of it", []entry{
			source("app/main.py", "import ext, a"), sized(ext, large, "libx.so"), lib(usr + "libx.so"), source("app/a.py", slow),
		}, "/app/main.py", append(parts(ext, large, "libx.so"), "/"+usr+"libx.so", "/"+ext, "/app/a.py")},
		{"an extension is read", []entry{lib(ext, "libx.so"), lib(usr + "libx.so")}, "/" + ext, []string{"/" + ext, "/" + usr + "libx.so"}},
		{"a module is no library", []entry{program("bin/prog", "a.py", "prog2"), source("app/a.py", "import b"), source("app/b.py", slow), program("bin/prog2")},
			"/bin/prog", []string{"/bin/prog"}},
		{"the interpreter", []entry{
			program("usr/bin/python3.11", "libc.so.6"), lib(usr + "libc.so.6"),
			source(std+"encodings/__init__.py", "from . import aliases"), source(std+"encodings/aliases.py", slow), source(std+"encodings/utf_8.py", "import codecs"),
			source(std+"encodings/latin_1.py", slow), source(std+"codecs.py", slow), source(std+"sitecustomize.py", slow), source(std+"os.py", slow),
		}, "/usr/bin/python3.11", []string{
			"/usr/bin/python3.11", "/" + usr + "libc.so.6", "/" + std + "encodings/__init__.py", "/" + std + "encodings/aliases.py",
			"/" + std + "encodings/utf_8.py", "/" + std + "codecs.py", "/" + std + "sitecustomize.py",
		}},
		{"the interpreter through a link", []entry{
			symlink("usr/bin/python3", "python3.11"), program("usr/bin/python3.11"), source(std+"encodings/utf_8.py", slow),
		}, "/usr/bin/python3", []string{"/usr/bin/python3.11", "/" + std + "encodings/utf_8.py"}},
		{"another program, and the interpreter's library", []entry{
			program("usr/bin/perl", "libpython3.so"), lib(usr + "libpython3.so"), source(std+"encodings/utf_8.py", slow),
		}, "/usr/bin/perl", []string{"/usr/bin/perl", "/" + usr + "libpython3.so"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := natives(t, c.entries)
			require.Equal(t, c.next, img.touch(t, c.read, 0))
			require.Empty(t, img.touch(t, c.read, 0), "each is told once")
		})
	}
}

// TestSmall has files that are just small enough to be fetched whole.
func TestSmall(t *testing.T) {
	for name, small := range map[string]int{"lib/a.so": smallLibrary, "bin/prog": smallProgram} {
		for _, more := range []int{0, 1} {
			e := program(name)
			e.data += string(make([]byte, small+more-len(e.data)))
			want := []string{"/" + name}
			if more > 0 {
				want = parts(name, 0x3000)
			}
			require.Equal(t, want, natives(t, []entry{e}).touch(t, "/"+name, 0))
		}
	}
}

// TestLibrariesOfLayers has libraries in other layers than what needs them.
func TestLibrariesOfLayers(t *testing.T) {
	img := natives(t,
		[]entry{lib("lib/liba.so", "libold.so"), lib("lib/libold.so"), lib("lib/libb.so"), lib("lib/libgone.so")},
		[]entry{program("bin/prog", "liba.so", "libgone.so"), {name: "lib/.wh.libgone.so", mode: 0o644}},
		[]entry{lib("lib/liba.so", "libb.so")},
	)
	require.Equal(t, []string{"/bin/prog", "/lib/liba.so", "/lib/libb.so"}, img.touch(t, "/bin/prog", 0))
}

// TestPagesOfLibraries has reads that are of a library's first page, and others.
func TestPagesOfLibraries(t *testing.T) {
	all := []entry{lib("lib/liba.so", "libb.so"), lib("lib/libb.so"), {name: "lib/text", data: "text", mode: 0o644}}
	size := int64(len(all[0].data))
	for _, c := range []struct {
		what string
		at   int64
		told bool
	}{
		{"its first byte", 0, true},
		{"the last page that has a byte of it", -page + 1, true},
		{"the page before", -page, false},
		{"its second byte", 1, false},
		{"a page in its middle", 2 * page, false},
		{"its last page but for a byte", size - page - 1, false},
		{"its last page", size - page, false},
	} {
		require.Equal(t, c.told, len(natives(t, all).touch(t, "/lib/liba.so", c.at)) > 0, c.what)
	}
	img := natives(t, all)
	end := img.root.Lookup("/lib/libb.so")
	off := int64(img.root.Lookup("/lib/text").Off)
	require.Less(t, off-(int64(end.Off)+end.Size), int64(page), "libb.so ends in the page before text")
	require.Empty(t, img.touch(t, "/lib/text", -page+1))
	require.NotEmpty(t, img.touch(t, "/lib/libb.so", 0))
}

// TestFileOfSeveral has one file be several modules: whoever reads on in it has loaded
// all of them.
func TestFileOfSeveral(t *testing.T) {
	x := index(t,
		testutil.File{Name: "app/a.py", Data: "import other" + strings.Repeat("\n", page+1)}, testutil.File{Name: "app/other.py", Data: slow + strings.Repeat("\n", page+1)}, testutil.File{Name: "lib/other.py", Data: slow + strings.Repeat("\n", page+1)}, testutil.File{Name: "lib/third.py", Data: slow + strings.Repeat("\n", page+1)})
	for i := range 3 {
		x.Entries = append(x.Entries, layer.Entry{Name: fmt.Sprintf("lib%d/b.py", i), Link: "app/a.py", Type: layer.TypeLink})
		x.Entries = append(x.Entries, layer.Entry{Name: fmt.Sprintf("lib%d/other.py", i), Link: "lib/third.py", Type: layer.TypeLink})
	}
	list, err := imports.Open(x.Imports)
	require.NoError(t, err)
	layers := []*layer.Index{x}
	for _, at := range []int64{0, 1} {
		root, err := tree.Merge(layers)
		require.NoError(t, err)
		m := New(root, layers, []imports.List{list})
		require.Len(t, m.Touch(0, int64(root.Lookup("/app/a.py").Off)+at), 4, "read from byte %d", at)
	}
}
