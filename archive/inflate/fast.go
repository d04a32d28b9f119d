package inflate

import "encoding/binary"

const (
	// fastInSlack is how much input one turn of runFast's loop may load: it
	// refills up to three times, which takes at most 7 bytes but loads 8.
	fastInSlack = 3*7 + wordSlack

	// maxMatch is the length of the longest match (RFC 1951, section 3.2.5).
	maxMatch = 258

	// fastOutSlack is how much output one turn makes: literals and a match.
	fastOutSlack = 3 + maxMatch
)

// These three index buffers whose sizes are powers of two, plus the slack of a
// word. Callers keep within them; the mask only tells the compiler so, which
// then leaves out the check of bounds. A fault in the callers' reasoning could
// thus corrupt the output, but not memory.

func (b *bitReader) word(i int) uint64 {
	return binary.LittleEndian.Uint64(b.buf[i&(inSize-1):])
}

func (b *Buffer) word(i int) uint64 {
	return binary.LittleEndian.Uint64(b[i&(outSize-1):])
}

func (b *Buffer) setWord(i int, v uint64) {
	binary.LittleEndian.PutUint64(b[i&(outSize-1):], v)
}

// repeats tells how to fill a word with the first bytes of another, by their
// number: mask them, multiply, and advance by the largest multiple of their
// number that a word holds.
var repeats = [8]struct {
	mask, factor uint64
	advance      int
}{
	1: {1<<8 - 1, 0x0101_0101_0101_0101, 8},
	2: {1<<16 - 1, 0x0001_0001_0001_0001, 8},
	3: {1<<24 - 1, 1<<48 | 1<<24 | 1, 6},
	4: {1<<32 - 1, 1<<32 | 1, 8},
	5: {1<<40 - 1, 1<<40 | 1, 5},
	6: {1<<48 - 1, 1<<48 | 1, 6},
	7: {1<<56 - 1, 1<<56 | 1, 7},
}

// runFast decodes codewords while input and output have slack. It stops before
// a codeword that it leaves to step, or with an open match.
//
// This is the hot loop, and it is one function for that reason: its state is in
// registers. What limits it is the chain from one table lookup over the shift
// of bits to the next lookup. So the next entry is looked up before bits is
// refilled and, behind a match, before that is copied. There are always enough
// bits: a refill makes 56, of which three literals take 33 (a first level
// lookup, litLenBits, each), two literals and a length 42, and a distance 28.
func (d *decoder) runFast(limit int) error {
	in, out := &d.in, d.out
	bits, n, pos, op := in.bits, in.n, in.pos, d.op
	lastPos, lastOp := in.end-fastInSlack, limit-fastOutSlack
	floor := max(d.base, d.mark)

	// Of n, only the lowest 6 bits count: entries are subtracted whole.
	bits |= in.word(pos) << (n & 63)
	pos += int(^n >> 3 & 7)
	n |= 56
	e := d.litLen[bits&(1<<litLenBits-1)]
	for pos <= lastPos && op <= lastOp {
		if e&entryLiteral != 0 {
			bits >>= e & 63
			n -= uint(e)
			out[op&(outSize-1)] = byte(e >> entryValue)
			op++
			e = d.litLen[bits&(1<<litLenBits-1)]
			if e&entryLiteral != 0 {
				bits >>= e & 63
				n -= uint(e)
				out[op&(outSize-1)] = byte(e >> entryValue)
				op++
				e = d.litLen[bits&(1<<litLenBits-1)]
				if e&entryLiteral != 0 {
					bits >>= e & 63
					n -= uint(e)
					out[op&(outSize-1)] = byte(e >> entryValue)
					op++
					e = d.litLen[bits&(1<<litLenBits-1)]
					bits |= in.word(pos) << (n & 63)
					pos += int(^n >> 3 & 7)
					n |= 56
					continue
				}
			}
		}
		if e&entrySpecial != 0 {
			if e&entryLink == 0 {
				break
			}
			sub := d.litLen[(e.value()+uint(bits>>litLenBits)&(1<<e.codeBits()-1))&(litLenSize-1)]
			if sub&entrySpecial != 0 {
				break
			}
			e = sub
			bits >>= litLenBits
			n -= litLenBits
			if e&entryLiteral != 0 {
				bits >>= e & 63
				n -= uint(e)
				out[op&(outSize-1)] = byte(e >> entryValue)
				op++
				e = d.litLen[bits&(1<<litLenBits-1)]
				bits |= in.word(pos) << (n & 63)
				pos += int(^n >> 3 & 7)
				n |= 56
				continue
			}
		}
		length := int(uint(e>>entryValue) + uint(bits)&(1<<(e&63)-1)>>(e>>entryLength&63))
		bits >>= e & 63
		n -= uint(e)

		e = d.dist[bits&(1<<distBits-1)]
		bits |= in.word(pos) << (n & 63)
		pos += int(^n >> 3 & 7)
		n |= 56
		if e&entryLink != 0 {
			bits >>= distBits
			n -= distBits
			e = d.dist[(e.value()+uint(bits)&(1<<e.codeBits()-1))&(distSize-1)]
		}
		if e&entrySpecial != 0 {
			in.bits, in.n, in.pos, d.op = bits, n&63, pos, op
			return errSymbol
		}
		dist := int(uint(e>>entryValue) + uint(bits)&(1<<(e&63)-1)>>(e>>entryLength&63))
		bits >>= e & 63
		n -= uint(e)
		from := op - dist
		if from < floor {
			if from < d.base {
				in.bits, in.n, in.pos, d.op = bits, n&63, pos, op
				return errTooFarBack
			}
			d.markUsed(from, length)
		}

		e = d.litLen[bits&(1<<litLenBits-1)]
		bits |= in.word(pos) << (n & 63)
		pos += int(^n >> 3 & 7)
		n |= 56

		// Copied are whole words, three at first: that is enough for most
		// matches. What is too much gets overwritten, or lies behind limit.
		end := op + length
		if dist >= 8 {
			out.setWord(op, out.word(from))
			out.setWord(op+8, out.word(from+8))
			out.setWord(op+16, out.word(from+16))
			from += 8
			for op += 24; op < end; op += 16 {
				from += 16
				out.setWord(op, out.word(from))
				out.setWord(op+8, out.word(from+8))
			}
		} else {
			r := &repeats[dist&7]
			word := out.word(from) & r.mask * r.factor
			for ; op < end; op += r.advance {
				out.setWord(op, word)
			}
		}
		op = end
	}
	in.bits, in.n, in.pos, d.op = bits, n&63, pos, op
	return nil
}
