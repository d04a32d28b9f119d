package inflate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

// Options configures NewReader.
type Options struct {
	// Interval is about the distance between seek points, in uncompressed
	// bytes; less than WindowSize counts as WindowSize. From 3/4 to 5/4 of it
	// behind the last one, the next point lies where little of the window is
	// needed: that is what seek points take most of. Zero asks for no points.
	Interval Out
	// At asks for more points, at or just before these uncompressed offsets,
	// which ascend. Where there is a point within about WindowSize before one
	// already, that one has to do.
	At []Out
	// OnPoint receives the seek points in stream order, the first at Out 0,
	// each when Read has come far enough behind it to know that no other place
	// there is better, or to the end of the stream. Their windows are valid until
	// it returns. An error from it ends the stream with that error.
	OnPoint func(Point) error
}

// Reader decompresses a gzip stream (RFC 1952) of one or many members.
//
// A Reader takes less than three quarters of a MiB, however the stream is made, and Reset
// and ResetAt use it again. Readers share nothing.
type Reader struct {
	opts Options
	out  Out // bytes returned so far
	err  error

	// Of the current member.
	crc   uint32
	size  uint32 // modulo 2^32
	check bool   // it was decoded from its start, so its trailer can be checked

	next     Out   // candidates for the next point begin at this output offset
	from     Out   // and the next one of them begins at this one
	at       []Out // what is left of Options.At
	point    Point // candidate that waits for its window
	waiting  bool
	asked    bool  // point is for Options.At
	best     Point // of the candidates so far; its window is memory that is used again
	bestCost int
	found    bool // there is a best

	own *Buffer // for Read; nil before the first
	d   decoder // last, for there are no pointers in most of it
}

// NewReader returns a reader of the gzip stream in r, positioned at offset 0
// of both streams. It reads the first member's header.
func NewReader(r io.Reader, opts Options) (*Reader, error) {
	z := new(Reader)
	if err := z.Reset(r, opts); err != nil {
		return nil, err
	}
	return z, nil
}

// Reset makes z what NewReader returns, in the same memory.
func (z *Reader) Reset(r io.Reader, opts Options) error {
	if opts.OnPoint == nil || opts.Interval <= 0 {
		opts.Interval = 0
	} else {
		opts.Interval = min(max(opts.Interval, WindowSize), maxOffset)
	}
	z.reset(r, 0, 0)
	z.opts, z.at = opts, opts.At
	if err := readHeader(&z.d.in); err != nil {
		z.err = z.fail(noEOF(err))
		return z.err
	}
	z.startMember()
	return nil
}

func (z *Reader) reset(r io.Reader, in In, out Out) {
	z.d.reset(r, in)
	z.opts = Options{}
	z.out, z.err, z.check = out, nil, false
	z.next, z.from, z.at, z.point, z.waiting, z.found = 0, 0, nil, Point{}, false, false
}

// Resume returns a reader that continues a gzip stream at p; r delivers the
// compressed bytes from offset p.In on. The trailer of the member that p lies
// in is skipped unchecked, since its first part was not seen. Bytes that
// p.Window lacks are taken for zero.
func Resume(r io.Reader, p Point) (*Reader, error) {
	z := new(Reader)
	if err := z.ResetAt(r, p); err != nil {
		return nil, err
	}
	return z, nil
}

// ResetAt makes z what Resume returns, in the same memory.
func (z *Reader) ResetAt(r io.Reader, p Point) error {
	z.reset(r, p.In, p.Out)
	if err := z.d.resume(r, p, z.ownBuffer()); err != nil {
		z.err = z.fail(err)
		return z.err
	}
	return nil
}

// In returns the least number of compressed bytes, counted from the start of
// the stream, that what Read has returned so far can be decoded from.
func (z *Reader) In() In { return z.d.need() }

// Out returns the number of uncompressed bytes returned so far, counted from
// the start of the stream.
func (z *Reader) Out() Out { return z.out }

// Pause ends z and returns where another reader can go on: at the point p, which is
// behind what was read if that ended inside a match, whose rest is ahead. p has no
// Window, since whoever read on has it: the WindowSize bytes before p, ahead
// included, or all there are. It says no between members and where nothing follows.
func (z *Reader) Pause() (p Point, ahead []byte, ok bool) {
	d := &z.d
	if z.err != nil || d.out == nil || d.place == atEnd {
		return Point{}, nil, false
	}
	z.err = errPaused
	d.moveTo(z.ownBuffer())
	start := d.op
	d.copyMatch(d.op + d.matchLen)
	ahead = bytes.Clone(d.out[start:d.op])
	bit := d.in.bitPos()
	return Point{Out: z.out + Out(len(ahead)), In: In(bit >> 3), Bit: uint8(bit & 7), State: d.state()}, ahead, true
}

var errPaused = errors.New("the reader was ended by Pause")

// Read fills p with uncompressed bytes. It returns io.EOF after the last
// member, a *FormatError when the stream is corrupt, and the source's error as
// it is when that fails.
func (z *Reader) Read(p []byte) (int, error) {
	n, own := 0, z.ownBuffer()
	for n < len(p) && z.err == nil {
		if z.d.out != own || ownLimit-z.d.op < min(len(p)-n, WindowSize) {
			z.d.moveTo(own)
		}
		n += copy(p[n:], z.decode(min(len(p)-n, ownLimit-z.d.op)))
	}
	if n > 0 {
		return n, nil
	}
	return 0, z.err
}

func (z *Reader) ownBuffer() *Buffer {
	if z.own == nil {
		z.own = new(Buffer)
	}
	return z.own
}

// Fill is Read for who passes on what it returns: the next n bytes, at most MaxFill,
// or less at the end of the stream, are decoded into b and not copied. They must not
// be changed before the next call, which takes its window from them.
func (z *Reader) Fill(b *Buffer, n int) ([]byte, error) {
	z.d.moveTo(b)
	for end := WindowSize + min(n, MaxFill); z.d.op < end && z.err == nil; {
		z.decode(end - z.d.op)
	}
	if z.d.op > WindowSize {
		return b[WindowSize:z.d.op], nil
	}
	return nil, z.err
}

// decode returns n more bytes of output, or less: up to the next place where
// something is to be done. It sets z.err.
func (z *Reader) decode(n int) []byte {
	d := &z.d
	if d.place == atEnd {
		z.err = z.nextMember()
		return nil
	}
	if z.err = z.visit(); z.err != nil {
		return nil
	}
	start := d.op
	err := d.run(start + int(min(Out(n), z.untilVisit())))
	p := d.out[start:d.op]
	z.out += Out(len(p))
	if z.check {
		z.crc = crc32.Update(z.crc, crc32.IEEETable, p)
		z.size += uint32(len(p))
	}
	if err != nil {
		z.err = z.fail(err)
	}
	return p
}

// startMember sets up the decoder for a member whose header has been read.
func (z *Reader) startMember() {
	z.d.begin()
	z.crc, z.size, z.check = 0, 0, true
}

// nextMember checks the trailer of the member that ended and starts the next
// one. It returns io.EOF at the end of the stream.
func (z *Reader) nextMember() error {
	in := &z.d.in
	in.align()
	var trailer [8]byte
	if _, err := io.ReadFull(in, trailer[:]); err != nil {
		return z.fail(noEOF(err))
	}
	sum, size := binary.LittleEndian.Uint32(trailer[:4]), binary.LittleEndian.Uint32(trailer[4:])
	if z.check && (sum != z.crc || size != z.size) {
		return z.fail(errChecksum)
	}
	if err := readHeader(in); err != nil {
		if errors.Is(err, io.EOF) {
			if err := z.finishPoints(); err != nil {
				return err
			}
			return io.EOF
		}
		return z.fail(err)
	}
	z.startMember()
	return nil
}

// fail returns err as Read reports it.
func (z *Reader) fail(err error) error {
	var s sourceError
	if errors.As(err, &s) {
		return s.error
	}
	return &FormatError{In: In(z.d.in.bitPos() >> 3), Out: z.out, What: err}
}
