package inflate

// Block types (RFC 1951, section 3.2.3).
const (
	typeStored = iota
	typeFixed
	typeDynamic
)

// maxHeader is the length of the longest block header, in bytes, with up to 7
// bits before it: 3+14 bits, 19 lengths of 3 bits, and 286+30 lengths of at
// most 7 bits each (a repetition takes up to 14, but stands for 3 or more).
const maxHeader = (7+3+14+numPrecode*3+(maxLitLen+maxDist)*7)/8 + 1

// precodeOrder is the order in which the code length code's lengths are stored.
var precodeOrder = [numPrecode]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// readBlockHeader reads a block's header and makes its tables.
func (d *decoder) readBlockHeader() error {
	in := &d.in
	// With all of the header in buf, and what refill loads at once, nothing
	// moves there before it is copied below.
	in.ensure(maxHeader + 2*wordSlack)
	start, first := in.bitPos(), in.first()
	v, err := in.take(3)
	if err != nil {
		return err
	}
	d.final = v&1 != 0
	switch v >> 1 {
	case typeStored:
		return d.readStored()
	case typeFixed:
		d.useFixed()
	case typeDynamic:
		if err := d.readCodes(); err != nil {
			return err
		}
	default:
		return errBlockType
	}
	copy(d.header[:], in.buf[first:])
	d.headerBit, d.headerBits = uint(start&7), uint(in.bitPos()-start)
	d.place = inHuffman
	return nil
}

func (d *decoder) readStored() error {
	in := &d.in
	in.skip(in.n & 7)
	v, err := in.take(32)
	if err != nil {
		return err
	}
	if v&0xffff != ^v>>16&0xffff {
		return errStored
	}
	in.align()
	d.stored = int(v & 0xffff)
	d.place = inStored
	if d.stored == 0 {
		d.endBlock(in.bitPos())
	}
	return nil
}

// useFixed makes the tables of the fixed codes (RFC 1951, section 3.2.6).
func (d *decoder) useFixed() {
	if d.fixed {
		return
	}
	var lengths [fixedLitLen]uint8
	for i := range lengths {
		switch {
		case i < 144:
			lengths[i] = 8
		case i < 256:
			lengths[i] = 9
		case i < 280:
			lengths[i] = 7
		default:
			lengths[i] = 8
		}
	}
	buildTable(d.litLen[:], litLenBits, lengths[:], litLenEntries[:])
	for i := range fixedDist {
		lengths[i] = 5
	}
	buildTable(d.dist[:], distBits, lengths[:fixedDist], distEntries[:])
	d.fixed = true
}

// readCodes reads the code lengths of a dynamic block (RFC 1951, section
// 3.2.7) and makes its tables.
func (d *decoder) readCodes() error {
	in := &d.in
	v, err := in.take(14)
	if err != nil {
		return err
	}
	numLitLen, numDist, numLengths := int(v&31)+257, int(v>>5&31)+1, int(v>>10)+4
	if numLitLen > maxLitLen || numDist > maxDist {
		return errCodeCount
	}
	var precode [numPrecode]uint8
	for _, symbol := range precodeOrder[:numLengths] {
		v, err := in.take(3)
		if err != nil {
			return err
		}
		precode[symbol] = uint8(v)
	}
	// The table of the code length code lives where a table is built later.
	d.fixed = false
	if !buildTable(d.litLen[:], precodeBits, precode[:], precodeEntries[:]) {
		return errCode
	}
	lengths := d.lengths[:numLitLen+numDist]
	if err := d.readLengths(lengths); err != nil {
		return err
	}
	if !buildTable(d.litLen[:], litLenBits, lengths[:numLitLen], litLenEntries[:]) ||
		!buildTable(d.dist[:], distBits, lengths[numLitLen:], distEntries[:]) {
		return errCode
	}
	return nil
}

// readLengths reads codeword lengths by means of the code length code.
func (d *decoder) readLengths(lengths []uint8) error {
	in := &d.in
	for i := 0; i < len(lengths); {
		in.refill()
		e, err := in.code(d.litLen[:], precodeBits)
		if err != nil {
			return err
		}
		symbol := in.value(e)
		if symbol < 16 {
			lengths[i] = uint8(symbol)
			i++
			continue
		}
		var repeated uint8
		var bits, least uint
		switch symbol {
		case 16:
			if i == 0 {
				return errRepeat
			}
			repeated, bits, least = lengths[i-1], 2, 3
		case 17:
			bits, least = 3, 3
		case 18:
			bits, least = 7, 11
		}
		n, err := in.take(bits)
		if err != nil {
			return err
		}
		n += least
		if int(n) > len(lengths)-i {
			return errRepeat
		}
		for range n {
			lengths[i] = repeated
			i++
		}
	}
	return nil
}

// state returns what Point.State holds for the next byte of output.
func (d *decoder) state() []byte {
	switch d.place {
	case inStored:
		var final byte
		if d.final {
			final = 1
		}
		lo, hi := byte(d.stored), byte(d.stored>>8)
		return []byte{final, lo, hi, ^lo, ^hi}
	case inHuffman:
		s := make([]byte, (d.headerBits+7)/8)
		for i := range s {
			two := uint(d.header[i])
			if i+1 < len(d.header) {
				two |= uint(d.header[i+1]) << 8
			}
			s[i] = byte(two >> d.headerBit)
		}
		s[len(s)-1] &= 0xff >> (-d.headerBits & 7)
		return s
	}
	return nil
}
