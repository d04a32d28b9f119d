package imports

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// Source is a file that loads others: a Python source, or a library.
type Source struct {
	Entry   int // its place among the entries of its layer
	Imports []Import
	Library
}

// ErrFormat is wrapped when a list is malformed.
var ErrFormat = errors.New("malformed list of imports")

// Bounds on a list: its bytes, and its sources.
const (
	MaxList    = 16 << 20
	MaxSources = 1 << 20
)

// Append appends the list of sources, by ascending entry, as far as there is room:
// of each its entry minus the one before; its imports' number, and of each of these
// level, module, number of names, and names; its parts' number, and of each its offset
// minus the end of the one before and its length; and the number of libraries that it
// needs and their names. Numbers are unsigned varints, names have their length before
// them.
func Append(b []byte, sources []Source) []byte {
	start, last := len(b), 0
	for _, s := range sources[:min(len(sources), MaxSources)] {
		before := len(b)
		b = binary.AppendUvarint(b, uint64(s.Entry-last))
		b = binary.AppendUvarint(b, uint64(len(s.Imports)))
		for _, x := range s.Imports {
			b = binary.AppendUvarint(b, uint64(x.Level))
			b = appendString(b, x.Module)
			b = appendStrings(b, x.Names)
		}
		b = binary.AppendUvarint(b, uint64(len(s.Parts)))
		end := int64(0)
		for _, p := range s.Parts {
			b = binary.AppendUvarint(b, uint64(p.Off-end))
			b = binary.AppendUvarint(b, uint64(p.Len))
			end = p.End()
		}
		b = appendStrings(b, s.Needs)
		if len(b)-start > MaxList {
			return b[:before]
		}
		last = s.Entry
	}
	return b
}

func appendStrings(b []byte, all []string) []byte {
	b = binary.AppendUvarint(b, uint64(len(all)))
	for _, s := range all {
		b = appendString(b, s)
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// List is the sources of a layer, of which each is decoded when it is asked for.
// The zero value has none.
type List struct {
	b       []byte
	sources []place
}

// place is where the imports of a source begin.
type place struct {
	entry int32
	at    uint32
}

// Open returns the list that Append wrote, which must not be altered after. Errors
// wrap ErrFormat.
func Open(b []byte) (List, error) {
	if len(b) > MaxList {
		return List{}, fmt.Errorf("%w: %d bytes", ErrFormat, len(b))
	}
	l := List{b: b}
	d := decoder{b: b}
	entry := 0
	for len(d.b) > 0 && d.err == nil {
		if len(l.sources) == MaxSources {
			return List{}, fmt.Errorf("%w: more than %d sources", ErrFormat, MaxSources)
		}
		entry += int(d.uint(uint64(math.MaxInt32-entry), "entry"))
		l.sources = append(l.sources, place{int32(entry), uint32(len(b) - len(d.b))})
		d.source()
	}
	if d.err != nil {
		return List{}, d.err
	}
	return l, nil
}

// Len returns the number of sources.
func (l List) Len() int { return len(l.sources) }

// Size returns about how many bytes of memory the list takes.
func (l List) Size() int { return len(l.b) + 8*len(l.sources) }

// Entry returns the place of source i among the entries of its layer.
func (l List) Entry(i int) int { return int(l.sources[i].entry) }

// Source returns source i.
func (l List) Source(i int) Source {
	d := decoder{b: l.b[l.sources[i].at:], keep: true}
	s := d.source()
	s.Entry = l.Entry(i)
	return s
}

type decoder struct {
	b    []byte
	keep bool  // whether what is read is wanted
	err  error // the first one
}

// source reads all of a source but its entry.
func (d *decoder) source() (s Source) {
	for range d.count(MaxImports, 3) {
		x := Import{Level: int(d.uint(MaxLevel, "level")), Module: d.string(), Names: d.strings(MaxNames)}
		if d.keep {
			s.Imports = append(s.Imports, x)
		}
	}
	end := int64(0)
	for range d.count(MaxParts, 2) {
		var p Part
		p.Off = end + int64(d.uint(uint64(math.MaxInt64-end), "part"))
		p.Len = int64(d.uint(uint64(math.MaxInt64-p.Off), "part"))
		end = p.End()
		s.Parts = append(s.Parts, p)
	}
	s.Needs = d.strings(MaxNeeds)
	return s
}

func (d *decoder) strings(most int) (all []string) {
	for range d.count(most, 1) {
		if s := d.string(); d.keep {
			all = append(all, s)
		}
	}
	return all
}

func (d *decoder) uint(most uint64, what string) uint64 {
	v, n := binary.Uvarint(d.b)
	if d.err == nil && (n <= 0 || v > most) {
		d.err = fmt.Errorf("%w: %s", ErrFormat, what)
	}
	if d.err != nil {
		return 0
	}
	d.b = d.b[n:]
	return v
}

// count reads a number of things that take so many bytes each at least.
func (d *decoder) count(most, least int) int {
	return int(d.uint(min(uint64(most), uint64(len(d.b)/least)), "number"))
}

func (d *decoder) string() (s string) {
	n := d.uint(MaxModule, "name")
	if d.err == nil && n > uint64(len(d.b)) {
		d.err = fmt.Errorf("%w: name", ErrFormat)
	}
	if d.err != nil {
		return ""
	}
	if d.keep {
		s = string(d.b[:n])
	}
	d.b = d.b[n:]
	return s
}
