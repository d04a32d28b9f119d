package layer

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// A zstd layer is a sequence of frames (RFC 8878, section 3.1). Decoding can
// start at the start of a frame and nowhere else: what a frame's blocks refer
// to includes tables and offsets of earlier ones. Writers of ordinary images
// make a single frame, so such a layer is only ever decoded front to back.

// maxZstdWindow is the largest window that a frame may ask for. zstd's own
// levels up to 19 use 8 MiB; a decoder needs to hold the window in memory.
const maxZstdWindow = 32 << 20

// errZstd is wrapped, with inflate.ErrCorrupt, by errors of the framing.
var errZstd = errors.New("zstd frame is malformed")

// newZstdDecoder returns a decoder of the frames in r that works in the
// caller's goroutine and so reads no further than it has to.
func newZstdDecoder(r io.Reader) (*zstd.Decoder, error) {
	return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
}

// zstdStream decompresses a sequence of zstd frames one by one, so that it
// knows where they start.
type zstdStream struct {
	frames  frameReader
	dec     *zstd.Decoder // of the current frame
	out     inflate.Out
	onFrame func(out inflate.Out, in inflate.In)
}

// newZstdStream returns the uncompressed stream of blob, decoded with dec. It
// calls onFrame where a frame starts.
func newZstdStream(blob *bufio.Reader, dec *zstd.Decoder, onFrame func(inflate.Out, inflate.In)) *zstdStream {
	return &zstdStream{frames: frameReader{r: blob}, dec: dec, onFrame: onFrame}
}

// in returns how far into the compressed stream decoding has come.
func (z *zstdStream) in() inflate.In { return z.frames.in }

// Read decompresses. Its error says at which offset the stream is corrupt.
func (z *zstdStream) Read(p []byte) (int, error) {
	for {
		n, err := 0, io.EOF
		if z.frames.open {
			n, err = z.dec.Read(p)
			z.out += inflate.Out(n)
		}
		if n > 0 || len(p) == 0 {
			return n, nil
		}
		if errors.Is(err, io.EOF) {
			if err = z.nextFrame(); err == nil {
				continue
			}
		}
		return 0, z.fail(err)
	}
}

func (z *zstdStream) nextFrame() error {
	if err := z.frames.next(); err != nil {
		return err
	}
	z.onFrame(z.out, z.frames.in)
	return z.dec.Reset(&z.frames)
}

// fail says where err happened, and whose fault it is.
func (z *zstdStream) fail(err error) error {
	switch {
	case err == io.EOF: //nolint:errorlint // the end itself, not an error that wraps it
		return err
	case z.frames.err != nil:
		return z.frames.err // reading failed, so decoding did
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("zstd window of more than %d MiB: %w", maxZstdWindow>>20, ErrUnsupported)
	}
	return fmt.Errorf("zstd stream at compressed offset %d (uncompressed %d): %w: %w", z.frames.in, z.out, inflate.ErrCorrupt, err)
}

// frameReader reads one frame of a zstd stream after the other.
type frameReader struct {
	r        *bufio.Reader
	in       inflate.In // bytes read
	open     bool       // inside a frame, or at its end
	left     int64      // bytes left of the current piece: header, block or checksum
	last     bool       // the current piece is the frame's last block, or behind it
	checksum bool       // four bytes follow the last block
	err      error      // from r, unless it is the end
}

// next goes to the start of the next frame that holds data, or returns io.EOF.
func (f *frameReader) next() error {
	for {
		head, err := f.peek(zstd.HeaderMaxSize)
		if err != nil {
			return err
		}
		if len(head) == 0 {
			return io.EOF
		}
		var h zstd.Header
		if err := h.Decode(head); err != nil {
			if errors.Is(err, io.ErrUnexpectedEOF) {
				return io.ErrUnexpectedEOF
			}
			return errZstd
		}
		if !h.Skippable {
			f.open, f.left, f.last, f.checksum = true, int64(h.HeaderSize), false, h.HasCheckSum
			return nil
		}
		if err := f.skip(int64(h.HeaderSize) + int64(h.SkippableSize)); err != nil {
			return err
		}
	}
}

// peek returns the next n bytes, or fewer at the end of the stream.
func (f *frameReader) peek(n int) ([]byte, error) {
	b, err := f.r.Peek(n)
	if err != nil && !errors.Is(err, io.EOF) {
		f.err = err
		return nil, err
	}
	return b, nil
}

func (f *frameReader) skip(n int64) error {
	got, err := io.CopyN(io.Discard, f.r, n)
	f.in += inflate.In(got)
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	f.err = err
	return err
}

// Read reads from the current frame, and returns io.EOF at its end.
func (f *frameReader) Read(p []byte) (int, error) {
	if f.left == 0 {
		if err := f.piece(); err != nil {
			return 0, err
		}
	}
	n, err := f.r.Read(p[:min(int64(len(p)), f.left)])
	f.in += inflate.In(n)
	f.left -= int64(n)
	if errors.Is(err, io.EOF) {
		return n, io.ErrUnexpectedEOF
	}
	f.err = err
	return n, err
}

// piece finds out how long the next piece of the frame is (RFC 8878, section
// 3.1.1.2), or returns io.EOF behind the last.
func (f *frameReader) piece() error {
	if f.last {
		if !f.checksum {
			return io.EOF
		}
		f.checksum, f.left = false, 4
		return nil
	}
	const blockHeader = 3
	b, err := f.peek(blockHeader)
	if err != nil {
		return err
	}
	if len(b) < blockHeader {
		return io.ErrUnexpectedEOF
	}
	bits := uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16
	size := int64(bits >> 3)
	const rle = 1
	if bits>>1&3 == rle {
		size = 1
	}
	f.last, f.left = bits&1 == 1, blockHeader+size
	return nil
}
