package inflate

import (
	"bufio"
	"encoding/binary"
	"errors"
	"hash"
	"hash/crc32"
	"io"

	"github.com/klauspost/compress/flate"
)

// Options configures NewReader.
type Options struct {
	// Interval is the least distance between seek points, in uncompressed
	// bytes. Zero asks for no points.
	Interval Out
	// OnPoint receives the seek points in stream order, the first at Out 0.
	// It owns them. An error from it ends the stream with that error.
	OnPoint func(Point) error
}

// Reader decompresses a gzip stream (RFC 1952) of one or many members.
type Reader struct {
	src   *countingReader
	fl    io.ReadCloser
	opts  Options
	crc   hash.Hash32
	size  uint32 // of this member, modulo 2^32
	base  Out    // where this member's output starts
	out   Out    // bytes returned so far
	next  Out    // the next point is due at or after this output offset
	check bool   // the member was decoded from its start, so its trailer can be checked
	err   error
}

// NewReader returns a reader of the gzip stream in r, positioned at offset 0
// of both streams. It reads the first member's header.
func NewReader(r io.Reader, opts Options) (*Reader, error) {
	z := &Reader{src: newCountingReader(r, 0), opts: opts, crc: crc32.NewIEEE()}
	if err := readHeader(z.src); err != nil {
		return nil, z.corrupt(noEOF(err))
	}
	if err := z.startMember(); err != nil {
		return nil, err
	}
	return z, nil
}

// Resume returns a reader that continues a gzip stream at p; r delivers the
// compressed bytes from offset p.In on. The trailer of the member that p lies
// in is skipped unchecked, since its first part was not seen.
func Resume(r io.Reader, p Point) (*Reader, error) {
	if len(p.State) != 0 || p.Bit > 7 || len(p.Window) > WindowSize {
		return nil, &FormatError{In: p.In, Out: p.Out, What: errors.New("unusable seek point")}
	}
	z := &Reader{src: newCountingReader(r, p.In), crc: crc32.NewIEEE(), out: p.Out}
	z.fl = flate.NewReaderOpts(z.src, flate.WithResumeFrom(flate.InflateCheckpoint{
		BitOffset: p.Bit, Window: p.Window,
	}))
	return z, nil
}

// In returns a compressed offset from which on no byte was needed for what
// Read has returned so far. It may lie up to one window of output too far.
func (z *Reader) In() In { return z.src.off }

// Out returns the number of uncompressed bytes returned so far, counted from
// the start of the stream.
func (z *Reader) Out() Out { return z.out }

// Read fills p with uncompressed bytes. It returns io.EOF after the last
// member and a *FormatError when the stream is corrupt.
func (z *Reader) Read(p []byte) (int, error) {
	for z.err == nil {
		n, err := z.fl.Read(p)
		z.out += Out(n)
		if z.check {
			z.crc.Write(p[:n])
			z.size += uint32(n)
		}
		switch {
		case z.err != nil: // from OnPoint
		case errors.Is(err, io.EOF):
			z.err = z.nextMember()
		case err != nil:
			z.err = z.corrupt(err)
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, z.err
}

// startMember sets up the decoder for a member whose header has been read.
func (z *Reader) startMember() error {
	z.crc.Reset()
	z.size, z.base, z.check = 0, z.out, true
	if z.opts.Interval <= 0 || z.opts.OnPoint == nil {
		z.fl = flate.NewReader(z.src)
		return nil
	}
	start := z.src.off
	z.fl = flate.NewReaderOpts(z.src, flate.WithEobCallback(func(cp flate.InflateCheckpoint) {
		if cp.Final {
			return
		}
		z.point(Point{
			Out:    z.base + Out(cp.UncompressedOffset),
			In:     start + In(cp.CompressedOffset),
			Bit:    cp.BitOffset,
			Window: append([]byte(nil), cp.Window...),
		})
	}))
	z.point(Point{Out: z.out, In: start})
	return z.err
}

// point reports p if one is due.
func (z *Reader) point(p Point) {
	if z.err != nil || p.Out < z.next {
		return
	}
	z.next = p.Out + z.opts.Interval
	z.err = z.opts.OnPoint(p)
}

// nextMember checks the trailer of the member that ended and starts the next
// one. It returns io.EOF at the end of the stream.
func (z *Reader) nextMember() error {
	var trailer [8]byte
	if _, err := io.ReadFull(z.src, trailer[:]); err != nil {
		return z.corrupt(noEOF(err))
	}
	sum, size := binary.LittleEndian.Uint32(trailer[:4]), binary.LittleEndian.Uint32(trailer[4:])
	if z.check && (sum != z.crc.Sum32() || size != z.size) {
		return z.corrupt(errors.New("gzip: invalid checksum"))
	}
	if err := readHeader(z.src); err != nil {
		if errors.Is(err, io.EOF) {
			return io.EOF
		}
		return z.corrupt(err)
	}
	return z.startMember()
}

func (z *Reader) corrupt(err error) error {
	if z.src.err != nil {
		return z.src.err // the source failed: not the stream's fault
	}
	return &FormatError{In: z.src.off, Out: z.out, What: err}
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// countingReader counts the bytes taken from a buffered source, and keeps the
// source's own error apart from an early end.
type countingReader struct {
	r   *bufio.Reader
	off In
	err error
}

func newCountingReader(r io.Reader, off In) *countingReader {
	return &countingReader{r: bufio.NewReaderSize(r, 128<<10), off: off}
}

func (c *countingReader) note(err error) error {
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		c.err = err
	}
	return err
}

func (c *countingReader) ReadByte() (byte, error) {
	b, err := c.r.ReadByte()
	if err != nil {
		return 0, c.note(err)
	}
	c.off++
	return b, nil
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.off += In(n)
	return n, c.note(err)
}
