package archive

import (
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// EncodedIndex is a layer index together with the sections that it is in an
// archive. They depend on nothing else in the archive: whoever keeps them has
// no need to encode the index again for the next image with that layer.
type EncodedIndex struct {
	index          *layer.Index
	spans, entries frame
}

// Index returns the index. It must not be altered.
func (e *EncodedIndex) Index() *layer.Index { return e.index }

// Layer returns the layer of an Image with the index. Write stores the
// sections as they are.
func (e *EncodedIndex) Layer() Layer { return Layer{Index: e.index, encoded: e} }

// IndexEncoder encodes one layer index at a time. The zero value is ready.
type IndexEncoder struct {
	enc *zstd.Encoder
	raw []byte
}

// Encode encodes x, which must not be altered after. Equal indexes give equal
// sections.
func (c *IndexEncoder) Encode(x *layer.Index) (_ *EncodedIndex, err error) {
	if c.enc == nil {
		if c.enc, err = newEncoder(); err != nil {
			return nil, err
		}
	}
	e := &EncodedIndex{index: x}
	c.raw = x.AppendSpans(c.raw[:0])
	e.spans = compress(c.enc, c.raw)
	c.raw = x.AppendEntries(c.raw[:0])
	e.entries = compress(c.enc, c.raw)
	return e, nil
}

// Write writes the sections of e with a table and a footer, as they end an
// archive.
func (e *EncodedIndex) Write(w io.Writer) error {
	s := new(sectionWriter)
	s.add(kindSpans, 0, e.spans)
	s.add(kindEntries, 0, e.entries)
	pieces, err := s.finish(0)
	if err != nil {
		return err
	}
	return writeAll(w, pieces)
}

// ReadIndex reads and decodes what EncodedIndex.Write wrote. Errors wrap
// ErrCorrupt or ErrVersion, or are r's. The index is consistent; that it is the
// one of some layer is for the caller to see.
func ReadIndex(r io.ReaderAt, size int64) (*EncodedIndex, error) {
	s, err := readSections(r, size, false)
	if err != nil {
		return nil, err
	}
	e := new(EncodedIndex)
	if e.spans, err = s.frame(kindSpans, 0, maxSection); err != nil {
		return nil, err
	}
	if e.entries, err = s.frame(kindEntries, 0, maxSection); err != nil {
		return nil, err
	}
	spans, err := e.spans.inflate()
	if err != nil {
		return nil, err
	}
	entries, err := e.entries.inflate()
	if err != nil {
		return nil, err
	}
	if e.index, err = layer.DecodeSpans(spans); err == nil {
		err = e.index.DecodeEntries(entries)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return e, nil
}
