// Package record notes what is read of an image when it starts.
//
// A touch is the first read of a piece of a layer. A Recording is the touches
// of one root, in their order. There are two ways to one:
//
// A Recorder listens to the layers that all roots share, for a while after a
// root is mounted, and keeps the last recording of each chain of layers in a
// file. It sees what the kernel asks for: that includes what the kernel reads
// ahead, lacks what the kernel has in memory or reads from a device of its own,
// and cannot tell which of two images that start at the same time reads a layer
// that they share.
//
// A Recording of its own (New) listens to streams that only one root reads. It
// sees all that the kernel asks for, if it had nothing of that root in memory.
//
// The package does not fetch, and does not know what a span is: touches are in
// bytes of the uncompressed layers.
package record

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// version of Document.
const version = 1

// Document is what was recorded, as it is kept and handed out.
type Document struct {
	Version int             `json:"version"`
	Image   string          `json:"image"` // reference it was pulled by
	ChainID digest.Digest   `json:"chainID"`
	Layers  []digest.Digest `json:"layers"` // diff IDs, lowest first
	Began   time.Time       `json:"began"`
	// Hidden are layers that were read without our seeing all of it.
	Hidden []int `json:"hidden,omitempty"`
	// Full says that there was more than MostBytes.
	Full    bool    `json:"full,omitempty"`
	Touches []Touch `json:"touches"`
}

// Touch is the first read of [Off, Off+Len) of a layer.
type Touch struct {
	Layer  int   `json:"layer"` // position in Document.Layers
	Off    int64 `json:"off"`
	Len    int64 `json:"len"`
	Millis int64 `json:"ms"` // after Began
}

// Bounds of a recording. Touches are of whole pieces.
const (
	pieceSize  = 16 << 10
	mostPieces = 1 << 16
	MostBytes  = mostPieces * pieceSize
)

// Stream is a layer's uncompressed stream.
type Stream interface {
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	Size() int64
}

// Recording collects the touches of one root. It is safe for concurrent use.
type Recording struct {
	mu   sync.Mutex // guards the fields below
	doc  Document
	seen map[piece]struct{}
}

type piece struct {
	layer int
	n     int64
}

// New returns a recording that begins now. Of doc, what says which image it is
// counts.
func New(doc Document) *Recording {
	doc.Version, doc.Began, doc.Touches = version, time.Now().UTC(), nil
	return &Recording{doc: doc, seen: map[piece]struct{}{}}
}

// Document returns what was recorded so far.
func (r *Recording) Document() Document {
	r.mu.Lock()
	defer r.mu.Unlock()
	doc := r.doc
	doc.Touches = slices.Clone(doc.Touches)
	return doc
}

// Stream returns s, whose reads are recorded as those of a layer.
func (r *Recording) Stream(layer int, s Stream) Stream { return &single{s, r, layer} }

type single struct {
	Stream
	rec   *Recording
	layer int
}

func (s *single) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	s.rec.touch(s.layer, off, min(int64(len(p)), s.Size()-off))
	return s.Stream.ReadAt(ctx, p, off)
}

// touch notes a read of n bytes of a layer.
func (r *Recording) touch(layer int, off, n int64) {
	if off < 0 || n <= 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := off / pieceSize; i*pieceSize < off+n; i++ {
		if _, ok := r.seen[piece{layer, i}]; ok {
			continue
		}
		if len(r.seen) == mostPieces {
			r.doc.Full = true
			return
		}
		r.seen[piece{layer, i}] = struct{}{}
		last := len(r.doc.Touches) - 1
		if last >= 0 && r.doc.Touches[last].Layer == layer && r.doc.Touches[last].Off+r.doc.Touches[last].Len == i*pieceSize {
			r.doc.Touches[last].Len += pieceSize
			continue
		}
		r.doc.Touches = append(r.doc.Touches, Touch{
			Layer: layer, Off: i * pieceSize, Len: pieceSize, Millis: time.Since(r.doc.Began).Milliseconds(),
		})
	}
}
