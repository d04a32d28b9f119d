// Package testelf makes ELF files for tests, without a linker, and finds those of
// this machine.
package testelf

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// File is a library or a program, as linkers lay them out: headers, tables, what is
// run, and what is written to, with the dynamic section in it.
type File struct {
	Header elf.Header64
	Progs  []elf.Prog64
	Dyn    []elf.Dyn64
	Names  []byte // DT_STRTAB
	Size   int

	NamesOff, TextOff, DataOff, DynOff uint64
	TablesEnd                          int64 // behind the tables that the loader reads
}

// Places in Progs.
const (
	Tables = iota
	Text
	Data
	Dynamic
)

// relocations is how many bytes DT_RELA and DT_JMPREL have each.
const relocations = 0x60

// shift is how far addresses lie behind offsets.
const shift = 0x400000

// New returns a file that needs others. Of what is run it has text bytes.
func New(text int, needs ...string) *File {
	const page = 0x1000
	up := func(n uint64) uint64 { return (n + page - 1) &^ (page - 1) }
	f := &File{Names: []byte{0}, NamesOff: page}
	for _, name := range needs {
		f.Dyn = append(f.Dyn, elf.Dyn64{Tag: int64(elf.DT_NEEDED), Val: uint64(len(f.Names))})
		f.Names = append(append(f.Names, name...), 0)
	}
	rela := f.NamesOff + uint64(len(f.Names))
	f.TablesEnd = int64(rela + 2*relocations)
	f.TextOff = up(uint64(f.TablesEnd))
	f.DataOff = up(f.TextOff+uint64(text)) + 0x2b0
	f.DynOff = f.DataOff + 0x100
	f.Dyn = append(f.Dyn,
		elf.Dyn64{Tag: int64(elf.DT_STRTAB), Val: f.NamesOff + shift}, elf.Dyn64{Tag: int64(elf.DT_STRSZ), Val: uint64(len(f.Names))},
		elf.Dyn64{Tag: int64(elf.DT_RELA), Val: rela + shift}, elf.Dyn64{Tag: int64(elf.DT_RELASZ), Val: relocations},
		elf.Dyn64{Tag: int64(elf.DT_JMPREL), Val: rela + relocations + shift}, elf.Dyn64{Tag: int64(elf.DT_PLTRELSZ), Val: relocations},
		elf.Dyn64{})
	dyn := uint64(binary.Size(f.Dyn))
	data := 0x200 + dyn
	f.Size = int(f.DataOff + data + 0x321)
	f.Header = elf.Header64{
		Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: uint64(binary.Size(f.Header)), Ehsize: uint16(binary.Size(f.Header)), Phentsize: uint16(binary.Size(elf.Prog64{})),
	}
	copy(f.Header.Ident[:], elf.ELFMAG)
	f.Header.Ident[elf.EI_CLASS], f.Header.Ident[elf.EI_DATA], f.Header.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	f.Progs = []elf.Prog64{
		Tables:  Segment(elf.PT_LOAD, elf.PF_R, 0, uint64(f.TablesEnd)),
		Text:    Segment(elf.PT_LOAD, elf.PF_R|elf.PF_X, f.TextOff, uint64(text)),
		Data:    Segment(elf.PT_LOAD, elf.PF_R|elf.PF_W, f.DataOff, data),
		Dynamic: Segment(elf.PT_DYNAMIC, elf.PF_R|elf.PF_W, f.DynOff, dyn),
	}
	return f
}

// Segment returns a header for size bytes of a file.
func Segment(typ elf.ProgType, flags elf.ProgFlag, off, size uint64) elf.Prog64 {
	return elf.Prog64{Type: uint32(typ), Flags: uint32(flags), Off: off, Vaddr: off + shift, Paddr: off + shift, Filesz: size, Memsz: size, Align: 0x1000}
}

// Set gives a dynamic tag another value.
func (f *File) Set(tag elf.DynTag, value uint64) {
	for i := range f.Dyn {
		if elf.DynTag(f.Dyn[i].Tag) == tag {
			f.Dyn[i].Val = value
		}
	}
}

// MoveNames has the names lie behind all else, in a segment of their own, as programs
// leave them that alter which libraries a file needs. It returns f.
func (f *File) MoveNames() *File {
	f.NamesOff = uint64(f.Size+7) &^ 7
	f.Size = int(f.NamesOff) + len(f.Names)
	f.Progs = append(f.Progs, Segment(elf.PT_LOAD, elf.PF_R|elf.PF_W, f.NamesOff, uint64(len(f.Names))))
	f.Set(elf.DT_STRTAB, f.NamesOff+shift)
	return f
}

// Bytes returns the file.
func (f *File) Bytes() []byte {
	b := make([]byte, f.Size)
	for i := range b {
		b[i] = byte(i*i>>3) | 1 // so that names do not end by chance
	}
	h := f.Header
	h.Phnum = uint16(len(f.Progs))
	put(b, 0, h)
	put(b, h.Phoff, f.Progs)
	put(b, f.NamesOff, f.Names)
	put(b, f.DynOff, f.Dyn)
	return b
}

// put writes as much of v as there is room for.
func put(b []byte, off uint64, v any) {
	var w bytes.Buffer
	if err := binary.Write(&w, binary.LittleEndian, v); err != nil {
		panic(err)
	}
	copy(b[min(off, uint64(len(b))):], w.Bytes())
}

// Machine returns the paths of programs and libraries of this machine that are
// loaded dynamically, at most so many, and one of a C library among them.
func Machine(tb testing.TB, most int) (paths []string) {
	tb.Helper()
	paths = []string{"/bin/ls", "/bin/sh"}
	var libc string
	seen := map[string]bool{}
	for _, dir := range []string{"/lib", "/usr/lib"} {
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			tb.Fatal(err)
		}
		err = filepath.WalkDir(real, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !strings.Contains(d.Name(), ".so") || !d.Type().IsRegular() || seen[path] {
				return nil // it may be gone, or be nobody's business
			}
			seen[path] = true
			switch {
			case d.Name() == "libc.so.6":
				libc = path
			case len(paths) < most-1 && isELF(path):
				paths = append(paths, path)
			}
			if libc != "" && len(paths) >= most-1 {
				return filepath.SkipAll
			}
			return nil
		})
		if err != nil {
			tb.Fatal(err)
		}
	}
	if libc == "" || len(paths) < 3 {
		tb.Fatalf("no libraries in /lib and /usr/lib: %q %q", paths, libc)
	}
	return append(paths, libc)
}

// isELF says whether a file is one of 64 bits with a dynamic section.
func isELF(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return f.Class == elf.ELFCLASS64 && f.ByteOrder == binary.LittleEndian && f.Section(".dynamic") != nil
}

// Read returns the content of a file.
func Read(tb testing.TB, path string) []byte {
	tb.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}
