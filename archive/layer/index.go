// Package layer describes one image layer: its entries, seek points and span digests.
//
// A layer is a tar stream, compressed or not. Building its Index reads the
// compressed bytes once; the Index then lets any range of the uncompressed
// stream be fetched, inflated and verified on its own.
//
// The uncompressed stream is cut into spans of SpanSize bytes (the last one may
// be shorter). A span is the unit of verification. Its digest is the SHA-256
// chaining value after it: the diff ID is the SHA-256 of the whole stream, so
// span i is genuine when hashing it on from the chaining value of span i-1
// gives the chaining value of span i. The chain starts at SHA-256's initial
// value and ends in the diff ID, and costs nothing beyond computing the diff ID.
//
// Offsets in the compressed stream are inflate.In, in the uncompressed one
// inflate.Out. In an uncompressed layer both are the same number.
//
// The package does not merge layers (see archive/tree) and does not fetch.
package layer

import (
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// Compression says how a layer's blob is compressed.
type Compression uint8

// The compressions an Index can describe.
const (
	Uncompressed Compression = iota
	Gzip
	Zstd
)

func (c Compression) String() string {
	switch c {
	case Uncompressed:
		return "uncompressed"
	case Gzip:
		return "gzip"
	case Zstd:
		return "zstd"
	default:
		return "unknown"
	}
}

// Index is what the run side needs to know of a layer to read it lazily.
type Index struct {
	Digest      digest.Digest // of the compressed blob, as in the manifest
	Size        inflate.In    // of the compressed blob, in bytes
	DiffID      digest.Digest // SHA-256 of the uncompressed stream
	OutSize     inflate.Out   // of the uncompressed stream, in bytes
	Compression Compression

	// SpanSize is the length of every span but the last, in uncompressed
	// bytes. It is a multiple of 64, SHA-256's block size.
	SpanSize inflate.Out
	Spans    []Span  // in stream order, covering [0, OutSize)
	Points   []Point // ascending, the first at Out 0; empty if Uncompressed
	Groups   []Group // of windows that are not in Points
	Windows  []byte  // what Groups describes, one frame behind the other; nil if it is elsewhere
	Entries  []Entry // in tar order, whiteouts included

	// Imports is what files of the layer load when they are loaded, see imports.Open.
	// It is no more than a hint, and empty if there is none.
	Imports []byte
}

// About what one takes in memory, in bytes, without what it refers to.
const (
	spanMemory   = 40
	pointMemory  = 96
	groupMemory  = 48
	entryMemory  = 152
	extentMemory = 24
	xattrMemory  = 32
)

// MemorySize returns about how many bytes the index takes in memory.
func (x *Index) MemorySize() int {
	n := spanMemory*len(x.Spans) + pointMemory*len(x.Points) + groupMemory*len(x.Groups) + len(x.Windows) +
		entryMemory*len(x.Entries) + len(x.Imports)
	for i := range x.Points {
		n += len(x.Points[i].State) + len(x.Points[i].Window)
	}
	for i := range x.Entries {
		e := &x.Entries[i]
		n += len(e.Name) + len(e.Link) + extentMemory*len(e.Extents)
		for _, attr := range e.Xattrs {
			n += xattrMemory + len(attr.Name) + len(attr.Value)
		}
	}
	return n
}

// Point is a seek point whose window is kept compressed, since an index may
// hold thousands of them. SeekPoint expands one.
type Point struct {
	Out    inflate.Out
	In     inflate.In
	Bit    uint8
	State  []byte
	Window []byte // zstd frame of at most inflate.WindowSize bytes; empty for an empty window

	// Group is which of the groups has the window, counted from 1, and the others say
	// where in it; zero if Window is all there is.
	Group, WindowOff, WindowSize int
}

// bare returns the point without its window.
func (p *Point) bare() inflate.Point {
	return inflate.Point{Out: p.Out, In: p.In, Bit: p.Bit, State: p.State}
}

// Span is one unit of verification.
type Span struct {
	// InEnd is the end of the compressed bytes that the span needs: it can be
	// decoded from [point.In, InEnd), where point is the last seek point at or
	// before the span's start.
	InEnd inflate.In
	// Digest is the SHA-256 chaining value after the span; for the last span,
	// the finished SHA-256 of the stream, which is the diff ID.
	Digest [32]byte
}

// Entry types, named as in POSIX pax; archive/tar's constants have the same values.
const (
	TypeReg     = '0'
	TypeLink    = '1' // hard link; Link is the entry it names
	TypeSymlink = '2'
	TypeChar    = '3'
	TypeBlock   = '4'
	TypeDir     = '5'
	TypeFifo    = '6'
	TypeSparse  = 'S' // regular file with holes; Extents is where it has data
)

// Entry is one tar entry, as the tar says it: names are not cleaned, whiteouts
// not interpreted.
type Entry struct {
	Name     string // as in the tar; bytes, not necessarily UTF-8
	Link     string // target of TypeLink and TypeSymlink
	Type     byte
	Mode     uint32 // permission, setuid, setgid and sticky bits: 07777
	UID, GID uint32
	DevMajor uint32
	DevMinor uint32
	ModTime  int64       // seconds since 1970
	ModNsec  uint32      // 0-999,999,999
	Size     int64       // bytes of file content, holes included; 0 unless TypeReg or TypeSparse
	Off      inflate.Out // where the content starts in the uncompressed stream
	Extents  []Extent    // TypeSparse: ascending, not touching each other, inside Size
	Xattrs   []Xattr     // sorted by name
}

// Extent is a piece of a file's content. What a sparse file's extents leave out
// reads as zeros. Their data follows each other in the stream without gaps.
type Extent struct {
	Pos int64       // in the file
	Len int64       // at least 1
	Off inflate.Out // in the uncompressed stream
}

// End returns the position in the file behind the extent.
func (e Extent) End() int64 { return e.Pos + e.Len }

// Xattr is one extended attribute, with its full name ("security.capability").
type Xattr struct {
	Name  string
	Value string // bytes
}
