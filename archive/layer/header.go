package layer

import (
	"archive/tar"
	"bytes"
	"encoding/binary"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// Most headers of a layer are ordinary: one block in the format of POSIX.1-1988
// without anything that was added to it later. Those are read here, in a
// fraction of the time that archive/tar takes; all others, and whatever looks
// wrong, are left to archive/tar.

// Fields of a header block, pax Interchange Format, POSIX.1-2017.
const (
	fieldMode     = 100
	fieldUID      = 108
	fieldGID      = 116
	fieldSize     = 124
	fieldMtime    = 136
	fieldChecksum = 148
	fieldType     = 156
	fieldLink     = 157
	fieldMagic    = 257
	fieldUname    = 265
	fieldDevMajor = 329
	fieldDevMinor = 337
	fieldPrefix   = 345
	fieldPadding  = 500
	fieldTrailer  = 508 // of star, whose prefix is shorter
)

const (
	posixMagic  = "ustar\x0000"
	starTrailer = "tar\x00"
)

// ordinaryEntry returns the entry that the header block b describes, whose
// content starts at off, if b is whole and archive/tar would return just that.
func ordinaryEntry(b []byte, off inflate.Out) (Entry, bool) {
	if len(b) < blockSize || string(b[fieldMagic:fieldUname]) != posixMagic || string(b[fieldTrailer:blockSize]) == starTrailer {
		return Entry{}, false
	}
	n := numbers{ok: true}
	e := Entry{Type: b[fieldType]}
	sum := n.octal(b[fieldChecksum:fieldType])
	e.Mode = uint32(n.octal(b[fieldMode:fieldUID]) & 0o7777)
	e.UID = uint32(n.octal(b[fieldUID:fieldGID])) // seven digits at most
	e.GID = uint32(n.octal(b[fieldGID:fieldSize]))
	e.Size = int64(n.octal(b[fieldSize:fieldMtime]))
	e.ModTime = int64(n.octal(b[fieldMtime:fieldChecksum]))
	n.octal(b[fieldDevMajor:fieldDevMinor])
	n.octal(b[fieldDevMinor:fieldPrefix])
	if !n.ok || sum != checksum(b) {
		return Entry{}, false
	}
	switch e.Type {
	case tar.TypeReg:
		e.Off = off
	case tar.TypeDir:
	case tar.TypeLink, tar.TypeSymlink:
		e.Link = cString(b[fieldLink:fieldMagic])
	default:
		return Entry{}, false
	}
	if e.Type != tar.TypeReg && e.Size != 0 || e.Size > maxFile {
		return Entry{}, false
	}
	e.Name = cString(b[:fieldMode])
	if b[fieldPrefix] != 0 {
		e.Name = cString(b[fieldPrefix:fieldPadding]) + "/" + e.Name
	}
	return e, true
}

// numbers reads numeric fields; ok stays true while they are octal digits, to
// the end or up to NULs or spaces.
type numbers struct{ ok bool }

func (n *numbers) octal(field []byte) (v uint64) {
	i := 0
	for ; i < len(field) && '0' <= field[i] && field[i] <= '7'; i++ {
		v = v<<3 | uint64(field[i]-'0')
	}
	for ; i < len(field); i++ {
		n.ok = n.ok && (field[i] == 0 || field[i] == ' ')
	}
	return v
}

// checksum is the sum of a header block's bytes, those of the checksum itself
// counted as spaces.
func checksum(b []byte) uint64 {
	const lanes = 0x00ff00ff00ff00ff
	var sum uint64 // four sums of 16 bits, of 128 bytes each
	for i := 0; i < blockSize; i += 8 {
		w := binary.LittleEndian.Uint64(b[i:])
		sum += w&lanes + w>>8&lanes
	}
	total := sum&0xffff + sum>>16&0xffff + sum>>32&0xffff + sum>>48
	for _, c := range b[fieldChecksum:fieldType] {
		total += ' ' - uint64(c)
	}
	return total
}

// cString is what a field holds before the first NUL.
func cString(field []byte) string {
	if i := bytes.IndexByte(field, 0); i >= 0 {
		field = field[:i]
	}
	return string(field)
}
