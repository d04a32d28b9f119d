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
	points         *frame // nil if there are no groups of windows, and so is windows
	windows        *frame
	imports        *frame // nil if there are none
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
	if len(x.Groups) > 0 {
		if int64(len(x.Windows)) != x.WindowsSize() {
			return nil, fmt.Errorf("layer %s: the index lacks its windows", x.Digest)
		}
		c.raw = x.AppendPoints(c.raw[:0])
		points, windows := compress(c.enc, c.raw), plain(x.Windows)
		e.points, e.windows = &points, &windows
	}
	c.raw = x.AppendEntries(c.raw[:0])
	e.entries = compress(c.enc, c.raw)
	if len(x.Imports) > 0 {
		f := compress(c.enc, x.Imports)
		e.imports = &f
	}
	return e, nil
}

// Write writes the sections of e with a table and a footer, as they end an
// archive.
func (e *EncodedIndex) Write(w io.Writer) error {
	s := new(sectionWriter)
	s.addAll(0, e)
	pieces, err := s.finish(0)
	if err != nil {
		return err
	}
	return writeAll(w, pieces)
}

// addAll adds the sections of one index.
func (s *sectionWriter) addAll(layer int, e *EncodedIndex) {
	s.addOptional(kindWindows, layer, e.windows)
	s.addSpans(layer, e)
	s.add(kindEntries, layer, e.entries)
	s.addOptional(kindImports, layer, e.imports)
}

// addSpans adds the sections that tell where to read.
func (s *sectionWriter) addSpans(layer int, e *EncodedIndex) {
	s.add(kindSpans, layer, e.spans)
	s.addOptional(kindPoints, layer, e.points)
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
	if err := e.readSpans(s); err != nil {
		return nil, err
	}
	if e.entries, err = s.frame(kindEntries, 0, maxSection); err != nil {
		return nil, err
	}
	entries, err := e.entries.inflate()
	if err != nil {
		return nil, err
	}
	if err := e.index.DecodeEntries(entries); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if e.imports, err = s.imports(0); err == nil {
		_, e.index.Imports, err = e.imports.list()
	}
	return e, err
}

// readSpans reads the sections that tell where to read, and the windows.
func (e *EncodedIndex) readSpans(s *sections) (err error) {
	if e.spans, err = s.frame(kindSpans, 0, maxSection); err != nil {
		return err
	}
	if e.points, err = s.optional(kindPoints, 0, maxSection); err != nil {
		return err
	}
	if e.index, err = decodeSpans(e.spans, e.points); err != nil {
		return err
	}
	if err := s.checkWindows(0, e.index); err != nil || e.points == nil {
		return err
	}
	windows, err := s.frame(kindWindows, 0, maxSection)
	e.windows, e.index.Windows = &windows, windows.stored
	return err
}

// decodeSpans decodes the span part of an index, and the points that stand apart from
// it unless that is nil.
func decodeSpans(spans frame, points *frame) (*layer.Index, error) {
	raw, err := spans.inflate()
	if err != nil {
		return nil, err
	}
	x, err := layer.DecodeSpans(raw)
	if err == nil && points != nil {
		if raw, err = points.inflate(); err != nil {
			return nil, err
		}
		err = x.DecodePoints(raw)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return x, nil
}

// checkWindows returns an error if there is no section with as many bytes of windows
// as x says. It does not read them.
func (s *sections) checkWindows(layer int, x *layer.Index) error {
	want := uint64(x.WindowsSize())
	for _, rec := range s.table {
		if rec.Kind == kindWindows && rec.Layer == uint32(layer) {
			if rec.Stored != want || rec.Raw != want {
				return fmt.Errorf("%w: %d bytes of windows instead of %d", ErrCorrupt, rec.Stored, want)
			}
			return nil
		}
	}
	if want > 0 {
		return fmt.Errorf("%w: its windows are missing", ErrCorrupt)
	}
	return nil
}
