package cache

import (
	"crypto/sha256"
	"encoding/binary"
	"math/bits"
)

// bitmap has one bit per span, the lowest first.
type bitmap []uint64

func newBitmap(spans int) bitmap { return make(bitmap, (spans+63)/64) }

func (b bitmap) get(i int) bool { return b[i/64]>>(i%64)&1 == 1 }
func (b bitmap) set(i int)      { b[i/64] |= 1 << (i % 64) }
func (b bitmap) clear(i int)    { b[i/64] &^= 1 << (i % 64) }

func (b bitmap) count() int {
	n := 0
	for _, w := range b {
		n += bits.OnesCount64(w)
	}
	return n
}

// encode returns the bitmap, little-endian, behind its SHA-256.
func (b bitmap) encode() []byte {
	raw := make([]byte, sha256.Size, sha256.Size+8*len(b))
	for _, w := range b {
		raw = binary.LittleEndian.AppendUint64(raw, w)
	}
	sum := sha256.Sum256(raw[sha256.Size:])
	copy(raw, sum[:])
	return raw
}

// decodeBitmap returns the encoded bitmap if it is whole and one of that many spans.
func decodeBitmap(raw []byte, spans int) (bitmap, bool) {
	b := newBitmap(spans)
	if len(raw) != sha256.Size+8*len(b) || sha256.Sum256(raw[sha256.Size:]) != [sha256.Size]byte(raw[:sha256.Size]) {
		return nil, false
	}
	for i := range b {
		b[i] = binary.LittleEndian.Uint64(raw[sha256.Size+8*i:])
	}
	if spans%64 != 0 && b[len(b)-1]>>(spans%64) != 0 {
		return nil, false
	}
	return b, true
}
