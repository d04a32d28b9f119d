package inflate

import (
	"bytes"
	"io"
	"math"
)

// maxOffset bounds the offsets of a seek point and the distance between two, so
// that sums and bit positions do not overflow. No stream is that long.
const maxOffset = 1 << 56

// untilVisit returns how much output there is before visit has something to do
// inside a block.
func (z *Reader) untilVisit() Out {
	switch {
	case z.opts.Interval == 0:
		return math.MaxInt64
	case z.waiting:
		return z.point.Out + WindowSize - z.out
	case z.out < z.latest() && z.out < z.wanted():
		return min(z.latest(), z.wanted()) - z.out
	}
	return Out(z.d.matchLen) // the point is overdue, only a match is in the way
}

// latest returns where the next point is taken inside a block if no block
// starts before.
func (z *Reader) latest() Out { return z.next + z.opts.Interval/8 }

// wanted returns where the next point of Options.At is taken: so early that
// the match that may be in the way there ends in time.
func (z *Reader) wanted() Out {
	if len(z.at) == 0 {
		return math.MaxInt64
	}
	return z.at[0] - maxMatch
}

// visit completes the point that waits for its window, if all that can use the
// window has been decoded, and takes the next point if it is due here.
func (z *Reader) visit() error {
	if z.opts.Interval == 0 {
		return nil
	}
	if z.waiting {
		if z.out < z.point.Out+WindowSize {
			return nil
		}
		if err := z.finishPoint(); err != nil {
			return err
		}
	}
	d := &z.d
	due := z.out >= z.next && (d.place == atHeader || z.out >= z.latest()) || z.out >= z.wanted()
	if !due || d.matchLen > 0 {
		return nil
	}
	bit := d.in.bitPos()
	z.point = Point{Out: z.out, In: In(bit >> 3), Bit: uint8(bit & 7), State: d.state()}
	z.waiting = true
	z.next = z.out + z.opts.Interval
	for len(z.at) > 0 && z.wanted() < z.out+WindowSize {
		z.at = z.at[1:] // this point serves it
	}
	d.startMark()
	return nil
}

// finishPoint reports the waiting point, if there is one.
func (z *Reader) finishPoint() error {
	if !z.waiting {
		return nil
	}
	p := z.point
	p.Window = z.d.finishMark()
	z.point, z.waiting = Point{}, false
	return z.opts.OnPoint(p)
}

// startMark begins to record what matches copy from before op.
func (d *decoder) startMark() {
	d.mark, d.low = d.op, WindowSize
	clear(d.used[:])
}

// finishMark ends what startMark began and returns the window, from the first
// byte that was copied on and zero where nothing was.
func (d *decoder) finishMark() []byte {
	d.mark = 0
	return bytes.Clone(d.used[d.low:])
}

// reset makes the decoder start anew, with r at offset in.
func (d *decoder) reset(r io.Reader, in In) {
	d.in.reset(r, in)
	d.place, d.final, d.matchLen = atHeader, false, 0
	d.base, d.op, d.mark = 0, 0, 0
	d.needOp, d.needBit = 0, int64(in)<<3
}

// resume makes the decoder continue at p, with r at the byte p.In.
func (d *decoder) resume(r io.Reader, p Point) error {
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
	clear(d.out[:from])
	copy(d.out[from:], p.Window)
	d.op, d.needOp, d.needBit = WindowSize, WindowSize, int64(p.In)<<3
	d.base = max(0, WindowSize-int(min(p.Out, WindowSize)))
	return nil
}
