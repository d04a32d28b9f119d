package inflate

import "math/bits"

// entry is what a decode table says of the bits that index it. Its fields, from
// the least significant bit:
//
//	 0-4   bits to consume: those of the codeword and the extra bits behind it
//	 8-11  bits of the codeword alone
//	12-15  flags of everything that is neither literal nor length nor distance
//	16-30  literal byte, base of a length or distance, or start of a subtable
//	31     literal
//
// In a subtable only the bits behind the first tableBits are counted. A link
// to a subtable consumes the first tableBits, and has at 8-11 the number of
// bits that index the subtable.
type entry uint32

const (
	entryLiteral entry = 1 << 31 // a literal
	entrySpecial entry = 1 << 15 // one of the three below
	entryLink    entry = 1 << 14 // link to a subtable
	entryEnd     entry = 1 << 13 // end of block
	entryInvalid entry = 1 << 12 // no codeword starts with these bits

	entryValue  = 16 // shift of the value
	entryLength = 8  // shift of the codeword's length
)

// consume returns how many bits e stands for.
func (e entry) consume() uint { return uint(e & 31) }

// codeBits returns how many of these are the codeword, or for a link, how many
// index the subtable.
func (e entry) codeBits() uint { return uint(e>>entryLength) & 15 }

// value returns the literal, base or subtable start.
func (e entry) value() uint { return uint(e>>entryValue) & 0x7fff }

// Sizes of the alphabets and of codewords (RFC 1951, section 3.2.7).
const (
	maxLitLen   = 286 // literals, end of block and lengths
	maxDist     = 30
	numPrecode  = 19
	maxCodeBits = 15
	endOfBlock  = 256

	// The alphabets of the fixed codes have two unused members more each.
	fixedLitLen = 288
	fixedDist   = 32
)

// Bits that index the first level of each table. More make fewer lookups in
// subtables and a larger table to build for each block and to keep in cache.
const (
	litLenBits  = 11
	distBits    = 8
	precodeBits = 7 // the longest codeword of the code length code
)

// Sizes of the tables with all subtables. A subtable indexed by k bits is no
// larger than its longest codeword asks for, so it holds at least k+1
// codewords: it takes at most 16/5 entries for each of 286 (k <= 15-11), or
// 128/8 for each of 30 (k <= 15-8). That makes 2964 and 736; the sizes are
// powers of two so that a mask bounds an index.
const (
	litLenSize = 4096
	distSize   = 1024
)

// Templates of the entries of each alphabet: value, flags and extra bits.
var (
	litLenEntries  = makeLitLenEntries()
	distEntries    = makeDistEntries()
	precodeEntries = makePrecodeEntries()
)

func makeLitLenEntries() (t [fixedLitLen]entry) {
	for i := range endOfBlock {
		t[i] = entryLiteral | entry(i)<<entryValue
	}
	t[endOfBlock] = entrySpecial | entryEnd
	base := entry(3)
	for i := endOfBlock + 1; i < maxLitLen-1; i++ {
		extra := entry(max(0, (i-endOfBlock-1)/4-1))
		t[i] = base<<entryValue | extra
		base += 1 << extra
	}
	t[maxLitLen-1] = 258 << entryValue
	t[maxLitLen], t[maxLitLen+1] = entrySpecial|entryInvalid, entrySpecial|entryInvalid
	return t
}

func makeDistEntries() (t [fixedDist]entry) {
	base := entry(1)
	for i := range maxDist {
		extra := entry(max(0, i/2-1))
		t[i] = base<<entryValue | extra
		base += 1 << extra
	}
	t[maxDist], t[maxDist+1] = entrySpecial|entryInvalid, entrySpecial|entryInvalid
	return t
}

func makePrecodeEntries() (t [numPrecode]entry) {
	for i := range t {
		t[i] = entry(i) << entryValue
	}
	return t
}

// tableBuilder fills a decode table with the codewords of one code, shortest
// first. It holds codewords reversed, the first bit lowest, as they come out
// of the stream.
type tableBuilder struct {
	table     []entry
	tableBits uint    // that index the first level
	templates []entry // by symbol

	count   [maxCodeBits + 1]int // codewords by length, still to be entered
	symbols [fixedLitLen]uint16  // in the order of their codewords
	used    int                  // symbols that have a codeword
	next    int                  // index in symbols of the next to enter
	code    uint                 // its codeword
}

// buildTable fills table for the canonical code (RFC 1951, section 3.2.2) with
// the given codeword lengths. It reports whether they make a usable code: a
// complete one, or, as zlib and compress/flate accept, one of no codeword at
// all or of a single one-bit codeword.
func buildTable(table []entry, tableBits uint, lengths []uint8, templates []entry) bool {
	b := tableBuilder{table: table, tableBits: tableBits, templates: templates}
	for _, l := range lengths {
		b.count[l]++
	}
	b.count[0] = 0
	room := 1 // codewords of length l that are not taken
	for l := 1; l <= maxCodeBits; l++ {
		room = room<<1 - b.count[l]
		if room < 0 {
			return false
		}
	}
	b.sort(lengths)
	if room == 0 {
		b.fillFirst()
		b.fillSubtables()
		return true
	}
	if b.used > b.count[1] {
		return false
	}
	b.fillSingle()
	return true
}

// sort puts the symbols that have a codeword in the order of these: by length,
// then by value.
func (b *tableBuilder) sort(lengths []uint8) {
	var at [maxCodeBits + 1]int
	for l := 1; l <= maxCodeBits; l++ {
		at[l] = b.used
		b.used += b.count[l]
	}
	for symbol, l := range lengths {
		if l != 0 {
			b.symbols[at[l]] = uint16(symbol)
			at[l]++
		}
	}
}

// take returns the entry for the next codeword, of which the last l bits are
// counted, and moves on to the codeword after it.
func (b *tableBuilder) take(codeBits, l uint) entry {
	e := b.templates[b.symbols[b.next]] + entry(l<<entryLength|l)
	b.next++
	// Add 1, reversed. After the last codeword there is nothing to move on to.
	if zeros := ^b.code & (1<<codeBits - 1); zeros != 0 {
		top := uint(1) << (bits.Len(zeros) - 1)
		b.code = b.code&(top-1) | top
	}
	return e
}

// fillSingle enters the codeword 0, if there is one, in a table that is
// otherwise invalid.
func (b *tableBuilder) fillSingle() {
	first := b.table[:1<<b.tableBits]
	for i := range first {
		first[i] = entrySpecial | entryInvalid | 1
	}
	if b.used == 0 {
		return
	}
	e := b.take(1, 1)
	for i := 0; i < len(first); i += 2 {
		first[i] = e
	}
}

// fillFirst enters the codewords of up to tableBits bits. It doubles the table
// with each bit of codeword length, so that each symbol is written once.
func (b *tableBuilder) fillFirst() {
	size := 1
	for l := uint(1); l <= b.tableBits; l++ {
		copy(b.table[size:2*size], b.table[:size])
		size *= 2
		for range b.count[l] {
			code := b.code
			b.table[code] = b.take(l, l)
		}
	}
}

// fillSubtables enters the longer codewords, in one subtable for all that
// begin with the same tableBits bits.
func (b *tableBuilder) fillSubtables() {
	end := 1 << b.tableBits
	var subtable []entry
	prefix := ^uint(0)
	for l := b.tableBits + 1; l <= maxCodeBits; l++ {
		sub := l - b.tableBits
		for ; b.count[l] > 0; b.count[l]-- {
			if p := b.code & (1<<b.tableBits - 1); p != prefix {
				prefix = p
				indexBits := b.subtableBits(l)
				b.table[p] = entrySpecial | entryLink | entry(end)<<entryValue |
					entry(indexBits<<entryLength|b.tableBits)
				subtable = b.table[end : end+1<<indexBits]
				end += len(subtable)
			}
			i := b.code >> b.tableBits
			for e := b.take(l, sub); i < uint(len(subtable)); i += 1 << sub {
				subtable[i] = e
			}
		}
	}
}

// subtableBits returns how many bits index the subtable whose first codeword,
// of l bits, is the next: as many as it takes for the codewords that are left
// to fill it.
func (b *tableBuilder) subtableBits(l uint) uint {
	n := l - b.tableBits
	for room := 1<<n - b.count[l]; room > 0; {
		n++
		room = room<<1 - b.count[b.tableBits+n]
	}
	return n
}
