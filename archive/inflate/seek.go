package inflate

import (
	"bytes"
	"encoding/binary"
	"io"
	"math"
)

// maxOffset bounds the offsets of a seek point and the distance between two, so
// that sums and bit positions do not overflow. No stream is that long.
const maxOffset = 1 << 56

// enough is a window that is not worth looking for a smaller one, in words that
// are not zero.
const enough = 16

// apart is the least distance between the starts of candidates. To note what
// matches copy slows decoding: of twice as many candidates the best windows would
// be a twentieth smaller.
const apart = 2 * WindowSize

// patience is how much output is waited for the start of a block, where a candidate
// begins and where it ends: to stop inside a block takes time.
func (z *Reader) patience() Out { return z.opts.Interval / 8 }

// latest returns where the candidate is weighed at the latest.
func (z *Reader) latest() Out {
	return max(z.point.Out+WindowSize, min(z.point.Out+WindowSize+z.patience(), z.wanted()))
}

// untilVisit returns how much output there is before visit has something to do
// inside a block.
func (z *Reader) untilVisit() Out {
	switch {
	case z.opts.Interval == 0:
		return math.MaxInt64
	case z.waiting:
		return z.latest() - z.out
	case z.out < z.from+z.patience() && z.out < z.wanted():
		return min(z.from+z.patience(), z.wanted()) - z.out
	}
	return Out(z.d.matchLen) // a candidate is overdue, only a match is in the way
}

// wanted returns where the next point of Options.At is taken: so early that
// the match that may be in the way there ends in time.
func (z *Reader) wanted() Out {
	if len(z.at) == 0 {
		return math.MaxInt64
	}
	return z.at[0] - maxMatch
}

// visit weighs the candidate that waits for its window, if all that can use the
// window has been decoded, and begins with the next one if it is due here. There
// is one candidate after the other, since the decoder marks one window at a time.
func (z *Reader) visit() error {
	if z.opts.Interval == 0 {
		return nil
	}
	d := &z.d
	atBlock := d.place == atHeader
	if z.waiting && z.out >= z.point.Out+WindowSize && (atBlock || z.out >= z.latest()) {
		if last := z.weigh(); last || z.out > z.next+z.opts.Interval/2 {
			if err := z.takeBest(); err != nil {
				return err
			}
		}
	}
	due := z.out >= z.from && (atBlock || z.out >= z.from+z.patience()) || z.out >= z.wanted()
	if z.waiting || d.matchLen > 0 || !due {
		return nil
	}
	bit := d.in.bitPos()
	z.point = Point{Out: z.out, In: In(bit >> 3), Bit: uint8(bit & 7), State: d.state()}
	z.waiting, z.asked = true, false
	z.from = z.out + apart
	for len(z.at) > 0 && z.wanted() < z.out+WindowSize {
		z.at, z.asked = z.at[1:], true // this point serves it
	}
	d.startMark()
	return nil
}

// weigh ends the wait of the candidate and keeps it if it is better than those
// before. It says whether there is no need to look at more.
func (z *Reader) weigh() (last bool) {
	window := z.d.finishMark()
	// About what the point takes in bytes: a word that is not zero has some
	// zeros left, and is compressed.
	words := wordsUsed(window)
	cost := 5*words + len(z.point.State)
	if z.asked || !z.found || cost < z.bestCost {
		z.point.Window = append(z.best.Window[:0], window...)
		z.best, z.bestCost, z.found = z.point, cost, true
	}
	z.point, z.waiting = Point{}, false
	return z.asked || words <= enough
}

// wordsUsed counts the words of b that are not zero, except in the last few bytes.
func wordsUsed(b []byte) (n int) {
	for ; len(b) >= 8; b = b[8:] {
		if binary.LittleEndian.Uint64(b) != 0 {
			n++
		}
	}
	return n
}

// takeBest reports the best of the candidates.
func (z *Reader) takeBest() error {
	z.found = false
	z.next = z.best.Out + z.opts.Interval*3/4
	z.from = z.next
	return z.opts.OnPoint(z.best)
}

// finishPoints reports what is left to report at the end of the stream.
func (z *Reader) finishPoints() error {
	if z.waiting {
		z.weigh()
	}
	if !z.found {
		return nil
	}
	return z.takeBest()
}

// startMark begins to record what matches copy from before op.
func (d *decoder) startMark() {
	d.mark, d.low = d.op, WindowSize
	clear(d.used[:])
}

// finishMark ends what startMark began and returns the window, from the first
// byte that was copied on and zero where nothing was. It is valid until the next
// startMark.
func (d *decoder) finishMark() []byte {
	d.mark = 0
	return d.used[d.low:WindowSize]
}

// reset makes the decoder start anew, with r at offset in.
func (d *decoder) reset(r io.Reader, in In) {
	d.in.reset(r, in)
	d.place, d.final, d.matchLen = atHeader, false, 0
	d.base, d.op, d.mark = 0, 0, 0
	d.needOp, d.needBit = 0, int64(in)<<3
}

// resume makes the decoder continue at p in out, with r at the byte p.In.
func (d *decoder) resume(r io.Reader, p Point, out *Buffer) error {
	d.reset(r, p.In)
	if p.In < 0 || p.In > maxOffset || p.Out < 0 || p.Out > maxOffset || p.Bit > 7 ||
		len(p.Window) > WindowSize || Out(len(p.Window)) > p.Out || len(p.State) > MaxState {
		return errPoint
	}
	if len(p.State) > 0 {
		// The state is a block header; it is read as one, from itself.
		d.reset(bytes.NewReader(p.State), 0)
		err := d.readBlockHeader()
		read := d.in.bitPos()
		d.in.reset(r, p.In)
		if err != nil || int(read+7)>>3 != len(p.State) {
			return errPoint
		}
	}
	if _, err := d.in.take(uint(p.Bit)); err != nil {
		return err
	}
	from := WindowSize - len(p.Window)
	clear(out[:from])
	copy(out[from:], p.Window)
	d.out = out
	d.op, d.needOp, d.needBit = WindowSize, WindowSize, int64(p.In)<<3
	d.base = max(0, WindowSize-int(min(p.Out, WindowSize)))
	return nil
}
