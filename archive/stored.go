package archive

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
)

// In a compressed archive the windows are a zstd frame of their own which compresses
// nothing: they are compressed already, and any piece of them can be fetched alone.
// The frame is a header and blocks of raw bytes, each but the last of storedBlock
// bytes behind a header (RFC 8878, sections 3.1.1.1 and 3.1.1.2).
const (
	storedBlock  = 128 << 10 // the most that a block may have
	blockHeader  = 3
	storedHeader = 4 + 1 + 1 // magic number, descriptor, window descriptor
)

// appendStored appends the n bytes of r as a zstd frame that compresses nothing.
func appendStored(b []byte, r io.Reader, n int64) ([]byte, error) {
	// No checksum, no content size, not a single segment; a window of 128 KiB.
	b = append(b, 0x28, 0xb5, 0x2f, 0xfd, 0, 7<<3)
	for n > 0 {
		size := min(n, storedBlock)
		n -= size
		header := uint32(size) << 3 // a raw block
		if n == 0 {
			header |= 1 // the last one
		}
		var le [4]byte
		binary.LittleEndian.PutUint32(le[:], header)
		b = append(b, le[:blockHeader]...)
		start := len(b)
		b = append(b, make([]byte, size)...)
		if _, err := io.ReadFull(r, b[start:]); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// Place is where the windows of a layer are that were not fetched with their archive:
// in a compressed archive.
type Place struct {
	Blob digest.Digest `json:"blob"` // the compressed archive
	In   int64         `json:"in"`   // where the frame with the windows begins in it
	Off  int64         `json:"off"`  // where those of the layer begin in what the frame holds
}

// Range returns the bytes [in, in+size) of the compressed archive in which the bytes
// [off, off+n) of the layer's windows are; n is at least 1.
func (p Place) Range(off, n int64) (in, size int64) {
	at := func(off int64) int64 { return storedHeader + off + blockHeader*(off/storedBlock+1) }
	first := p.Off + off
	in = at(first)
	return p.In + in, at(first+n-1) + 1 - in
}

// Cut returns the bytes [off, off+n) of the layer's windows out of b, which has what
// Range says. It reuses b.
func (p Place) Cut(b []byte, off, n int64) ([]byte, error) {
	if _, size := p.Range(off, n); int64(len(b)) != size {
		return nil, fmt.Errorf("%w: %d bytes of windows instead of %d", ErrCorrupt, len(b), size)
	}
	cut := b[:0]
	for pos := p.Off + off; ; {
		piece := min(storedBlock-pos%storedBlock, n)
		cut = append(cut, b[:piece]...)
		if n -= piece; n == 0 {
			return cut, nil
		}
		pos += piece
		b = b[piece+blockHeader:]
	}
}

// Validate returns an error for a place that cannot be one.
func (p Place) Validate() error {
	if err := p.Blob.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", p.Blob, err)
	}
	if p.In < 0 || p.Off < 0 || p.In > maxPlace || p.Off > maxPlace {
		return fmt.Errorf("offset %d in frame at %d", p.Off, p.In)
	}
	return nil
}

// maxPlace bounds the offsets of a place, so that none overflows.
const maxPlace = 1 << 48

// WindowsIn says that the archive was opened without its windows, which are in the
// compressed archive that has the digest blob and these parts, which PartsOf returned.
func (a *Archive) WindowsIn(blob digest.Digest, parts Parts) { a.blob, a.parts = blob, parts }

// Place returns where the windows of layer i are; ok is false if they are in the
// archive itself, or there are none.
func (a *Archive) Place(i int) (p Place, ok bool) {
	if a.blob == "" {
		return p, false
	}
	start, end := uint64(a.parts.Windows.Out), uint64(a.parts.Spans.Out)
	left := end - start // what is not of an earlier section: they do not overlap
	for _, rec := range a.s.table {
		if rec.Kind != kindWindows {
			continue
		}
		if rec.Offset < start || rec.Offset > end || rec.Stored > end-rec.Offset || rec.Stored > left {
			return Place{}, false
		}
		left -= rec.Stored
		if rec.Layer == uint32(i) {
			p = Place{Blob: a.blob, In: a.parts.Windows.In, Off: int64(rec.Offset - start)}
		}
	}
	return p, p.Validate() == nil
}
