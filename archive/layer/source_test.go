package layer_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/imports"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// sourceHead is how much of a source is looked at.
const sourceHead = 32 << 10

// source returns a source of size bytes that imports something at its start, unless
// that is empty, and its end.
func source(first, last string, size int) string {
	head, tail := first+"\n# ", "\n"+last+"\n"
	noise := strings.ReplaceAll(testimage.Content(uint64(size), size-len(head)-len(tail)), "\n", " ")
	return head + noise + tail
}

func importsOf(tb testing.TB, x *layer.Index) map[string][]imports.Import {
	tb.Helper()
	l, err := imports.Open(x.Imports)
	require.NoError(tb, err)
	all := map[string][]imports.Import{}
	for i := range l.Len() {
		all[x.Entries[l.Entry(i)].Name] = l.Source(i).Imports
	}
	require.Len(tb, all, l.Len())
	return all
}

// TestBuildImports has sources that are in one piece of the stream, in several, and of
// which not all is looked at.
func TestBuildImports(t *testing.T) {
	files := []testimage.File{
		testimage.Dir("app/"),
		testimage.Reg("app/main.py", "import one, os\nfrom two import three\n"),
		testimage.Reg("noise", testimage.Content(1, inflate.MaxFill-3000)),
		testimage.Reg("app/two.py", source("from . import one", "import three", 70_001)),
		testimage.Reg("app/none.py", "x = 1\n"),
		testimage.Reg("app/empty.py", ""),
		testimage.Reg("app/notes.txt", "import one\n"),
		testimage.Link("app/link.py", "app/main.py"),
		testimage.Symlink("app/symlink.py", "main.py"),
		testimage.Reg("app/one.py", source("", "from one import two", sourceHead)),
		testimage.Reg("app/three.py", source("", "import two", sourceHead+len("import two\n"))),
		testimage.Reg("app/tests/test_one.py", "import one"),
		testimage.Reg("app/"+strings.Repeat("long/", 30)+"last.py", source("import a", "import b", 7_000)),
	}
	pax := testimage.Reg("app/pax.py", "import one")
	pax.Format, pax.PAXRecords = tar.FormatPAX, map[string]string{"SCHILY.xattr.user.a": "b"}
	files = append(files, pax)
	data := testimage.Tar(t, files...)
	want := map[string][]imports.Import{
		"app/main.py": {{Module: "one"}, {Module: "os"}, {Module: "two", Names: []string{"three"}}},
		"app/two.py":  {{Level: 1, Names: []string{"one"}}},
		"app/one.py":  {{Module: "one", Names: []string{"two"}}},
		"app/pax.py":  {{Module: "one"}},
		"app/" + strings.Repeat("long/", 30) + "last.py": {{Module: "a"}, {Module: "b"}},
	}
	requireImports(t, data, func(t *testing.T, x *layer.Index) { require.Equal(t, want, importsOf(t, x)) })
}

// TestImportsLeaveEntries has the same content in sources and in other files.
func TestImportsLeaveEntries(t *testing.T) {
	stream := func(ext string) []byte {
		var files []testimage.File
		for i, size := range []int{1, 511, 512, 513, inflate.MaxFill - 512, inflate.MaxFill, sourceHead - 1, sourceHead, sourceHead + 1, 1 << 20} {
			files = append(files, testimage.Reg(fmt.Sprint("file", i, ext), testimage.Content(uint64(i), size)))
		}
		return testimage.Tar(t, append(files, testimage.Reg("last", "import a"))...)
	}
	want := mustBuild(t, stream(".pz")).Entries
	for i := range want {
		want[i].Name = strings.Replace(want[i].Name, ".pz", ".py", 1)
	}
	x := mustBuild(t, stream(".py"))
	require.Equal(t, want, x.Entries)
	require.Empty(t, x.Imports, "none of them imports anything")
}

// TestImportsOfLayer leaves out what is no module of the layer, if it would have to
// be one.
func TestImportsOfLayer(t *testing.T) {
	x := mustBuild(t, testimage.Tar(t,
		testimage.Reg("lib/pkg/__init__.py", "from .sub import Class, deep\nfrom . import sub, fast, pkg, function\nfrom elsewhere import Thing, other\nfrom pkg import sub, Thing\n"),
		testimage.Reg("lib/pkg/sub/__init__.py", "from .. import __init__, *\n"),
		testimage.Reg("lib/pkg/sub/deep.py", "from ..fast import run\nimport pkg.gone\n"),
		testimage.Reg("lib/pkg/fast.cpython-311-x86_64-linux-gnu.so", "ELF"),
		testimage.Reg("lib/pkg/function.txt", ""),
	))
	require.Equal(t, map[string][]imports.Import{
		"lib/pkg/__init__.py": {
			{Level: 1, Module: "sub", Names: []string{"deep"}},
			{Level: 1, Names: []string{"sub", "fast", "pkg"}},
			{Module: "elsewhere", Names: []string{"Thing", "other"}},
			{Module: "pkg", Names: []string{"sub"}},
		},
		"lib/pkg/sub/__init__.py": {{Level: 2}},
		"lib/pkg/sub/deep.py":     {{Level: 2, Module: "fast"}, {Module: "pkg.gone"}},
	}, importsOf(t, x))
}

// TestImportsTruncated cuts a layer inside a source, and inside another file.
func TestImportsTruncated(t *testing.T) {
	for _, size := range []int{100, 200_000} {
		for _, n := range []int{512, 513, 512 + size - 1} {
			for _, name := range []string{"a.py", "a.pz"} {
				data := testimage.Tar(t, testimage.Reg(name, testimage.Content(1, size)))[:n]
				for blobName, blob := range map[string][]byte{"uncompressed": data, "gzip": testimage.Gzip(t, 6, data), "zstd": zstdFrames(t, data)} {
					_, err := build(t, blob, small)
					require.ErrorIs(t, err, io.ErrUnexpectedEOF, "%s of %d bytes cut at %d, %s", name, size, n, blobName)
					require.NotErrorIs(t, err, io.EOF)
					require.ErrorContains(t, err, fmt.Sprintf("content of %q", name))
				}
			}
		}
	}
	// What fills up the last block may be missing.
	x, err := build(t, testimage.Tar(t, testimage.Reg("a.py", "import a"))[:512+8], small)
	require.NoError(t, err)
	require.Equal(t, map[string][]imports.Import{"a.py": {{Module: "a"}}}, importsOf(t, x))
}

// The failure of what reads the blob is not taken for the end of a source.
func TestImportsSourceFails(t *testing.T) {
	noLeak(t)
	data := testimage.Tar(t, testimage.Reg("a.py", testimage.Content(1, 1<<20)))
	desc := testimage.Descriptor("", data)
	_, err := layer.Build(t.Context(), io.MultiReader(bytes.NewReader(data[:300_000]), failingReader{}), desc, small)
	require.ErrorIs(t, err, io.ErrClosedPipe)
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, io.ErrClosedPipe }
