package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// GNU tar's sparse files as PAX records say them, see "Storing Sparse Files"
// in its manual. archive/tar reads them and checks their maps, but keeps the
// maps to itself: here they are read again.
const (
	paxSparseMajor = "GNU.sparse.major"
	paxSparseMinor = "GNU.sparse.minor"
	paxSparseMap   = "GNU.sparse.map"
	paxSize        = "size"
)

// sparseMap says where a file's sparse map is.
type sparseMap int

const (
	notSparse    sparseMap = iota
	mapInRecords           // versions 0.0, which archive/tar turns into 0.1, and 0.1
	mapInContent           // version 1.0: before the data, in whole blocks
)

// sparseVersion decides as archive/tar does.
func sparseVersion(hdr *tar.Header) sparseMap {
	major, minor := hdr.PAXRecords[paxSparseMajor], hdr.PAXRecords[paxSparseMinor]
	switch {
	case major == "0" && (minor == "0" || minor == "1"):
		return mapInRecords
	case major == "1" && minor == "0":
		return mapInContent
	case major == "" && minor == "" && hdr.PAXRecords[paxSparseMap] != "":
		return mapInRecords
	default:
		return notSparse
	}
}

// readExtents returns the extents of a sparse file whose data starts at off,
// and how many bytes of data there are. Anything but exactly that many bytes
// in the stream is left to an ordinary unpack, which refuses it.
func readExtents(hdr *tar.Header, where sparseMap, off inflate.Out, head []byte) ([]Extent, int64, error) {
	size, content, err := storedContent(hdr, head)
	if err != nil {
		return nil, 0, fmt.Errorf("sparse file: %w: %w", err, ErrUnsupported)
	}
	var numbers []string
	switch {
	case where == mapInContent:
		numbers = strings.Split(string(content), "\n")
		count, err := strconv.ParseInt(numbers[0], 10, 32)
		if err != nil || 2*count > int64(len(numbers)-1) {
			return nil, 0, fmt.Errorf("map of a sparse file: %w", ErrUnsupported)
		}
		numbers = numbers[1 : 1+2*count]
		size -= int64(len(content))
	case len(content) > 0:
		return nil, 0, fmt.Errorf("sparse file: its header is not where it should be: %w", ErrUnsupported)
	case hdr.PAXRecords[paxSparseMap] != "":
		numbers = strings.Split(hdr.PAXRecords[paxSparseMap], ",")
	}
	extents, stored, err := parseExtents(numbers, off)
	if err != nil {
		return nil, 0, fmt.Errorf("map of a sparse file: %w: %w", err, ErrUnsupported)
	}
	if stored != size {
		return nil, 0, fmt.Errorf("sparse file with %d bytes of data, %d in its map: %w", size, stored, ErrUnsupported)
	}
	return extents, stored, nil
}

// parseExtents reads pairs of position and length. Empty extents are dropped,
// ones that touch become one.
func parseExtents(numbers []string, off inflate.Out) (extents []Extent, stored int64, err error) {
	for ; len(numbers) >= 2; numbers = numbers[2:] {
		pos, err := strconv.ParseInt(numbers[0], 10, 64)
		if err != nil {
			return nil, 0, err
		}
		length, err := strconv.ParseInt(numbers[1], 10, 64)
		if err != nil {
			return nil, 0, err
		}
		if length == 0 {
			continue
		}
		if n := len(extents); n > 0 && extents[n-1].End() == pos {
			extents[n-1].Len += length
		} else {
			extents = append(extents, Extent{Pos: pos, Len: length, Off: off + inflate.Out(stored)})
		}
		stored += length
	}
	return extents, stored, nil
}

// blockSize is tar's.
const blockSize = 512

// Where a header block has its size, and its type.
const (
	headerSizeAt = 124
	headerSizeTo = 136
	headerTypeAt = 156
)

// storedContent returns how many bytes an entry takes in the stream, and the
// first of them. head holds its header behind those that only describe it.
func storedContent(hdr *tar.Header, head []byte) (int64, []byte, error) {
	if len(head) >= maxHead {
		return 0, nil, errors.New("headers are too long")
	}
	for len(head) >= blockSize {
		block := head[:blockSize]
		size, err := strconv.ParseInt(strings.Trim(string(block[headerSizeAt:headerSizeTo]), " \x00"), 8, 64)
		switch block[headerTypeAt] {
		case tar.TypeXHeader, tar.TypeGNULongName, tar.TypeGNULongLink:
			if skip := blockSize + blockAlign(size); err == nil && size >= 0 && skip <= int64(len(head)) {
				head = head[skip:]
				continue
			}
			return 0, nil, errors.New("size in a header")
		}
		if v := hdr.PAXRecords[paxSize]; v != "" {
			size, err = strconv.ParseInt(v, 10, 64)
		}
		return size, head[blockSize:], err
	}
	return 0, nil, errors.New("no header")
}

// checkExtents makes sure that a sparse file can be addressed in blocks: an
// extent may end inside one only where the file does.
func checkExtents(e *Entry) error {
	for _, x := range e.Extents {
		if x.Pos%blockSize != 0 || x.Off%blockSize != 0 || x.End()%blockSize != 0 && x.End() != e.Size {
			return fmt.Errorf("sparse file with data at %d to %d, stored at %d, not in blocks of %d: %w",
				x.Pos, x.End(), x.Off, blockSize, ErrUnsupported)
		}
	}
	if _, n := Chunks(e.Size, e.Extents); n > maxChunks {
		return fmt.Errorf("sparse file of %d pieces: %w", n, ErrUnsupported)
	}
	return nil
}

// maxChunks bounds the chunks of all sparse files of a layer: 16 GiB if their
// data is aligned to 4 KiB, which takes 32 MiB in an EROFS image.
const maxChunks = 4 << 20

// Chunks cuts a sparse file into pieces of one size, a power of two, each of
// which is all data or all hole, but for the end of the last. The size is the
// largest that serves, up to 1 TiB, and for any Entry's extents at least 512.
func Chunks(size int64, extents []Extent) (chunk, count int64) {
	if size <= 0 {
		return blockSize, 0
	}
	ends := min(max(uint64(1)<<bits.Len64(uint64(size-1)), blockSize), maxFile)
	for _, x := range extents {
		ends |= uint64(x.Pos)
		if x.End() != size {
			ends |= uint64(x.End())
		}
	}
	chunk = 1 << bits.TrailingZeros64(ends)
	return chunk, (size-1)/chunk + 1
}
