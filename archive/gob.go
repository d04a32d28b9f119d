package archive

import (
	"bytes"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Bounds on the types of a gob stream. CLIP's are 16 at most, 4 deep.
const (
	maxGobTypes = 64
	maxGobDepth = 16
)

// decodeGob decodes the one value of a gob stream into v, if its lists and maps
// have no more than most elements in all.
//
// encoding/gob trusts a map's count: it makes room for as many entries as the
// stream says before it reads one, and goes as many rounds to skip a map that v
// has no field for. So the stream is walked first: every count is then true.
func decodeGob(b []byte, most uint64, v any) error {
	n, err := gobElements(b)
	if err != nil {
		return err
	}
	if n > most {
		return fmt.Errorf("%d elements in %d bytes, more than %d", n, len(b), most)
	}
	return gob.NewDecoder(bytes.NewReader(b)).Decode(v)
}

// gobDefinition is how a gob stream defines a type: one of the fields is set.
// It has all of gob's own fields, which gob does not skip.
type gobDefinition struct {
	ArrayT *struct {
		CommonType gobCommon
		Elem, Len  int64
	}
	SliceT *struct {
		CommonType gobCommon
		Elem       int64
	}
	StructT *struct {
		CommonType gobCommon
		Field      []gobCommon
	}
	MapT *struct {
		CommonType gobCommon
		Key, Elem  int64
	}
	// Of types that encode themselves, as time.Time does.
	GobEncoderT, BinaryMarshalerT, TextMarshalerT *struct{ CommonType gobCommon }
}

type gobCommon struct {
	Name string
	Id   int64
}

type gobKind uint8

const (
	gobNone   gobKind = iota // not defined, or more than one at once
	gobList                  // a count and as many elements, each a value of every type in of
	gobStruct                // values of some of the types in of, with their distances
	gobBytes                 // a count and as many bytes
)

type gobType struct {
	kind gobKind
	of   []int64 // type numbers; those below 64 are gob's own
}

func (d *gobDefinition) simple() (t gobType) {
	kinds := 0
	set := func(kind gobKind, of ...int64) { t, kinds = gobType{kind, of}, kinds+1 }
	if d.ArrayT != nil {
		set(gobList, d.ArrayT.Elem)
	}
	if d.SliceT != nil {
		set(gobList, d.SliceT.Elem)
	}
	if d.MapT != nil {
		set(gobList, d.MapT.Key, d.MapT.Elem)
	}
	if d.StructT != nil {
		set(gobStruct)
		for _, f := range d.StructT.Field {
			t.of = append(t.of, f.Id)
		}
	}
	if d.GobEncoderT != nil || d.BinaryMarshalerT != nil || d.TextMarshalerT != nil {
		set(gobBytes)
	}
	if kinds != 1 {
		return gobType{}
	}
	return t
}

// gobWalker goes through a gob stream and keeps nothing of its values.
type gobWalker struct {
	types    map[int64]gobType
	b        []byte // the rest of the message
	elements uint64 // of the lists and maps so far
}

// gobElements returns how many elements the lists and maps in the one value of a
// gob stream have in all. They are not more than its bytes.
func gobElements(b []byte) (uint64, error) {
	w := &gobWalker{types: map[int64]gobType{}}
	for {
		w.b = b
		message, err := w.bytes()
		if err != nil {
			return 0, err
		}
		b, w.b = w.b, message
		id, err := w.int()
		if err != nil {
			return 0, err
		}
		if id >= 0 {
			err = w.top(id)
			return w.elements, err
		}
		if err := w.define(-id); err != nil {
			return 0, err
		}
	}
}

// define reads the definition of type id, the rest of the message. It is a value
// of a type that every gob decoder knows.
func (w *gobWalker) define(id int64) error {
	if _, twice := w.types[id]; twice || len(w.types) == maxGobTypes {
		return fmt.Errorf("type %d is defined twice, or more than %d are", id, maxGobTypes)
	}
	const number = 16 << 1 // of that type, as a signed number
	head := binary.BigEndian.AppendUint64([]byte{0xf8}, uint64(len(w.b))+1)
	var d gobDefinition
	err := gob.NewDecoder(bytes.NewReader(slices.Concat(head, []byte{number}, w.b))).Decode(&d)
	w.types[id] = d.simple()
	return err
}

// top goes through the value that is the rest of the message.
func (w *gobWalker) top(id int64) error {
	if w.types[id].kind != gobStruct { // it is sent like the only field of a struct
		if zero, err := w.uint(); err != nil || zero != 0 {
			return errors.New("malformed message")
		}
	}
	return w.value(id, 0)
}

// value goes through a value of type id.
func (w *gobWalker) value(id int64, depth int) error {
	if depth > maxGobDepth {
		return fmt.Errorf("values are nested more than %d deep", maxGobDepth)
	}
	switch id {
	case 1, 2, 3, 4: // bool, int, uint, float
		_, err := w.uint()
		return err
	case 5, 6: // bytes, string
		_, err := w.bytes()
		return err
	}
	switch t := w.types[id]; t.kind {
	case gobList:
		return w.list(t, depth)
	case gobStruct:
		return w.structure(t, depth)
	case gobBytes:
		_, err := w.bytes()
		return err
	}
	return fmt.Errorf("type %d is none that CLIP uses", id)
}

func (w *gobWalker) list(t gobType, depth int) error {
	n, err := w.uint()
	if err != nil {
		return err
	}
	if n > uint64(len(w.b)) { // an element takes a byte at least
		return fmt.Errorf("%d elements in %d bytes", n, len(w.b))
	}
	w.elements += n
	for range n {
		for _, id := range t.of {
			if err := w.value(id, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *gobWalker) structure(t gobType, depth int) error {
	for field := uint64(0); ; { // counted from 1
		step, err := w.uint()
		if err != nil || step == 0 {
			return err
		}
		if field += step; step > uint64(len(t.of)) || field > uint64(len(t.of)) {
			return errors.New("a field that its type does not have")
		}
		if err := w.value(t.of[field-1], depth+1); err != nil {
			return err
		}
	}
}

// uint reads an unsigned number: one byte below 128, or the negated number of
// bytes and these bytes, the highest first.
func (w *gobWalker) uint() (v uint64, err error) {
	if len(w.b) == 0 {
		return 0, io.ErrUnexpectedEOF
	}
	first := w.b[0]
	w.b = w.b[1:]
	if first < 0x80 {
		return uint64(first), nil
	}
	n := -int(int8(first))
	if n > 8 || n > len(w.b) {
		return 0, errors.New("malformed number")
	}
	for _, c := range w.b[:n] {
		v = v<<8 | uint64(c)
	}
	w.b = w.b[n:]
	return v, nil
}

// int reads a signed number: its lowest bit says whether the others are inverted.
func (w *gobWalker) int() (int64, error) {
	v, err := w.uint()
	if v&1 != 0 {
		return ^int64(v >> 1), err
	}
	return int64(v >> 1), err
}

// bytes reads a count and as many bytes.
func (w *gobWalker) bytes() ([]byte, error) {
	n, err := w.uint()
	if err != nil {
		return nil, err
	}
	if n > uint64(len(w.b)) {
		return nil, io.ErrUnexpectedEOF
	}
	b := w.b[:n]
	w.b = w.b[n:]
	return b, nil
}
