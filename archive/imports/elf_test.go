package imports

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/internal/testelf"
)

// library reads all of a file that may be read.
func library(data []byte) (l Library, ok bool) {
	p, ok := NewProgram(data[:min(len(data), HeaderSize)], int64(len(data)))
	if !ok {
		return l, false
	}
	dynamic := data[p.Dynamic.Off:p.Dynamic.End()]
	names := p.Names(dynamic)
	return p.Library(data[names.Off:names.End()], dynamic), true
}

// requireParts fails unless parts are as a list has them.
func requireParts(tb testing.TB, l Library, size int64) {
	tb.Helper()
	require.NotEmpty(tb, l.Parts)
	require.LessOrEqual(tb, len(l.Parts), MaxParts)
	end := int64(-1)
	for _, p := range l.Parts {
		require.Greater(tb, p.Off, end, "%v: they ascend, and something is between them", l.Parts)
		require.Positive(tb, p.Len, "%v", l.Parts)
		require.LessOrEqual(tb, p.Len, size-p.Off, "%v: they are in the file", l.Parts)
		end = p.End()
	}
}

func (l Library) has(off, size uint64) bool {
	for _, p := range l.Parts {
		if uint64(p.Off) <= off && off+size <= uint64(p.End()) {
			return true
		}
	}
	return false
}

// TestMachinesLibraries reads what linkers have made.
func TestMachinesLibraries(t *testing.T) {
	needing, tables := 0, 0
	for _, path := range testelf.Machine(t, 100) {
		data := testelf.Read(t, path)
		f, err := elf.NewFile(bytes.NewReader(data))
		require.NoError(t, err, path)
		want, err := f.DynString(elf.DT_NEEDED)
		require.NoError(t, err, path)
		imported, err := f.ImportedLibraries()
		require.NoError(t, err, path)
		require.Equal(t, imported, want, path)
		l, ok := library(data)
		if f.Section(".dynamic").Offset < HeaderSize {
			require.False(t, ok, "%s is read with its header", path)
			continue
		}
		require.True(t, ok, path)
		if f.Section(".dynstr").FileSize <= maxFront {
			want = slices.DeleteFunc(want, func(name string) bool { return strings.Contains(name, "/") })
			require.Equal(t, want, l.Needs, path)
		}
		requireParts(t, l, int64(len(data)))
		for _, name := range []string{".dynstr", ".dynsym", ".rela.dyn", ".rela.plt", ".dynamic"} {
			if s := f.Section(name); s != nil {
				require.True(t, l.has(s.Offset, s.FileSize), "%s: %s at %#x of %#x bytes is not in %v", path, name, s.Offset, s.FileSize, l.Parts)
				tables++
			}
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_LOAD && p.Flags&elf.PF_W != 0 {
				require.True(t, l.has(p.Off, p.Filesz), "%s: a segment at %#x of %#x bytes is not in %v", path, p.Off, p.Filesz, l.Parts)
			}
		}
		needing += min(len(want), 1)
	}
	require.Greater(t, needing, 1)
	require.Greater(t, tables, 8)
}

// swapped returns a header with the other byte order.
func swapped(f *testelf.File) []byte {
	b := f.Bytes()
	h := f.Header
	h.Phnum = uint16(len(f.Progs))
	h.Ident[elf.EI_DATA] = byte(elf.ELFDATA2MSB)
	var w bytes.Buffer
	_ = binary.Write(&w, binary.BigEndian, h) // a buffer takes all
	_ = binary.Write(&w, binary.BigEndian, f.Progs)
	copy(b, w.Bytes())
	return b
}

// narrow returns a file of 32 bits.
func narrow(f *testelf.File) []byte {
	b := f.Bytes()
	h := elf.Header32{Type: f.Header.Type, Machine: uint16(elf.EM_386), Version: f.Header.Version, Phnum: uint16(len(f.Progs))}
	h.Ident = f.Header.Ident
	h.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS32)
	h.Phoff, h.Phentsize = uint32(binary.Size(h)), uint16(binary.Size(elf.Prog32{}))
	var w bytes.Buffer
	_ = binary.Write(&w, binary.LittleEndian, h)
	for _, p := range f.Progs {
		_ = binary.Write(&w, binary.LittleEndian, elf.Prog32{
			Type: p.Type, Off: uint32(p.Off), Vaddr: uint32(p.Vaddr), Paddr: uint32(p.Paddr), Filesz: uint32(p.Filesz), Memsz: uint32(p.Memsz), Flags: p.Flags,
		})
	}
	copy(b, w.Bytes())
	return b
}

func TestNoProgram(t *testing.T) {
	bytesOf := func(alter func(f *testelf.File)) []byte {
		f := testelf.New(0x3000, "libc.so.6")
		alter(f)
		return f.Bytes()
	}
	good := testelf.New(0x3000, "libc.so.6")
	_, ok := library(good.Bytes())
	require.True(t, ok, "what is not altered is a program")
	for _, file := range [][]byte{swapped(good), narrow(good)} {
		_, err := elf.NewFile(bytes.NewReader(file))
		require.NoError(t, err, "it is a program, but another machine's")
	}
	for _, c := range []struct {
		what string
		data []byte
	}{
		{"nothing", nil},
		{"a script", []byte("#!/bin/sh\n" + strings.Repeat("exit 0\n", 1000))},
		{"no more than the magic number", []byte(elf.ELFMAG)},
		{"a header that is cut", good.Bytes()[:binary.Size(good.Header)-1]},
		{"a header alone", good.Bytes()[:binary.Size(good.Header)]},
		{"program headers that are cut", good.Bytes()[:binary.Size(good.Header)+3*binary.Size(elf.Prog64{})+5]},
		{"a segment that is cut", good.Bytes()[:good.DataOff+1]},
		{"the other byte order", swapped(good)},
		{"32 bits", narrow(good)},
		{"another magic number", append([]byte("\x7fELG"), good.Bytes()[4:]...)},
		{"program headers behind what is looked at", bytesOf(func(f *testelf.File) { f.Header.Phoff = HeaderSize - 1 })},
		{"program headers far behind that", bytesOf(func(f *testelf.File) { f.Header.Phoff = math.MaxUint64 - 10 })},
		{"more program headers than fit", bytesOf(func(f *testelf.File) { f.Progs = append(f.Progs, make([]elf.Prog64, 100)...) })},
		{"program headers of another size", bytesOf(func(f *testelf.File) { f.Header.Phentsize-- })},
		{"a program header without a size", bytesOf(func(f *testelf.File) {
			f.Header.Phentsize = 0
			f.Progs[0], f.Progs[testelf.Dynamic] = f.Progs[testelf.Dynamic], f.Progs[0]
		})},
		{"no program headers", bytesOf(func(f *testelf.File) { f.Progs = nil })},
		{"a segment that ends behind the file", bytesOf(func(f *testelf.File) { f.Progs[testelf.Data].Filesz = uint64(f.Size) })},
		{"a segment that begins behind the file", bytesOf(func(f *testelf.File) { f.Progs[testelf.Text].Off = uint64(f.Size) + 1 })},
		{"a segment whose end overflows", bytesOf(func(f *testelf.File) { f.Progs[testelf.Text].Filesz = math.MaxUint64 })},
		{"no dynamic section", bytesOf(func(f *testelf.File) { f.Progs = f.Progs[:testelf.Dynamic] })},
		{"an empty dynamic section", bytesOf(func(f *testelf.File) { f.Progs[testelf.Dynamic].Filesz = 0 })},
		{"a dynamic section among the headers", bytesOf(func(f *testelf.File) { f.Progs[testelf.Dynamic].Off = HeaderSize - 1 })},
	} {
		l, ok := library(c.data)
		require.False(t, ok, "%s: %v", c.what, l)
	}
	_, ok = NewProgram(good.Bytes()[:HeaderSize], HeaderSize-1)
	require.False(t, ok, "a head longer than its file")
	_, ok = NewProgram(good.Bytes()[:HeaderSize], -1)
	require.False(t, ok)
}

func TestLibrary(t *testing.T) {
	many := make([]string, MaxNeeds+3)
	for i := range many {
		many[i] = fmt.Sprintf("lib%d.so", i)
	}
	long := strings.Repeat("n", MaxModule)
	for _, c := range []struct {
		what  string
		needs []string
		alter func(f *testelf.File)
		want  []string
		parts func(f *testelf.File) []Part // nil if they are as always
	}{
		{what: "nothing"},
		{what: "some", needs: []string{"liba.so", "libb.so.2"}, want: []string{"liba.so", "libb.so.2"}},
		{what: "as many as are kept", needs: many[:MaxNeeds], want: many[:MaxNeeds]},
		{what: "more", needs: many, want: many[:MaxNeeds]},
		{what: "paths", needs: []string{"/lib/libz.so", "a/b", "liba.so", "/"}, want: []string{"liba.so"}},
		{what: "long names", needs: []string{long, long + "n", "liba.so"}, want: []string{long, "liba.so"}},
		{what: "an empty name", needs: []string{"", "liba.so"}, want: []string{"liba.so"}},
		{what: "a name without an end", needs: []string{"liba.so", "libb.so"}, want: []string{"liba.so"},
			alter: func(f *testelf.File) { f.Set(elf.DT_STRSZ, uint64(len(f.Names)-1)) }},
		{what: "names that end with their segment", needs: []string{"liba.so", "libb.so"}, want: []string{"liba.so"},
			alter: func(f *testelf.File) {
				f.Set(elf.DT_STRSZ, math.MaxUint64)
				f.Progs[testelf.Tables].Filesz = f.NamesOff + uint64(len(f.Names)) - 1
				f.Set(elf.DT_RELA, 0)
				f.Set(elf.DT_JMPREL, 0)
			}, parts: func(f *testelf.File) []Part {
				return []Part{{0, HeaderSize}, {int64(f.DataOff), int64(f.Progs[testelf.Data].Filesz)}}
			}},
		{what: "names behind all else, as wheels have them", needs: []string{"liba.so", "libb.so"}, want: []string{"liba.so", "libb.so"},
			alter: func(f *testelf.File) { f.MoveNames() }, parts: func(f *testelf.File) []Part {
				return []Part{{0, f.TablesEnd}, {int64(f.DataOff), int64(f.Progs[testelf.Data].Filesz)}, {int64(f.NamesOff), int64(len(f.Names))}}
			}},
		{what: "a name behind all others", needs: []string{"liba.so", "libb.so"}, want: []string{"libb.so"},
			alter: func(f *testelf.File) { f.Dyn[0].Val = math.MaxUint64 }},
		{what: "what follows the end of the dynamic section", needs: []string{"liba.so", "libb.so"}, want: []string{"liba.so"},
			alter: func(f *testelf.File) {
				f.Dyn[1] = f.Dyn[0]
				f.Dyn = append(append([]elf.Dyn64{}, f.Dyn[0]), append(f.Dyn[2:len(f.Dyn):len(f.Dyn)], f.Dyn[1])...)
			}},
		{what: "names in no segment", needs: []string{"liba.so"}, alter: func(f *testelf.File) { f.Set(elf.DT_STRTAB, 1<<40) }},
		{what: "no names", needs: []string{"liba.so"}, alter: func(f *testelf.File) {
			f.Set(elf.DT_STRTAB, 0)
			f.Progs[testelf.Tables].Vaddr = 0 // where address 0 would be
			f.Set(elf.DT_RELA, 0)
			f.Set(elf.DT_JMPREL, 0)
		}, parts: func(f *testelf.File) []Part {
			return []Part{{0, HeaderSize}, {int64(f.DataOff), int64(f.Progs[testelf.Data].Filesz)}}
		}},
		{what: "tables in no segment of a large file", needs: []string{"liba.so"}, alter: func(f *testelf.File) {
			for _, tag := range []elf.DynTag{elf.DT_STRTAB, elf.DT_RELA, elf.DT_JMPREL} {
				f.Set(tag, 1<<40)
			}
			*f = *moved(f, 3<<20)
		}, parts: func(f *testelf.File) []Part {
			return []Part{{0, HeaderSize}, {int64(f.DataOff), int64(f.Progs[testelf.Data].Filesz)}}
		}},
		{what: "a table of any size", alter: func(f *testelf.File) { f.Set(elf.DT_STRSZ, math.MaxUint64); f.Set(elf.DT_RELASZ, 1<<40) }},
		{what: "code first, as older linkers have it", needs: []string{"liba.so"}, want: []string{"liba.so"}, alter: func(f *testelf.File) {
			f.Progs[testelf.Tables] = testelf.Segment(elf.PT_LOAD, elf.PF_R|elf.PF_X, 0, f.DataOff)
			f.Progs[testelf.Text].Type = uint32(elf.PT_NULL)
		}},
		{what: "code first, in a large file", needs: []string{"liba.so"}, want: []string{"liba.so"}, alter: func(f *testelf.File) {
			*f = *moved(f, 3<<20)
			f.Progs[testelf.Tables] = testelf.Segment(elf.PT_LOAD, elf.PF_R|elf.PF_X, 0, f.DataOff)
			f.Progs[testelf.Text].Type = uint32(elf.PT_NULL)
		}},
		{what: "a dynamic section before the code", alter: func(f *testelf.File) {
			f.DynOff = f.NamesOff + 0x200
			f.Progs[testelf.Dynamic] = testelf.Segment(elf.PT_DYNAMIC, elf.PF_R, f.DynOff, uint64(binary.Size(f.Dyn)))
			f.Set(elf.DT_RELA, 0)
			f.Set(elf.DT_JMPREL, 0)
		}, parts: func(f *testelf.File) []Part {
			return []Part{
				{0, int64(f.NamesOff) + int64(len(f.Names))}, {int64(f.DynOff), int64(binary.Size(f.Dyn))},
				{int64(f.DataOff), int64(f.Progs[testelf.Data].Filesz)},
			}
		}},
		{what: "segments that overlap", needs: []string{"liba.so"}, want: []string{"liba.so"}, alter: func(f *testelf.File) {
			f.Progs = append(f.Progs,
				testelf.Segment(elf.PT_LOAD, elf.PF_W, f.DataOff+0x10, 0x20),
				testelf.Segment(elf.PT_LOAD, elf.PF_W, f.DataOff-0x40, 0x80),
				testelf.Segment(elf.PT_LOAD, elf.PF_W, f.DataOff-0x50, 0x10),
				testelf.Segment(elf.PT_LOAD, elf.PF_W, f.DataOff, 0))
		}, parts: func(f *testelf.File) []Part {
			return []Part{{0, f.TablesEnd}, {int64(f.DataOff) - 0x50, int64(f.Progs[testelf.Data].Filesz) + 0x50}}
		}},
		{what: "more segments than are kept", alter: func(f *testelf.File) {
			for i := range uint64(2 * MaxParts) {
				f.Progs = append(f.Progs, testelf.Segment(elf.PT_LOAD, elf.PF_W, f.TextOff+0x100*i, 1))
			}
		}, parts: func(f *testelf.File) []Part {
			parts := []Part{{0, f.TablesEnd}}
			for i := range int64(MaxParts - 1) {
				parts = append(parts, Part{int64(f.TextOff) + 0x100*i, 1})
			}
			return parts
		}},
	} {
		t.Run(c.what, func(t *testing.T) {
			f := testelf.New(0x3000, c.needs...)
			if c.alter != nil {
				c.alter(f)
			}
			data := f.Bytes()
			l, ok := library(data)
			require.True(t, ok)
			require.Equal(t, c.want, l.Needs)
			requireParts(t, l, int64(len(data)))
			want := []Part{{0, f.TablesEnd}, {int64(f.DataOff), int64(f.Progs[testelf.Data].Filesz)}}
			if c.parts != nil {
				want = c.parts(f)
			}
			require.Equal(t, want, l.Parts)
		})
	}
}

// moved returns a file with more code, and with the dynamic section of f.
func moved(f *testelf.File, text int) *testelf.File {
	g := testelf.New(text)
	g.Names, g.Dyn, g.TablesEnd = f.Names, f.Dyn, f.TablesEnd
	g.Progs[testelf.Tables] = f.Progs[testelf.Tables]
	g.Progs[testelf.Dynamic].Filesz = uint64(binary.Size(f.Dyn))
	return g
}

func FuzzProgram(f *testing.F) {
	add := func(data []byte) {
		p, ok := NewProgram(data[:min(len(data), HeaderSize)], int64(len(data)))
		require.True(f, ok)
		dynamic := data[p.Dynamic.Off:p.Dynamic.End()]
		names := p.Names(dynamic)
		f.Add(data[:HeaderSize], int64(len(data)), data[names.Off:names.End()], dynamic)
	}
	add(testelf.New(0x3000).Bytes())
	add(testelf.New(0x3000, "liba.so", "libb.so").Bytes())
	add(testelf.New(2<<20, "liba.so", "/").Bytes())
	add(testelf.New(0x3000, "liba.so").MoveNames().Bytes())
	add(testelf.Read(f, "/bin/ls"))
	f.Fuzz(func(t *testing.T, head []byte, size int64, names, dynamic []byte) {
		p, ok := NewProgram(head, size)
		if !ok {
			return
		}
		require.GreaterOrEqual(t, p.Front, int64(0))
		require.LessOrEqual(t, p.Front, min(int64(maxFront), p.Dynamic.Off))
		require.GreaterOrEqual(t, p.Dynamic.Off, int64(len(head)), "whoever reads the file goes forward")
		require.Positive(t, p.Dynamic.Len)
		require.LessOrEqual(t, p.Dynamic.Len, min(int64(maxDynamic), size-p.Dynamic.Off))
		part := p.Names(dynamic)
		require.GreaterOrEqual(t, part.Off, int64(0))
		require.GreaterOrEqual(t, part.Len, int64(0))
		require.LessOrEqual(t, part.Len, min(int64(maxFront), size-part.Off))
		l := p.Library(names, dynamic)
		requireParts(t, l, size)
		require.LessOrEqual(t, len(l.Needs), MaxNeeds)
		for _, name := range l.Needs {
			require.NotEmpty(t, name)
			require.LessOrEqual(t, len(name), MaxModule)
			require.NotContains(t, name, "/")
			require.NotContains(t, name, "\x00")
		}
		list, err := Open(Append(nil, []Source{{Entry: 1, Library: l}}))
		require.NoError(t, err)
		require.Equal(t, l, list.Source(0).Library)
	})
}
