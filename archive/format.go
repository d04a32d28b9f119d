package archive

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/klauspost/compress/zstd"

	"github.com/beam-cloud/containerd-clip/archive/imports"
)

// Errors that Open and the accessors of Archive wrap.
var (
	// ErrNotArchive is returned when a file is no .clip file at all.
	ErrNotArchive = errors.New("not a .clip archive")
	// ErrNoSections is returned for a .clip file that upstream CLIP wrote:
	// it has no layer indexes to read lazily with.
	ErrNoSections = errors.New("archive was written by CLIP and has no layer indexes: index the image with clipctl to have them")
	// ErrVersion is returned when a newer program wrote the archive.
	ErrVersion = errors.New("archive was written by a newer version: upgrade containerd-clip, or index the image again with this version")
	// ErrCorrupt is returned when an archive is truncated or altered.
	ErrCorrupt = errors.New("archive is truncated or altered")
)

// Format version in the footer. A reader refuses a higher major version and
// ignores sections of a kind it does not know.
const formatVersion = 1

var footerMagic = [8]byte{'C', 'L', 'I', 'P', 'S', 'E', 'C', '\n'}

// footer is the last footerSize bytes of an archive, little-endian.
type footer struct {
	Magic       [8]byte
	Version     uint32
	Sections    uint32   // number of records in the section table
	TableOffset uint64   // of the section table, which ends where the footer starts
	TableSHA256 [32]byte // of the section table
	Reserved    [8]byte  // zero
}

const footerSize = 64

// record is one line of the section table, little-endian.
type record struct {
	Kind   uint32
	Layer  uint32 // number of the layer it belongs to; 0 for the others
	Offset uint64 // in the file
	Stored uint64 // bytes in the file, a zstd frame but for kindWindows
	Raw    uint64 // bytes after decompression
	SHA256 [32]byte
}

const recordSize = 64

// Kinds of section.
const (
	kindInfo     = 1 // JSON, see Info
	kindManifest = 2 // the image manifest, verbatim
	kindConfig   = 3 // the image config, verbatim
	kindSpans    = 4 // span part of a layer index
	kindEntries  = 5 // entry part of a layer index
	kindPrefetch = 6 // what a start of the image reads; missing if it was not recorded
	kindImports  = 7 // what files of a layer load; missing if there are none
	kindPoints   = 8 // seek points whose windows are in groups; missing if there are none
	kindWindows  = 9 // the groups of windows, as they are: each is a zstd frame
)

// Bounds on what an archive may declare, checked before anything is allocated.
const (
	maxSections = 1 << 16
	maxSection  = 1 << 30 // decompressed bytes of one section
	maxOutSize  = 1 << 49 // uncompressed bytes of a layer: more than the spans of one section can be
	maxDocument = 8 << 20 // of info, manifest and config: containerd's own bound for manifests
)

// frame is a section as it is stored.
type frame struct {
	stored []byte // a zstd frame, but for kindWindows
	raw    uint64 // bytes after decompression
	sha256 [32]byte
}

// newEncoder returns the encoder of frames: one goroutine and a fixed level, so
// that a section always becomes the same frame.
func newEncoder() (*zstd.Encoder, error) {
	// What repeats in a section is near: a larger window would cost memory only.
	return zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
}

func compress(enc *zstd.Encoder, raw []byte) frame {
	stored := enc.EncodeAll(raw, nil)
	return frame{stored, uint64(len(raw)), sha256.Sum256(stored)}
}

// plain is a section that is stored as it is.
func plain(raw []byte) frame { return frame{raw, uint64(len(raw)), sha256.Sum256(raw)} }

// sectionWriter collects sections and their table, in which offsets count from
// the first section.
type sectionWriter struct {
	stored [][]byte
	off    uint64
	table  []record
}

func (s *sectionWriter) add(kind, layer int, f frame) {
	s.table = append(s.table, record{
		Kind: uint32(kind), Layer: uint32(layer),
		Offset: s.off, Stored: uint64(len(f.stored)), Raw: f.raw, SHA256: f.sha256,
	})
	s.off += uint64(len(f.stored))
	s.stored = append(s.stored, f.stored)
}

func (s *sectionWriter) addOptional(kind, layer int, f *frame) {
	if f != nil {
		s.add(kind, layer, *f)
	}
}

// finish returns the sections with their table and footer, in pieces, for a
// file in which the first section is at offset start.
func (s *sectionWriter) finish(start uint64) ([][]byte, error) {
	for i := range s.table {
		s.table[i].Offset += start
	}
	var table, foot bytes.Buffer
	if err := binary.Write(&table, binary.LittleEndian, s.table); err != nil {
		return nil, err
	}
	err := binary.Write(&foot, binary.LittleEndian, footer{
		Magic: footerMagic, Version: formatVersion, Sections: uint32(len(s.table)),
		TableOffset: start + s.off, TableSHA256: sha256.Sum256(table.Bytes()),
	})
	return append(s.stored, table.Bytes(), foot.Bytes()), err
}

// sections reads the sections of an archive.
type sections struct {
	r     io.ReaderAt
	size  int64
	table []record
}

// at reads n bytes at off. Every byte of an archive is read through it.
func (s *sections) at(off, n uint64) ([]byte, error) {
	if off > uint64(s.size) || n > uint64(s.size)-off {
		return nil, fmt.Errorf("%w: %d bytes at %d are beyond its end at %d", ErrCorrupt, n, off, s.size)
	}
	b := make([]byte, n)
	got, err := s.r.ReadAt(b, int64(off))
	switch {
	case got == len(b):
		return b, nil
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("%w: %d bytes at %d are beyond its end", ErrCorrupt, n, off)
	}
	return nil, err
}

// readSections reads the section table of an archive; front says whether the
// part before the sections is there as well.
func readSections(r io.ReaderAt, size int64, front bool) (*sections, error) {
	s := &sections{r: r, size: size}
	if front {
		if err := checkMagic(s); err != nil {
			return nil, err
		}
	}
	if size < clipHeaderSize+footerSize {
		return nil, fmt.Errorf("%w: %d bytes are too few", ErrCorrupt, size)
	}
	b, err := s.at(uint64(size)-footerSize, footerSize)
	if err != nil {
		return nil, err
	}
	var f footer
	if err := binary.Read(bytes.NewReader(b), binary.LittleEndian, &f); err != nil {
		return nil, err
	}
	if f.Magic != footerMagic && !front {
		return nil, fmt.Errorf("%w: its footer is missing", ErrCorrupt)
	}
	if f.Magic != footerMagic {
		return nil, missingFooter(s)
	}
	if f.Version > formatVersion {
		return nil, fmt.Errorf("format version %d: %w", f.Version, ErrVersion)
	}
	end := uint64(size) - footerSize
	if f.Sections > maxSections || f.TableOffset > end || end-f.TableOffset != uint64(f.Sections)*recordSize {
		return nil, fmt.Errorf("%w: section table", ErrCorrupt)
	}
	table, err := s.at(f.TableOffset, end-f.TableOffset)
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(table) != f.TableSHA256 {
		return nil, fmt.Errorf("%w: section table does not match its digest", ErrCorrupt)
	}
	s.table = make([]record, f.Sections)
	return s, binary.Read(bytes.NewReader(table), binary.LittleEndian, s.table)
}

// checkMagic returns ErrNotArchive for a file that is no .clip file.
func checkMagic(s *sections) error {
	if s.size < clipHeaderSize {
		return ErrNotArchive
	}
	head, err := s.at(0, uint64(len(clipMagic)))
	if err == nil && !bytes.Equal(head, clipMagic) {
		err = ErrNotArchive
	}
	return err
}

// missingFooter tells an archive of upstream CLIP, which ends with its storage
// info, from one of ours that lost its end.
func missingFooter(s *sections) error {
	h, err := readClipHeader(s)
	if err != nil {
		return err
	}
	if h.end() == uint64(s.size) {
		return ErrNoSections
	}
	return fmt.Errorf("%w: its footer is missing", ErrCorrupt)
}

// borders returns where in the file the windows, the sections of the spans, and the
// rest begin. Windows that do not come first are not apart from what they are among,
// and neither are spans that are not together.
func (s *sections) borders() (windows, spans, rest int64) {
	var ends [3]uint64 // of what belongs to each
	starts := [3]uint64{uint64(s.size), uint64(s.size), uint64(s.size)}
	for _, rec := range s.table {
		part := 2
		switch rec.Kind {
		case kindWindows:
			part = 0
		case kindSpans, kindPoints:
			part = 1
		}
		starts[part] = min(starts[part], rec.Offset)
		ends[part] = max(ends[part], rec.Offset+rec.Stored)
	}
	rest = int64(starts[2])
	if ends[1] > starts[2] {
		rest = int64(min(starts[0], starts[1], starts[2]))
		return rest, rest, rest
	}
	spans = min(int64(starts[1]), rest)
	if ends[0] > uint64(spans) {
		spans = min(int64(starts[0]), spans)
	}
	return min(int64(starts[0]), spans), spans, rest
}

// has says whether there is a section of a kind.
func (s *sections) has(kind, layer int) bool {
	return slices.ContainsFunc(s.table, func(rec record) bool { return rec.Kind == uint32(kind) && rec.Layer == uint32(layer) })
}

// read returns the decompressed section of a kind, which may have at most most bytes.
func (s *sections) read(kind, layer int, most uint64) ([]byte, error) {
	f, err := s.frame(kind, layer, most)
	if err != nil {
		return nil, err
	}
	return f.inflate()
}

// imports returns the section of a layer's imports, or nil if there is none.
func (s *sections) imports(layer int) (*frame, error) {
	return s.optional(kindImports, layer, imports.MaxList)
}

// list decodes a section of imports, and returns it as it was encoded, too. No
// section is an empty one.
func (f *frame) list() (list imports.List, raw []byte, err error) {
	if f == nil {
		return list, nil, nil
	}
	if raw, err = f.inflate(); err == nil {
		list, err = imports.Open(raw)
	}
	if errors.Is(err, imports.ErrFormat) {
		err = fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return list, raw, err
}

// optional is frame for a section that may be missing: then it is nil.
func (s *sections) optional(kind, layer int, most uint64) (*frame, error) {
	if !s.has(kind, layer) {
		return nil, nil
	}
	f, err := s.frame(kind, layer, most)
	return &f, err
}

// frame returns the section of a kind, checked against its digest.
func (s *sections) frame(kind, layer int, most uint64) (frame, error) {
	for _, rec := range s.table {
		if rec.Kind != uint32(kind) || rec.Layer != uint32(layer) {
			continue
		}
		if rec.Raw > most || rec.Stored > most+most/64+1024 {
			return frame{}, fmt.Errorf("%w: section %d of layer %d declares %d bytes, more than %d", ErrCorrupt, kind, layer, rec.Raw, most)
		}
		stored, err := s.at(rec.Offset, rec.Stored)
		if err != nil {
			return frame{}, err
		}
		if sha256.Sum256(stored) != rec.SHA256 {
			return frame{}, fmt.Errorf("%w: section %d of layer %d does not match its digest", ErrCorrupt, kind, layer)
		}
		return frame{stored, rec.Raw, rec.SHA256}, nil
	}
	return frame{}, fmt.Errorf("%w: section %d of layer %d is missing", ErrCorrupt, kind, layer)
}

// inflate decompresses the section.
func (f frame) inflate() ([]byte, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(max(f.raw, 1<<10)), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	b, err := dec.DecodeAll(f.stored, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if uint64(len(b)) != f.raw {
		return nil, fmt.Errorf("%w: a section has %d bytes instead of %d", ErrCorrupt, len(b), f.raw)
	}
	return b, nil
}
