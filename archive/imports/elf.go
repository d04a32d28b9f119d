package imports

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"slices"
	"strings"
)

// Library is what the dynamic loader reads of an ELF file, whatever is called in it,
// and which others it loads with it.
type Library struct {
	Parts []Part   // in ascending order, without what is between them
	Needs []string // names of files, without directories (DT_NEEDED)
}

// Part is a part of a file, in bytes.
type Part struct{ Off, Len int64 }

// End returns the offset behind the part.
func (p Part) End() int64 { return p.Off + p.Len }

// Bounds on what is found in one ELF file. More is left out.
const (
	MaxParts = 8
	MaxNeeds = 256
)

// HeaderSize is how much of an ELF file NewProgram is given, if it has as much, in bytes.
const HeaderSize = 4 << 10

// What is looked at of a file, in bytes.
const (
	maxFront   = 1 << 20
	maxDynamic = 16 << 10
)

// Program is an ELF file of 64 bits, little-endian, with a dynamic section (System V
// ABI, chapter 5).
type Program struct {
	Front   int64 // the bytes from the start in which names are mostly
	Dynamic Part  // behind them
	loads   []elf.Prog64
}

// NewProgram reads the headers of a file of size bytes that begins with head. It says
// no to what is none, or not in the usual order.
func NewProgram(head []byte, size int64) (p Program, ok bool) {
	var h elf.Header64
	if len(head) < binary.Size(h) || int64(len(head)) > size || string(head[:4]) != elf.ELFMAG || head[elf.EI_CLASS] != byte(elf.ELFCLASS64) || head[elf.EI_DATA] != byte(elf.ELFDATA2LSB) {
		return p, false
	}
	decode(head, &h)
	for i := range uint64(h.Phnum) {
		var prog elf.Prog64
		at := h.Phoff + i*uint64(h.Phentsize)
		if int(h.Phentsize) != binary.Size(prog) || h.Phoff > uint64(len(head)) || at > uint64(len(head)) || uint64(len(head))-at < uint64(h.Phentsize) {
			return p, false // smaller ones would have one header be many segments
		}
		decode(head[at:], &prog)
		if prog.Off > uint64(size) || prog.Filesz > uint64(size)-prog.Off {
			return p, false
		}
		switch elf.ProgType(prog.Type) {
		case elf.PT_LOAD:
			p.loads = append(p.loads, prog)
		case elf.PT_DYNAMIC:
			p.Dynamic = Part{int64(prog.Off), min(int64(prog.Filesz), maxDynamic)}
		}
	}
	p.Front = min(p.Dynamic.Off, maxFront) // also if all before it is one segment, as older linkers have it
	for _, load := range p.loads {
		if load.Flags&uint32(elf.PF_X) != 0 && load.Off > 0 {
			p.Front = min(p.Front, int64(load.Off)) // its tables come before what is run
		}
	}
	return p, p.Dynamic.Len > 0 && p.Dynamic.Off >= int64(len(head))
}

func decode(b []byte, to any) {
	if _, err := binary.Decode(b, binary.LittleEndian, to); err != nil {
		panic(err) // whoever calls this has looked at the length
	}
}

// dynamic tags of tables, and those of their sizes.
var tables = map[elf.DynTag]elf.DynTag{
	elf.DT_STRTAB: elf.DT_STRSZ, elf.DT_RELA: elf.DT_RELASZ, elf.DT_JMPREL: elf.DT_PLTRELSZ,
}

// Names returns where the names are that a dynamic section refers to: in what the file
// begins with, or behind the dynamic section if another program than the linker has
// altered them, as those do that make wheels.
func (p Program) Names(dynamic []byte) Part {
	values, _ := tags(dynamic)
	at, most, ok := p.offset(values[elf.DT_STRTAB])
	if !ok {
		return Part{}
	}
	return Part{at, int64(min(values[elf.DT_STRSZ], uint64(most), maxFront))}
}

// Library returns what is loaded, from the dynamic section and its names, or what there
// is of them.
func (p Program) Library(names, dynamic []byte) (l Library) {
	values, needs := tags(dynamic)
	for _, at := range needs {
		if name := cString(names[min(at, uint64(len(names))):]); name != "" {
			l.Needs = append(l.Needs, name)
		}
	}
	l.Parts = p.parts(values)
	return l
}

// tags returns what a dynamic section has, and of what it may have several times the
// libraries that are needed.
func tags(dynamic []byte) (values map[elf.DynTag]uint64, needs []uint64) {
	values = map[elf.DynTag]uint64{}
	for ; len(dynamic) >= 16; dynamic = dynamic[16:] {
		tag, value := elf.DynTag(binary.LittleEndian.Uint64(dynamic)), binary.LittleEndian.Uint64(dynamic[8:])
		if tag == elf.DT_NULL {
			break
		}
		if tag == elf.DT_NEEDED && len(needs) < MaxNeeds {
			needs = append(needs, value)
		}
		values[tag] = value
	}
	return values, needs
}

// parts returns the parts of the file that the loader reads: its tables, and what it
// writes addresses into.
func (p Program) parts(values map[elf.DynTag]uint64) (parts []Part) {
	first := Part{0, min(HeaderSize, p.Dynamic.Off)}
	for table, size := range tables {
		if at, _, ok := p.offset(values[table]); ok && at < p.Dynamic.Off && values[size] <= uint64(p.Dynamic.Off-at) {
			first.Len = max(first.Len, at+int64(values[size]))
		}
	}
	parts = append(parts, first, p.Dynamic)
	for _, load := range p.loads {
		if load.Flags&uint32(elf.PF_W) != 0 && load.Filesz > 0 {
			parts = append(parts, Part{int64(load.Off), int64(load.Filesz)})
		}
	}
	slices.SortFunc(parts, func(a, b Part) int { return int(min(max(a.Off-b.Off, -1), 1)) })
	for i := 1; i < len(parts); {
		if last := &parts[i-1]; parts[i].Off <= last.End() {
			last.Len = max(last.End(), parts[i].End()) - last.Off
			parts = slices.Delete(parts, i, i+1)
		} else {
			i++
		}
	}
	return parts[:min(len(parts), MaxParts)]
}

// offset returns where in the file an address is, which is 0 if there is none, and how
// much of its segment follows.
func (p Program) offset(address uint64) (off, most int64, ok bool) {
	for _, load := range p.loads {
		if address > 0 && load.Vaddr <= address && address-load.Vaddr < load.Filesz {
			in := address - load.Vaddr
			return int64(load.Off + in), int64(load.Filesz - in), true
		}
	}
	return 0, 0, false
}

// cString returns the name of a file that b begins with, or "".
func cString(b []byte) string {
	n := bytes.IndexByte(b[:min(len(b), MaxModule+1)], 0)
	if n < 0 || strings.ContainsRune(string(b[:n]), '/') {
		return ""
	}
	return string(b[:n])
}
