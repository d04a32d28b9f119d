package inflate

import (
	"encoding/binary"
	"errors"
	"io"
)

const (
	inSize = 64 << 10 // bytes of compressed stream held

	// wordSlack is what a load of a whole word may touch behind the bytes held.
	wordSlack = 8

	maxEmptyReads = 100
)

// bitReader reads a byte stream bit by bit, from the least significant bit of
// each byte on (RFC 1951, section 3.1.1).
//
// bits holds the next n bits of the stream; buf[pos:end] follows them. Bits of
// bits above the n-th are either zero or those that the stream has there:
// filling up ORs the same ones in again.
type bitReader struct {
	src  io.Reader
	err  error // from src, io.EOF too; nothing is read after it
	off  In    // of buf[0] in the stream
	pos  int
	end  int
	bits uint64
	n    uint
	buf  [inSize + wordSlack]byte
}

// reset makes b read src, whose first byte is at off.
func (b *bitReader) reset(src io.Reader, off In) {
	b.src, b.err, b.off = src, nil, off
	b.pos, b.end, b.bits, b.n = 0, 0, 0, 0
}

// bitPos returns the position of the next bit in the stream, in bits.
func (b *bitReader) bitPos() int64 {
	return (int64(b.off)+int64(b.pos))<<3 - int64(b.n)
}

// first returns the index in buf of the byte that holds the next bit.
func (b *bitReader) first() int { return b.pos - int(b.n+7)>>3 }

// fill reads from the source, at least one byte unless it ends or fails. It
// keeps the bytes from first on.
func (b *bitReader) fill() {
	if b.err != nil {
		return
	}
	if first := b.first(); first > 0 {
		copy(b.buf[:], b.buf[first:b.end])
		b.off += In(first)
		b.pos -= first
		b.end -= first
	}
	for range maxEmptyReads {
		n, err := b.src.Read(b.buf[b.end:inSize])
		b.end += n
		b.err = err
		if n > 0 || err != nil {
			return
		}
	}
	b.err = io.ErrNoProgress
}

// ensure holds at least size bytes, the one of the next bit included, unless
// the source ends before.
func (b *bitReader) ensure(size int) {
	for b.end-b.first() < size && b.err == nil {
		b.fill()
	}
}

// refill makes at least 56 bits available unless the source ends before.
func (b *bitReader) refill() {
	if b.end-b.pos >= wordSlack {
		b.bits |= binary.LittleEndian.Uint64(b.buf[b.pos:]) << (b.n & 63)
		b.pos += int((63 - b.n) >> 3)
		b.n |= 56
		return
	}
	for b.n < 56 {
		if b.pos == b.end {
			if b.fill(); b.pos == b.end {
				return
			}
		}
		b.bits |= uint64(b.buf[b.pos]) << b.n
		b.pos++
		b.n += 8
	}
}

// skip consumes n bits, which must be available.
func (b *bitReader) skip(n uint) {
	b.bits >>= n & 63
	b.n -= n
}

// take consumes and returns n <= 32 bits.
func (b *bitReader) take(n uint) (uint, error) {
	if b.n < n {
		if b.refill(); b.n < n {
			return 0, b.short()
		}
	}
	v := uint(b.bits) & (1<<n - 1)
	b.skip(n)
	return v, nil
}

// sourceError marks an error of the source, which is not the stream's fault.
type sourceError struct{ error }

// ended returns why there are no more bytes: io.EOF or a sourceError.
func (b *bitReader) ended() error {
	if b.err == io.EOF { // not errors.Is: a wrapped one tells of a failure
		return io.EOF
	}
	return sourceError{b.err}
}

// short returns why there are fewer bits than a well-formed stream has.
func (b *bitReader) short() error { return noEOF(b.ended()) }

// align skips to the next byte boundary and hands all whole bytes back to buf.
func (b *bitReader) align() {
	b.n &^= 7
	b.pos -= int(b.n >> 3)
	b.bits, b.n = 0, 0
}

// Read returns bytes. The reader must be aligned.
func (b *bitReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if b.pos == b.end {
		if b.fill(); b.pos == b.end {
			return 0, b.ended()
		}
	}
	n := copy(p, b.buf[b.pos:b.end])
	b.pos += n
	return n, nil
}

// ReadByte returns one byte. The reader must be aligned.
func (b *bitReader) ReadByte() (byte, error) {
	var p [1]byte
	_, err := b.Read(p[:])
	return p[0], err
}

// code returns the entry of the next codeword, which begins with bits that
// are still to be consumed. The caller has called refill.
func (b *bitReader) code(table []entry, tableBits uint) (entry, error) {
	e := table[b.bits&(1<<tableBits-1)]
	if e&entryLink != 0 && b.n >= tableBits {
		b.skip(tableBits)
		e = table[e.value()+uint(b.bits)&(1<<e.codeBits()-1)]
	}
	if e.consume() > b.n {
		return 0, b.short()
	}
	if e&entryInvalid != 0 {
		return 0, errSymbol
	}
	return e, nil
}

// value consumes the bits of e and returns its value, extra bits added.
func (b *bitReader) value(e entry) uint {
	extra := uint(b.bits) & (1<<e.consume() - 1) >> e.codeBits()
	b.skip(e.consume())
	return e.value() + extra
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
