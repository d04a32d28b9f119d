package layer

import (
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// SpanRange returns the half-open range of the uncompressed stream that span i covers.
func (x *Index) SpanRange(i int) (start, end inflate.Out) {
	start = inflate.Out(i) * x.SpanSize
	return start, min(start+x.SpanSize, x.OutSize)
}

// SpanAt returns the number of the span that holds the byte at off, which must
// be in [0, OutSize).
func (x *Index) SpanAt(off inflate.Out) int { return int(off / x.SpanSize) }

// SeekPoint returns the last seek point at or before off whose window is at hand,
// with that expanded. Without Windows it may be one that is some MiB before the last.
// For an uncompressed layer it is off itself.
func (x *Index) SeekPoint(off inflate.Out) (inflate.Point, error) {
	if x.Compression == Uncompressed {
		return inflate.Point{Out: off, In: inflate.In(off)}, nil
	}
	i := x.pointAt(off)
	if group := x.Points[i].Group; group > 0 {
		if frame := x.frame(group - 1); frame != nil {
			return x.SeekPointIn(off, frame)
		}
	}
	p := &x.Points[x.near(i)]
	q := p.bare()
	if len(p.Window) == 0 {
		return q, nil
	}
	window, err := windowDecoder.DecodeAll(p.Window, nil)
	if err != nil {
		return q, fmt.Errorf("layer %s: window of the seek point at %d: %w", x.DiffID, p.Out, err)
	}
	if len(window) > inflate.WindowSize {
		return q, fmt.Errorf("layer %s: window of the seek point at %d has %d bytes", x.DiffID, p.Out, len(window))
	}
	q.Window = window
	return q, nil
}

// DecodeRange returns where decoding starts in order to read off, and where it
// could start next: the seek points around off. An uncompressed layer can be
// read anywhere.
func (x *Index) DecodeRange(off inflate.Out) (start, next inflate.Out) {
	if x.Compression == Uncompressed {
		return off, off
	}
	i := x.pointAt(off)
	if i+1 == len(x.Points) {
		return x.Points[i].Out, x.OutSize
	}
	return x.Points[i].Out, x.Points[i+1].Out
}

// pointAt returns the number of the last seek point at or before off.
func (x *Index) pointAt(off inflate.Out) int {
	lo, hi := 0, len(x.Points)
	for lo+1 < hi {
		if mid := (lo + hi) / 2; x.Points[mid].Out <= off {
			lo = mid
		} else {
			hi = mid
		}
	}
	return lo
}

// Decode returns the uncompressed stream from the seek point p on; r delivers
// the compressed bytes from p.In on. The caller closes the stream once, when it
// has read enough.
func (x *Index) Decode(r io.Reader, p inflate.Point) (io.ReadCloser, error) {
	switch x.Compression {
	case Gzip:
		z := inflaters.Get().(*inflate.Reader)
		if err := z.ResetAt(r, p); err != nil {
			inflaters.Put(z)
			return nil, err
		}
		return &inflating{z}, nil
	case Zstd:
		z, err := newZstdDecoder(r)
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(r), nil
}

// Pauser is a stream that Decode returned which another one can go on behind, see
// inflate.Reader.Pause. Only gzip has it.
type Pauser interface {
	Pause() (p inflate.Point, ahead []byte, ok bool)
}

// inflaters takes turns: one has more than half a MiB of tables and window.
var inflaters = sync.Pool{New: func() any { return new(inflate.Reader) }}

// inflating is a stream whose inflater is used again when it is closed.
type inflating struct{ *inflate.Reader }

func (s *inflating) Close() error {
	inflaters.Put(s.Reader)
	s.Reader = nil // whoever reads on must not read another's stream
	return nil
}

// windowDecoder is safe for concurrent DecodeAll. Its memory bound keeps a
// forged window from expanding beyond what a window can be.
var windowDecoder = func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(2*inflate.WindowSize), zstd.WithDecoderConcurrency(0))
	if err != nil {
		panic(err) // only if the options contradict each other
	}
	return d
}()
