package layer_test

import (
	"debug/elf"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/imports"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/internal/testelf"
)

func librariesOf(tb testing.TB, x *layer.Index) map[string]imports.Library {
	tb.Helper()
	l, err := imports.Open(x.Imports)
	require.NoError(tb, err)
	all := map[string]imports.Library{}
	for i := range l.Len() {
		if s := l.Source(i); len(s.Parts) > 0 {
			all[x.Entries[s.Entry].Name] = s.Library
		}
	}
	return all
}

// library is what all of a file's bytes say. It has no parts if that is nothing.
func library(data string) imports.Library {
	p, ok := imports.NewProgram([]byte(data[:min(len(data), imports.HeaderSize)]), int64(len(data)))
	if !ok {
		return imports.Library{}
	}
	dynamic := data[p.Dynamic.Off:p.Dynamic.End()]
	names := p.Names([]byte(dynamic))
	return p.Library([]byte(data[names.Off:names.End()]), []byte(dynamic))
}

func executable(name, data string) testimage.File {
	f := testimage.Reg(name, data)
	f.Mode = 0o755
	return f
}

// garbage is what only looks like a library: it says that its segments are behind its end.
func garbage() string {
	f := testelf.New(0x3000, "libgarbage.so")
	f.Progs[testelf.Text].Off = 1 << 40
	return string(f.Bytes())
}

// TestBuildLibraries has libraries in one piece of the stream, and in several: their
// headers, tables and dynamic sections.
func TestBuildLibraries(t *testing.T) {
	want, machine := map[string]imports.Library{}, map[string]string{}
	for i, file := range testelf.Machine(t, 5) {
		if data := string(testelf.Read(t, file)); len(data) < 4<<20 { // or it takes long
			machine[fmt.Sprintf("%d-%s", i, path.Base(file))] = data
		}
	}
	long := string(testelf.New(2<<20, "liba.so").Bytes())
	libraries := func(at int) (files []testimage.File) {
		add := func(f testimage.File) {
			files = append(files, f)
			if l := library(f.Data); len(l.Parts) > 0 {
				want[f.Name] = l
			}
		}
		for _, name := range slices.Sorted(maps.Keys(machine)) {
			add(executable(fmt.Sprintf("%d/bin/%s", at, name), machine[name]))
		}
		add(testimage.Reg(fmt.Sprintf("%d/lib/liba.so.1", at), string(testelf.New(0x3000, "libb.so", "libc.so.6").Bytes())))
		add(testimage.Reg(fmt.Sprintf("%d/lib/long.so", at), long))
		add(testimage.Reg(fmt.Sprintf("%d/lib/wheel.so", at), string(testelf.New(0x3000, "liba.so", "libb.so").MoveNames().Bytes())))
		return append(files,
			testimage.Reg(fmt.Sprintf("%d/lib/library", at), string(testelf.New(0x3000, "libb.so").Bytes())), // nobody would load it
			executable(fmt.Sprintf("%d/bin/script", at), "#!/bin/sh\n"+testimage.Content(1, 9000)),
			executable(fmt.Sprintf("%d/bin/garbage", at), garbage()),
			executable(fmt.Sprintf("%d/bin/short", at), elf.ELFMAG),
			executable(fmt.Sprintf("%d/bin/empty", at), ""),
			testimage.Symlink(fmt.Sprintf("%d/lib/liba.so", at), "liba.so.1"),
			testimage.Link(fmt.Sprintf("%d/lib/libz.so", at), fmt.Sprintf("%d/lib/liba.so.1", at)),
		)
	}
	files := libraries(0)
	for i, noise := range []int{inflate.MaxFill - 700, 3*inflate.MaxFill - 5000, inflate.MaxFill - 0x4100} {
		files = append(files, testimage.Reg(fmt.Sprint("noise", i), testimage.Content(uint64(i), noise)))
		files = append(files, libraries(i+1)...)
	}
	data := testimage.Tar(t, files...)
	require.NotEmpty(t, want["0/bin/0-ls"].Needs)
	require.Equal(t, []string{"libb.so", "libc.so.6"}, want["0/lib/liba.so.1"].Needs)
	require.Equal(t, []string{"liba.so", "libb.so"}, want["1/lib/wheel.so"].Needs)
	requireImports(t, data, func(t *testing.T, x *layer.Index) { require.Equal(t, want, librariesOf(t, x)) })
}

// TestLibrariesInPieces has all places of a library be where a piece of the stream ends.
func TestLibrariesInPieces(t *testing.T) {
	noise := testimage.Content(1, inflate.MaxFill)
	early := testelf.New(0x1000, "liba.so") // with code in what is read first
	early.Progs = append(early.Progs, testelf.Segment(elf.PT_LOAD, elf.PF_R|elf.PF_X, 0x300, 0x10))
	for _, f := range []*testelf.File{testelf.New(0x1000, "liba.so"), testelf.New(0x1000, "liba.so").MoveNames(), early.MoveNames()} {
		data := string(f.Bytes())
		want := library(data)
		require.Equal(t, []string{"liba.so"}, want.Needs)
		for cut := 512; cut < len(data); cut += 512 {
			blob := testimage.Tar(t, testimage.Reg("noise", noise[2*512+cut:]), testimage.Reg("a.so", data))
			require.Equal(t, map[string]imports.Library{"a.so": want}, librariesOf(t, mustBuild(t, testimage.Gzip(t, 0, blob))), "cut at %#x", cut)
		}
	}
}

// TestLibraryInPieces has a library's dynamic section and its names be in two pieces each.
func TestLibraryInPieces(t *testing.T) {
	f := testelf.New(0x1000, "liba.so")
	cut := int(f.DynOff)&^511 + 512
	f.Size = cut + inflate.MaxFill - 8
	data := string(f.MoveNames().Bytes())
	want := library(data)
	require.Equal(t, []string{"liba.so"}, want.Needs)
	require.Less(t, cut, int(want.Parts[1].End()))
	blob := testimage.Tar(t, testimage.Reg("noise", testimage.Content(1, inflate.MaxFill-2*512-cut)), testimage.Reg("a.so", data))
	require.Equal(t, map[string]imports.Library{"a.so": want}, librariesOf(t, mustBuild(t, testimage.Gzip(t, 0, blob))))
}

// TestLibrariesLeaveEntries has the same content in libraries and in other files.
func TestLibrariesLeaveEntries(t *testing.T) {
	stream := func(mode int64) []byte {
		var files []testimage.File
		for i, data := range []string{
			string(testelf.New(0x3000, "libc.so.6").Bytes()), string(testelf.New(3<<20, "libc.so.6").Bytes()),
			string(testelf.New(0x3000, "libc.so.6").MoveNames().Bytes()),
			garbage(), "#!/bin/sh\n", elf.ELFMAG, testimage.Content(1, imports.HeaderSize), testimage.Content(2, 2*inflate.MaxFill),
		} {
			f := testimage.Reg(fmt.Sprint("file", i), data)
			f.Mode = mode
			files = append(files, f)
		}
		return testimage.Tar(t, append(files, testimage.Reg("last", "end"))...)
	}
	plain := mustBuild(t, stream(0o644))
	require.Empty(t, plain.Imports)
	for i := range plain.Entries[:len(plain.Entries)-1] {
		plain.Entries[i].Mode = 0o755
	}
	x := mustBuild(t, stream(0o755))
	require.Equal(t, plain.Entries, x.Entries)
	require.Len(t, librariesOf(t, x), 3, "scripts and garbage are none")
}

// TestLibrariesTruncated cuts a layer inside a library.
func TestLibrariesTruncated(t *testing.T) {
	f := testelf.New(0x3000, "liba.so").MoveNames()
	for what, n := range map[string]uint64{
		"its start": 0, "its headers": 100, "its tables": 0x1000 + 50,
		"its code": f.TextOff + 100, "its dynamic section": f.DynOff + 20, "before its names": f.NamesOff - 1, "its names": f.NamesOff + 1,
	} {
		data := testimage.Tar(t, testimage.Reg("a.so", string(f.Bytes())))[:512+n]
		for name, blob := range map[string][]byte{"uncompressed": data, "gzip": testimage.Gzip(t, 6, data), "zstd": zstdFrames(t, data)} {
			_, err := build(t, blob, small)
			require.ErrorIs(t, err, io.ErrUnexpectedEOF, "%s, %s", what, name)
			require.NotErrorIs(t, err, io.EOF)
			require.ErrorContains(t, err, `content of "a.so"`)
		}
	}
}
