// Package detgob encodes values in encoding/gob's wire format, the same bytes every time.
//
// encoding/gob itself numbers types in the order a process first meets them
// and writes maps in random order, so equal values give different bytes. Here
// types are numbered from 65 in the order of their fields and maps are sorted
// by key. Any gob decoder reads the result. The wire format is the one
// described in the documentation of encoding/gob.
//
// Only what CLIP's types need is covered: booleans, numbers but floats,
// strings, byte slices, slices, maps with string keys, structs, pointers to
// these, and types with GobEncode.
package detgob

import (
	"encoding/gob"
	"fmt"
	"iter"
	"math/bits"
	"reflect"
	"sort"
)

// Type numbers that gob predefines.
const (
	idBool   = 1
	idInt    = 2
	idUint   = 3
	idBytes  = 5
	idString = 6
	firstID  = 65
)

// Encode returns the gob stream of one value.
func Encode(v any) ([]byte, error) {
	c := &compiler{types: map[reflect.Type]*wire{}, next: firstID}
	rv := reflect.Indirect(reflect.ValueOf(v))
	w, err := c.compile(rv.Type())
	if err != nil {
		return nil, err
	}
	body := appendInt(nil, int64(w.id))
	if rv.Kind() != reflect.Struct {
		body = append(body, 0) // a lone value is sent like the only field of a struct
	}
	if body, err = w.append(body, rv); err != nil {
		return nil, err
	}
	return append(c.defs, message(body)...), nil
}

// chunkSize is how much EncodeSlice gathers before it starts another buffer.
const chunkSize = 1 << 20

// EncodeSlice returns the gob stream of a []T, in pieces, without having all of
// its elements at once. Each of elements appends one to a buffer, as Append
// does, and is done with before the next one is asked for.
func EncodeSlice[T any](elements iter.Seq[func([]byte) []byte]) ([][]byte, error) {
	c := &compiler{types: map[reflect.Type]*wire{}, next: firstID}
	list, err := c.compile(reflect.TypeFor[[]T]())
	if err != nil {
		return nil, err
	}
	pieces, length := [][]byte{nil}, 0
	chunk, n := make([]byte, 0, chunkSize), uint64(0)
	for element := range elements {
		chunk = element(chunk)
		n++
		if len(chunk) > chunkSize*15/16 {
			pieces, length = append(pieces, chunk), length+len(chunk)
			chunk = make([]byte, 0, chunkSize)
		}
	}
	pieces, length = append(pieces, chunk), length+len(chunk)
	head := append(appendInt(nil, int64(list.id)), 0) // a lone value is sent like the only field of a struct
	head = appendUint(head, n)
	pieces[0] = append(appendUint(c.defs, uint64(len(head)+length)), head...)
	return pieces, nil
}

// Append appends v as an element of a slice. It finds its way through v as
// Encode does; Fields is quicker for who knows the type.
func Append[T any](b []byte, v T) ([]byte, error) {
	c := &compiler{types: map[reflect.Type]*wire{}, next: firstID}
	w, err := c.compile(reflect.TypeFor[T]())
	if err != nil {
		return nil, err
	}
	return w.append(b, reflect.ValueOf(v))
}

// Fields appends a struct field by field, in their order. The caller names them
// by their numbers, which count from 0 and leave out what is not exported. Those
// that are zero are not sent, as gob has it, but for structs.
type Fields struct {
	b    []byte
	next int // number of the field behind the last one sent
}

// NewFields returns the fields of a struct that is appended to b.
func NewFields(b []byte) Fields { return Fields{b: b} }

func (f *Fields) field(n int) {
	f.b = appendUint(f.b, uint64(n+1-f.next))
	f.next = n + 1
}

// Uint sends a field of an unsigned type.
func (f *Fields) Uint(n int, v uint64) {
	if v != 0 {
		f.field(n)
		f.b = appendUint(f.b, v)
	}
}

// Int sends a field of a signed type.
func (f *Fields) Int(n int, v int64) {
	if v != 0 {
		f.field(n)
		f.b = appendInt(f.b, v)
	}
}

// String sends a string or a byte slice.
func String[T string | []byte](f *Fields, n int, v T) {
	if len(v) > 0 {
		f.field(n)
		f.b = append(appendUint(f.b, uint64(len(v))), v...)
	}
}

// Struct starts a field that is a struct or points to one.
func (f *Fields) Struct(n int) Fields {
	f.field(n)
	return Fields{b: f.b}
}

// EndStruct ends the field that Struct started.
func (f *Fields) EndStruct(inner Fields) { f.b = inner.End() }

// End returns the buffer with the whole struct.
func (f *Fields) End() []byte { return append(f.b, 0) }

// wire is how one Go type is sent.
type wire struct {
	id     int
	append func(b []byte, v reflect.Value) ([]byte, error)
	// omit says that a struct field with this value is left out.
	omit func(v reflect.Value) bool
}

type compiler struct {
	types map[reflect.Type]*wire
	next  int
	defs  []byte // type definition messages
}

var gobEncoder = reflect.TypeFor[gob.GobEncoder]()

func (c *compiler) compile(t reflect.Type) (*wire, error) {
	if w, ok := c.types[t]; ok {
		return w, nil
	}
	if t.Kind() == reflect.Pointer {
		return c.pointer(t)
	}
	if t.Implements(gobEncoder) {
		return c.encoder(t), nil
	}
	switch t.Kind() {
	case reflect.Bool:
		return &wire{idBool, func(b []byte, v reflect.Value) ([]byte, error) {
			if v.Bool() {
				return append(b, 1), nil
			}
			return append(b, 0), nil
		}, reflect.Value.IsZero}, nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return &wire{idInt, func(b []byte, v reflect.Value) ([]byte, error) { return appendInt(b, v.Int()), nil }, reflect.Value.IsZero}, nil
	case reflect.Uint, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uint8:
		return &wire{idUint, func(b []byte, v reflect.Value) ([]byte, error) { return appendUint(b, v.Uint()), nil }, reflect.Value.IsZero}, nil
	case reflect.String:
		return &wire{idString, func(b []byte, v reflect.Value) ([]byte, error) { return appendString(b, v.String()), nil }, reflect.Value.IsZero}, nil
	case reflect.Slice:
		return c.slice(t)
	case reflect.Map:
		return c.mapping(t)
	case reflect.Struct:
		return c.structure(t)
	}
	return nil, fmt.Errorf("gob: type %s is not supported", t)
}

func (c *compiler) pointer(t reflect.Type) (*wire, error) {
	elem, err := c.compile(t.Elem())
	if err != nil {
		return nil, err
	}
	return &wire{elem.id, func(b []byte, v reflect.Value) ([]byte, error) {
		if v.IsNil() {
			return nil, fmt.Errorf("gob: nil %s", t)
		}
		return elem.append(b, v.Elem())
	}, func(v reflect.Value) bool { return v.IsNil() || elem.omit(v.Elem()) }}, nil
}

// encoder handles a type that encodes itself, as time.Time does.
func (c *compiler) encoder(t reflect.Type) *wire {
	w := c.define(t)
	// wireType.GobEncoderT is field 5, counted from 1; its only field is the common one.
	c.emit(w.id, func(b []byte) []byte {
		b = appendUint(b, 5)
		b = c.common(b, t, w.id)
		return append(b, 0)
	})
	w.omit = reflect.Value.IsZero
	w.append = func(b []byte, v reflect.Value) ([]byte, error) {
		p, err := v.Interface().(gob.GobEncoder).GobEncode()
		return appendString(b, string(p)), err
	}
	return w
}

func (c *compiler) slice(t reflect.Type) (*wire, error) {
	if t.Elem().Kind() == reflect.Uint8 {
		return &wire{idBytes, func(b []byte, v reflect.Value) ([]byte, error) { return appendString(b, string(v.Bytes())), nil },
			func(v reflect.Value) bool { return v.Len() == 0 }}, nil
	}
	w := c.define(t)
	elem, err := c.compile(t.Elem())
	if err != nil {
		return nil, err
	}
	c.emit(w.id, func(b []byte) []byte { // wireType.SliceT
		b = appendUint(b, 2)
		b = c.common(b, t, w.id)
		b = appendInt(append(b, 1), int64(elem.id))
		return append(b, 0)
	})
	w.omit = func(v reflect.Value) bool { return v.Len() == 0 }
	w.append = func(b []byte, v reflect.Value) ([]byte, error) {
		b = appendUint(b, uint64(v.Len()))
		for i := range v.Len() {
			var err error
			if b, err = elem.append(b, v.Index(i)); err != nil {
				return nil, err
			}
		}
		return b, nil
	}
	return w, nil
}

func (c *compiler) mapping(t reflect.Type) (*wire, error) {
	if t.Key().Kind() != reflect.String {
		return nil, fmt.Errorf("gob: key type of %s is not supported", t)
	}
	w := c.define(t)
	elem, err := c.compile(t.Elem())
	if err != nil {
		return nil, err
	}
	c.emit(w.id, func(b []byte) []byte { // wireType.MapT
		b = appendUint(b, 4)
		b = c.common(b, t, w.id)
		b = appendInt(append(b, 1), idString)
		b = appendInt(append(b, 1), int64(elem.id))
		return append(b, 0)
	})
	w.omit = reflect.Value.IsNil
	w.append = func(b []byte, v reflect.Value) ([]byte, error) {
		keys := v.MapKeys()
		sort.Slice(keys, func(i, j int) bool { return keys[i].String() < keys[j].String() })
		b = appendUint(b, uint64(len(keys)))
		for _, key := range keys {
			var err error
			if b, err = elem.append(appendString(b, key.String()), v.MapIndex(key)); err != nil {
				return nil, err
			}
		}
		return b, nil
	}
	return w, nil
}

func (c *compiler) structure(t reflect.Type) (*wire, error) {
	type field struct {
		index int
		name  string
		wire  *wire
	}
	w := c.define(t)
	var fields []field
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.IsExported() {
			continue
		}
		fw, err := c.compile(f.Type)
		if err != nil {
			return nil, fmt.Errorf("field %s: %w", f.Name, err)
		}
		fields = append(fields, field{i, f.Name, fw})
	}
	c.emit(w.id, func(b []byte) []byte { // wireType.StructT
		b = appendUint(b, 3)
		b = c.common(b, t, w.id)
		if len(fields) > 0 {
			b = appendUint(append(b, 1), uint64(len(fields)))
		}
		for _, f := range fields {
			b = appendString(append(b, 1), f.name)
			b = appendInt(append(b, 1), int64(f.wire.id))
			b = append(b, 0)
		}
		return append(b, 0)
	})
	w.omit = func(reflect.Value) bool { return false }
	w.append = func(b []byte, v reflect.Value) ([]byte, error) {
		last := -1
		for n, f := range fields {
			fv := v.Field(f.index)
			if f.wire.omit(fv) {
				continue
			}
			var err error
			if b, err = f.wire.append(appendUint(b, uint64(n-last)), fv); err != nil {
				return nil, fmt.Errorf("field %s: %w", f.name, err)
			}
			last = n
		}
		return append(b, 0), nil
	}
	return w, nil
}

// define reserves the next number for t.
func (c *compiler) define(t reflect.Type) *wire {
	w := &wire{id: c.next}
	c.next++
	c.types[t] = w
	return w
}

// emit writes the definition message of type id; fill appends the one field
// of wireType that is set.
func (c *compiler) emit(id int, fill func([]byte) []byte) {
	body := fill(appendInt(nil, int64(-id)))
	c.defs = append(c.defs, message(append(body, 0))...)
}

// common appends CommonType{Name, Id} as the first field of a type's definition.
func (c *compiler) common(b []byte, t reflect.Type, id int) []byte {
	b = append(b, 1)
	if t.Name() != "" {
		b = appendString(append(b, 1), t.Name())
		b = append(b, 1)
	} else {
		b = append(b, 2)
	}
	b = appendInt(b, int64(id))
	return append(b, 0)
}

func message(body []byte) []byte {
	return append(appendUint(nil, uint64(len(body))), body...)
}

func appendUint(b []byte, v uint64) []byte {
	if v < 1<<7 {
		return append(b, byte(v))
	}
	n := (bits.Len64(v) + 7) / 8
	b = append(b, byte(-n))
	for i := n - 1; i >= 0; i-- {
		b = append(b, byte(v>>(8*i)))
	}
	return b
}

func appendInt(b []byte, v int64) []byte {
	if v < 0 {
		return appendUint(b, uint64(^v)<<1|1)
	}
	return appendUint(b, uint64(v)<<1)
}

func appendString(b []byte, s string) []byte {
	return append(appendUint(b, uint64(len(s))), s...)
}
