package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// An index is stored in parts, because they are needed at different times: the span
// part and the points in groups whenever bytes are read, the windows of these where
// decoding starts, the entry part only to build a root. All but the windows are
// sequences of unsigned and zigzag varints (encoding/binary) and
// length-prefixed strings; docs/format.md lists them field by field.

// ErrFormat is wrapped when an encoded index is malformed.
var ErrFormat = errors.New("malformed layer index")

// Bounds that a decoder enforces and a writer keeps to.
const (
	minSpanSize   = 4 << 10
	maxSpanSize   = 16 << 20
	maxWindowZstd = inflate.WindowSize + 1<<10 // a window that does not compress, framed
	maxPoints     = 1 << 21                    // seek points of a layer, of both parts
)

// About what these take at most in bytes, without what they refer to.
const (
	headSize  = 256
	spanSize  = 32 + 5
	pointSize = 5 + 5 + 1 + 2 + 3
)

// AppendSpans appends the encoded span part: everything but the entries, and the seek
// points whose windows are in groups.
func (x *Index) AppendSpans(b []byte) []byte {
	size := headSize + spanSize*len(x.Spans) + pointSize*len(x.Points)
	for _, p := range x.Points {
		size += len(p.State) + len(p.Window)
	}
	b = slices.Grow(b, size) // growing bit by bit would take several times as much
	b = appendString(b, string(x.Digest))
	b = appendString(b, string(x.DiffID))
	b = binary.AppendUvarint(b, uint64(x.Size))
	b = binary.AppendUvarint(b, uint64(x.OutSize))
	b = append(b, byte(x.Compression))
	b = binary.AppendUvarint(b, uint64(x.SpanSize))
	b = binary.AppendUvarint(b, uint64(len(x.Spans)))
	var in inflate.In
	for _, s := range x.Spans {
		b = binary.AppendUvarint(b, uint64(s.InEnd-in))
		b = append(b, s.Digest[:]...)
		in = s.InEnd
	}
	x = x.WithoutGroups()
	b = binary.AppendUvarint(b, uint64(len(x.Points)))
	var last Point
	for _, p := range x.Points {
		b = binary.AppendUvarint(b, uint64(p.Out-last.Out))
		b = binary.AppendUvarint(b, uint64(p.In-last.In))
		b = append(b, p.Bit)
		b = appendString(b, string(p.State))
		b = appendString(b, string(p.Window))
		last = p
	}
	return b
}

// entrySize is about what an entry takes in bytes.
const entrySize = 96

// AppendEntries appends the encoded entry part.
func (x *Index) AppendEntries(b []byte) []byte {
	b = slices.Grow(b, entrySize*len(x.Entries))
	b = binary.AppendUvarint(b, uint64(len(x.Entries)))
	var off inflate.Out
	var modTime int64
	for i := range x.Entries {
		e := &x.Entries[i]
		b = appendString(b, e.Name)
		b = append(b, e.Type)
		b = binary.AppendUvarint(b, uint64(e.Mode))
		b = binary.AppendUvarint(b, uint64(e.UID))
		b = binary.AppendUvarint(b, uint64(e.GID))
		b = binary.AppendVarint(b, e.ModTime-modTime)
		b = binary.AppendUvarint(b, uint64(e.ModNsec))
		modTime = e.ModTime
		switch e.Type {
		case TypeReg, TypeSparse:
			b = binary.AppendUvarint(b, uint64(e.Size))
			b = binary.AppendUvarint(b, uint64(e.Off-off))
			off = e.Off
			if e.Type == TypeSparse {
				b = appendExtents(b, e.Extents)
			}
		case TypeLink, TypeSymlink:
			b = appendString(b, e.Link)
		case TypeChar, TypeBlock:
			b = binary.AppendUvarint(b, uint64(e.DevMajor))
			b = binary.AppendUvarint(b, uint64(e.DevMinor))
		}
		b = binary.AppendUvarint(b, uint64(len(e.Xattrs)))
		for _, a := range e.Xattrs {
			b = appendString(b, a.Name)
			b = appendString(b, a.Value)
		}
	}
	return b
}

func appendExtents(b []byte, extents []Extent) []byte {
	b = binary.AppendUvarint(b, uint64(len(extents)))
	pos := int64(0)
	for _, x := range extents {
		b = binary.AppendUvarint(b, uint64(x.Pos-pos))
		b = binary.AppendUvarint(b, uint64(x.Len))
		pos = x.End()
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// DecodeSpans decodes a span part and checks that its offsets are consistent.
// The index it returns has no entries. Errors wrap ErrFormat.
func DecodeSpans(b []byte) (*Index, error) {
	r := &cursor{b: b}
	x := &Index{
		Digest:  r.digest(),
		DiffID:  r.digest(),
		Size:    inflate.In(r.uint(math.MaxInt64, "blob size")),
		OutSize: inflate.Out(r.uint(math.MaxInt64, "uncompressed size")),
	}
	x.Compression = Compression(r.byte())
	x.SpanSize = inflate.Out(r.uint(maxSpanSize, "span size"))
	r.check(x.Compression <= Zstd, "compression")
	r.check(r.err != nil || x.DiffID.Algorithm() == digest.SHA256, "diff ID")
	r.check(x.SpanSize >= minSpanSize && x.SpanSize%64 == 0, "span size")
	x.Spans = r.spans(x)
	x.Points = r.points(x)
	r.check(len(r.b) == 0, "bytes after its end")
	r.check(x.Compression != Uncompressed || inflate.Out(x.Size) == x.OutSize, "blob size")
	r.check(r.err != nil || x.spansFollowPoints(), "span ends before its seek point")
	if r.err != nil {
		return nil, r.err
	}
	return x, nil
}

func (r *cursor) spans(x *Index) []Span {
	n := r.count(1+32, "spans")
	if r.err != nil {
		return nil
	}
	want := (uint64(x.OutSize) + uint64(x.SpanSize) - 1) / uint64(x.SpanSize)
	r.check(uint64(n) == want, "number of spans")
	if n == 0 {
		return nil
	}
	spans := make([]Span, 0, n)
	var in inflate.In
	for range n {
		in += inflate.In(r.uint(uint64(x.Size-in), "span end"))
		s := Span{InEnd: in}
		copy(s.Digest[:], r.bytes(32))
		spans = append(spans, s)
		if r.err != nil {
			return nil
		}
	}
	return spans
}

func (r *cursor) points(x *Index) []Point {
	n := r.count(5, "seek points")
	r.check(n <= maxPoints, "number of seek points")
	if r.err != nil {
		return nil
	}
	r.check((x.Compression != Uncompressed && x.OutSize > 0) == (n > 0) || x.OutSize == 0, "number of seek points")
	if n == 0 {
		return nil
	}
	points := make([]Point, 0, n)
	var p Point
	for i := range n {
		p.Out += inflate.Out(r.uint(uint64(x.OutSize-p.Out), "seek point"))
		p.In += inflate.In(r.uint(uint64(x.Size-p.In), "seek point"))
		p.Bit = r.byte()
		r.check(p.Bit <= 7, "bit offset")
		p.State = r.blob(inflate.MaxState, "decoder state")
		p.Window = r.blob(maxWindowZstd, "window")
		r.check(i > 0 || p.Out == 0, "first seek point")
		if r.err != nil {
			return nil
		}
		points = append(points, p)
	}
	return points
}

// spansFollowPoints says whether every span ends behind the compressed offset
// at which decoding it starts.
func (x *Index) spansFollowPoints() bool {
	for i, s := range x.Spans {
		start, _ := x.SpanRange(i)
		if x.Compression != Uncompressed && x.Points[x.pointAt(start)].In > s.InEnd {
			return false
		}
	}
	return true
}

// DecodeEntries decodes an entry part into x, whose spans are there already:
// file contents must lie inside its stream. Errors wrap ErrFormat.
func (x *Index) DecodeEntries(b []byte) error {
	var entries []Entry
	err := x.readEntries(b, func(i, n int) *Entry {
		if entries == nil {
			entries = make([]Entry, n)
		}
		return &entries[i]
	})
	if err == nil {
		x.Entries = entries
	}
	return err
}

// CheckEntries says what DecodeEntries would, and leaves x as it is.
func (x *Index) CheckEntries(b []byte) error {
	var e Entry
	return x.readEntries(b, func(int, int) *Entry {
		e = Entry{}
		return &e
	})
}

// readEntries decodes each of n entries into the zero value that place returns
// for it.
func (x *Index) readEntries(b []byte, place func(i, n int) *Entry) error {
	r := &entryCursor{cursor: cursor{b: b, all: string(b)}, end: x.OutSize}
	n := r.count(8, "entries")
	if r.check(n <= DefaultMaxEntries, "number of entries"); r.err != nil {
		return r.err
	}
	for i := range n {
		if r.entry(place(i, n)); r.err != nil {
			return r.err
		}
	}
	r.check(len(r.b) == 0, "bytes after its end")
	return r.err
}

// entryCursor reads entries, each of which says what is new since the last.
type entryCursor struct {
	cursor
	end     inflate.Out // of the layer
	off     inflate.Out
	modTime int64
	totals  totals
}

func (r *entryCursor) entry(e *Entry) {
	e.Name, e.Type = r.string(maxString, "name"), r.byte()
	e.Mode = uint32(r.uint(0o7777, "mode"))
	e.UID = uint32(r.uint(math.MaxUint32, "uid"))
	e.GID = uint32(r.uint(math.MaxUint32, "gid"))
	r.modTime += r.int()
	e.ModTime = r.modTime
	e.ModNsec = uint32(r.uint(999_999_999, "nanoseconds"))
	switch e.Type {
	case TypeReg:
		e.Size = int64(r.uint(uint64(r.end), "file size"))
		r.off += inflate.Out(r.uint(uint64(r.end-r.off), "file offset"))
		e.Off = r.off
		r.check(inflate.Out(e.Size) <= r.end-r.off, "file beyond the end of its layer")
	case TypeSparse:
		e.Size = int64(r.uint(math.MaxInt64, "file size"))
		r.off += inflate.Out(r.uint(uint64(r.end-r.off), "file offset"))
		e.Off = r.off
		e.Extents = r.extents(e, r.end)
	case TypeLink, TypeSymlink:
		e.Link = r.string(maxString, "link")
	case TypeChar, TypeBlock:
		e.DevMajor = uint32(r.uint(math.MaxUint32, "device number"))
		e.DevMinor = uint32(r.uint(math.MaxUint32, "device number"))
	case TypeDir, TypeFifo:
	default:
		r.check(false, "entry type")
	}
	e.Xattrs = r.xattrs()
	r.check(r.totals.add(e) == nil, "holes or xattrs beyond their bounds")
}

// extents reads where the sparse file e has data; end is the end of its layer.
func (r *cursor) extents(e *Entry, end inflate.Out) []Extent {
	n := r.count(2, "extents")
	if r.err != nil || n == 0 {
		return nil
	}
	extents := make([]Extent, 0, n)
	next := Extent{Off: e.Off}
	for i := range n {
		gap := int64(r.uint(uint64(e.Size-next.Pos), "extent"))
		next.Pos += gap
		next.Len = int64(r.uint(uint64(e.Size-next.Pos), "extent"))
		r.check(next.Len > 0 && (gap > 0 || i == 0), "extent")
		r.check(inflate.Out(next.Len) <= end-next.Off, "file beyond the end of its layer")
		if r.err != nil {
			return nil
		}
		extents = append(extents, next)
		next.Pos, next.Off = next.End(), next.Off+inflate.Out(next.Len)
	}
	r.check(checkExtents(&Entry{Size: e.Size, Extents: extents}) == nil, "extents")
	return extents
}

func (r *cursor) xattrs() []Xattr {
	n := r.count(2, "xattrs")
	r.check(n <= maxXattrs/4, "number of xattrs")
	if r.err != nil || n == 0 {
		return nil
	}
	xattrs := make([]Xattr, 0, n)
	for range n {
		xattrs = append(xattrs, Xattr{Name: r.string(maxString, "xattr name"), Value: r.string(maxString, "xattr value")})
	}
	r.check(checkXattrs(xattrs) == nil, "size of xattrs")
	return xattrs
}

// maxString bounds names, links and xattr values: archive/tar reads no PAX
// header beyond 1 MiB.
const maxString = 1 << 20

// cursor reads an encoded index; after the first error it yields zeros.
type cursor struct {
	b   []byte // what is left
	all string // what there was, for strings to be parts of: one allocation in place of thousands
	err error
}

func (r *cursor) check(ok bool, what string) {
	if !ok && r.err == nil {
		r.err = fmt.Errorf("%w: %s", ErrFormat, what)
		r.b = nil
	}
}

func (r *cursor) uint(most uint64, what string) uint64 {
	if len(r.b) > 0 && r.b[0] < 0x80 && uint64(r.b[0]) <= most { // as most are
		v := r.b[0]
		r.b = r.b[1:]
		return uint64(v)
	}
	return r.long(most, what)
}

func (r *cursor) long(most uint64, what string) uint64 {
	v, n := binary.Uvarint(r.b)
	if r.check(n > 0 && v <= most, what); r.err != nil {
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *cursor) int() int64 {
	v, n := binary.Varint(r.b)
	if r.check(n > 0, "signed number"); r.err != nil {
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *cursor) byte() byte {
	if p := r.bytes(1); p != nil {
		return p[0]
	}
	return 0
}

// bytes returns the next n bytes, or nil after an error.
func (r *cursor) bytes(n int) []byte {
	if r.check(n <= len(r.b), "unexpected end"); r.err != nil {
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *cursor) string(most uint64, what string) string {
	n := int(r.uint(most, what))
	start := len(r.all) - len(r.b)
	if len(r.bytes(n)) == 0 {
		return ""
	}
	return r.all[start : start+n]
}

// blob is string for bytes that are a copy of their own; none are nil.
func (r *cursor) blob(most uint64, what string) []byte {
	return append([]byte(nil), r.bytes(int(r.uint(most, what)))...)
}

// count reads how many items follow, each of at least size bytes.
func (r *cursor) count(size int, what string) int {
	return int(r.uint(uint64(len(r.b)/size), what))
}

func (r *cursor) digest() digest.Digest {
	d := digest.Digest(r.blob(256, "digest"))
	r.check(d.Validate() == nil, "digest")
	return d
}
