package inflate

import (
	"encoding/binary"
	"errors"
	"math"
)

const (
	outSize = 512 << 10 // bytes of output that a Buffer holds, the window included

	// outSlack is how far behind the end of a match its copying may write.
	outSlack = 32

	// ownLimit is how far a Reader goes in a Buffer of its own: of less memory, more
	// stays in the processor's cache.
	ownLimit = outSize/2 - outSlack
)

// MaxFill is how much output a Buffer has room for behind the window, in bytes.
const MaxFill = outSize - outSlack - WindowSize

// Buffer is memory that a Reader decodes into. It is not cleared before it is used.
type Buffer [outSize + wordSlack]byte

// What a stream can have wrong.
var (
	errBlockType  = errors.New("invalid block type")
	errStored     = errors.New("stored block's length does not match its complement")
	errCodeCount  = errors.New("too many codeword lengths")
	errRepeat     = errors.New("invalid repetition of codeword lengths")
	errCode       = errors.New("over-subscribed or incomplete Huffman code")
	errSymbol     = errors.New("invalid codeword")
	errTooFarBack = errors.New("match begins before the start of the output")
	errChecksum   = errors.New("gzip: invalid checksum")
	errPoint      = errors.New("unusable seek point")
)

// place says where in the grammar of RFC 1951, section 3.2.3, a decoder is.
type place uint8

// The places.
const (
	atHeader  place = iota // the next bit starts a block
	inStored               // the next byte is literal
	inHuffman              // the next bit starts a codeword, after the match if one is open
	atEnd                  // the final block has ended
)

// decoder decodes one DEFLATE stream (RFC 1951) after the other from in to
// out. It stops at exactly the output offset it is told, and has then consumed
// no more bits than the output up to there took.
//
// out[base:op] is output. The window of the next byte is out[max(base,
// op-WindowSize):op].
type decoder struct {
	in bitReader

	place     place
	final     bool // the block is the last one
	fixed     bool // the tables are those of the fixed codes
	stored    int  // bytes left of a stored block
	matchLen  int  // bytes left of the open match
	matchDist int

	base int // where the stream's output starts: a match reaches no further back
	op   int // end of the output
	// mark is the seek point that is waiting for its window, as an index in
	// out: matches from before it are recorded in used. 0 if there is none.
	mark int
	used [WindowSize + wordSlack]byte // out[mark-WindowSize:mark], zero where nothing was copied from
	low  int                          // start of the first byte in used that was

	// The output up to out[needOp] takes the stream's bits before needBit. Not
	// kept up to date inside blocks: there, the output takes all bits consumed.
	needOp  int
	needBit int64

	// The block's header, for a seek point inside the block.
	header     [maxHeader]byte // as in the stream
	headerBit  uint            // where in header[0] it starts
	headerBits uint            // its length

	litLen  [litLenSize]entry
	dist    [distSize]entry
	lengths [maxLitLen + maxDist]uint8 // scratch of readCodes
	out     *Buffer
}

// begin starts a stream at the next bit.
func (d *decoder) begin() {
	d.place, d.final, d.base = atHeader, false, d.op
}

// run decodes up to out[limit], or less: to the end of the block.
func (d *decoder) run(limit int) error {
	switch d.place {
	case atHeader:
		return d.readBlockHeader()
	case inStored:
		return d.runStored(limit)
	case inHuffman:
		return d.runHuffman(limit)
	}
	return nil
}

func (d *decoder) runStored(limit int) error {
	n, err := d.in.Read(d.out[d.op:min(limit, d.op+d.stored)])
	d.op += n
	d.stored -= n
	if d.stored == 0 {
		d.endBlock(d.in.bitPos())
		return nil
	}
	return noEOF(err)
}

// runHuffman decodes codewords up to out[limit] or the end of the block.
func (d *decoder) runHuffman(limit int) error {
	in := &d.in
	for d.op < limit && d.place == inHuffman {
		if d.matchLen > 0 {
			d.copyMatch(limit)
			continue
		}
		if in.end-in.pos < fastInSlack {
			in.fill()
		}
		if in.end-in.pos >= fastInSlack && limit-d.op >= fastOutSlack {
			if err := d.runFast(limit); err != nil {
				return err
			}
			if d.matchLen > 0 || d.op == limit {
				continue
			}
		}
		if err := d.step(); err != nil {
			return err
		}
	}
	return nil
}

// step decodes one codeword and what belongs to it.
func (d *decoder) step() error {
	in := &d.in
	before := in.bitPos()
	in.refill()
	e, err := in.code(d.litLen[:], litLenBits)
	if err != nil {
		return err
	}
	v := in.value(e)
	switch {
	case e&entryLiteral != 0:
		d.out[d.op] = byte(v)
		d.op++
		return nil
	case e&entryEnd != 0:
		d.endBlock(before)
		return nil
	}
	length := v
	if e, err = in.code(d.dist[:], distBits); err != nil {
		return err
	}
	return d.openMatch(int(length), int(in.value(e)))
}

// openMatch begins a match.
func (d *decoder) openMatch(length, dist int) error {
	from := d.op - dist
	if from < d.base {
		return errTooFarBack
	}
	d.matchLen, d.matchDist = length, dist
	if from < d.mark {
		d.markUsed(from, length)
	}
	return nil
}

// markUsed records what a match copies from before the seek point that is
// waiting for its window. It is called for many of the matches: words at a time,
// the last of which is cut off, are faster than copy.
func (d *decoder) markUsed(from, length int) {
	at := from - (d.mark - WindowSize)
	d.low = min(d.low, at)
	n := min(length, d.mark-from)
	for ; n > 8; n -= 8 {
		binary.LittleEndian.PutUint64(d.used[at&(WindowSize-1):], d.out.word(from))
		at += 8
		from += 8
	}
	word := d.used[at&(WindowSize-1):]
	last := d.out.word(from) & (math.MaxUint64 >> (64 - 8*uint(n)))
	binary.LittleEndian.PutUint64(word, binary.LittleEndian.Uint64(word)|last)
}

// copyMatch copies the open match up to out[limit].
func (d *decoder) copyMatch(limit int) {
	n := min(d.matchLen, limit-d.op)
	d.matchLen -= n
	// A match may overlap its own output: what lies between its source and
	// its end is then repeated.
	for from := d.op - d.matchDist; n > 0; {
		c := copy(d.out[d.op:d.op+n], d.out[from:d.op])
		d.op += c
		n -= c
	}
}

// endBlock ends the block. The output so far took the bits before the given one.
func (d *decoder) endBlock(bit int64) {
	if d.op != d.needOp {
		d.needOp, d.needBit = d.op, bit
	}
	d.place = atHeader
	if d.final {
		d.place = atEnd
	}
}

// need returns the least number of bytes of the stream that the output so far
// can be decoded from.
func (d *decoder) need() In {
	bit := d.needBit
	if d.op != d.needOp {
		bit = d.in.bitPos()
	}
	return In((bit + 7) >> 3)
}

// moveTo goes on in the buffer to, behind the window, which it copies there. It
// may be the one that the decoder is in.
func (d *decoder) moveTo(to *Buffer) {
	by := d.op - WindowSize // negative where the output is shorter
	if d.op > 0 {
		copy(to[max(0, -by):WindowSize], d.out[max(0, by):d.op])
	}
	d.out = to
	d.op = WindowSize
	d.needOp -= by
	d.base = max(0, d.base-by)
	if d.mark > 0 {
		d.mark = max(0, d.mark-by)
	}
}
