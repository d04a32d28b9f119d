package inflate

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

// Flag bits of a gzip member header (RFC 1952, section 2.3.1).
const (
	flagHeaderCRC = 1 << 1
	flagExtra     = 1 << 2
	flagName      = 1 << 3
	flagComment   = 1 << 4
)

// maxHeaderString bounds a name or comment; compress/gzip refuses longer ones.
const maxHeaderString = 512

var errHeader = errors.New("gzip: invalid header")

// source is what a header is read from.
type source interface {
	io.Reader
	io.ByteReader
}

// readHeader reads one gzip member header. It returns io.EOF, unwrapped, only
// where the stream ends before the first byte of one.
func readHeader(r source) error {
	var fixed [10]byte
	first, err := r.ReadByte()
	if err != nil {
		return err
	}
	fixed[0] = first
	if _, err := io.ReadFull(r, fixed[1:]); err != nil {
		return noEOF(err)
	}
	if fixed[0] != 0x1f || fixed[1] != 0x8b || fixed[2] != 8 {
		return errHeader
	}
	sum := crc32.ChecksumIEEE(fixed[:])
	flags := fixed[3]
	if flags&flagExtra != 0 {
		if sum, err = skipExtra(r, sum); err != nil {
			return err
		}
	}
	for _, flag := range []byte{flagName, flagComment} {
		if flags&flag == 0 {
			continue
		}
		if sum, err = skipString(r, sum); err != nil {
			return err
		}
	}
	if flags&flagHeaderCRC != 0 {
		var want [2]byte
		if _, err := io.ReadFull(r, want[:]); err != nil {
			return noEOF(err)
		}
		if binary.LittleEndian.Uint16(want[:]) != uint16(sum) {
			return errHeader
		}
	}
	return nil
}

func skipExtra(r source, sum uint32) (uint32, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return 0, noEOF(err)
	}
	extra := make([]byte, binary.LittleEndian.Uint16(size[:]))
	if _, err := io.ReadFull(r, extra); err != nil {
		return 0, noEOF(err)
	}
	sum = crc32.Update(sum, crc32.IEEETable, size[:])
	return crc32.Update(sum, crc32.IEEETable, extra), nil
}

func skipString(r source, sum uint32) (uint32, error) {
	for range maxHeaderString {
		b, err := r.ReadByte()
		if err != nil {
			return 0, noEOF(err)
		}
		sum = crc32.Update(sum, crc32.IEEETable, []byte{b})
		if b == 0 {
			return sum, nil
		}
	}
	return 0, errHeader
}
