package layer

import (
	"bytes"
	"crypto/sha256"

	"github.com/klauspost/compress/zstd"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// groupPoints is how many seek points share a group of windows, together with the
// one among them that keeps its window to itself. Compressed together, windows take
// a little less; and what is inflated between two of them takes the encoder's tables
// out of the processor's cache.
const groupPoints = 16

// windows are those of the last seek points that have one. The zero value needs a
// reset.
type windows struct {
	single *zstd.Encoder // of a window alone
	group  *zstd.Encoder
	raw    []byte // one behind the other
	sizes  []int  // of each
	points []int  // whose they are
	frame  []byte // scratch
}

// reset forgets what an earlier Build has left.
func (w *windows) reset() (err error) {
	w.clear()
	if w.single == nil {
		w.single, err = windowEncoder(inflate.WindowSize)
	}
	if w.group == nil && err == nil {
		w.group, err = windowEncoder(groupPoints * inflate.WindowSize)
	}
	return err
}

func windowEncoder(size int) (*zstd.Encoder, error) {
	return zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
		zstd.WithWindowSize(size), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithLowerEncoderMem(true))
}

func (w *windows) clear() { w.raw, w.sizes, w.points = w.raw[:0], w.sizes[:0], w.points[:0] }

// add copies the window of x's last seek point.
func (w *windows) add(x *Index, window []byte) {
	if len(window) == 0 {
		return
	}
	w.raw = append(w.raw, window...)
	w.sizes = append(w.sizes, len(window))
	w.points = append(w.points, len(x.Points)-1)
	if len(w.points) == groupPoints {
		w.flushGroup(x)
	}
}

// flush gives x the windows that wait: too few for a group.
func (w *windows) flush(x *Index) {
	raw := w.raw
	for i, size := range w.sizes {
		w.keep(&x.Points[w.points[i]], raw[:size])
		raw = raw[size:]
	}
	w.clear()
}

// keep gives a point its window for itself.
func (w *windows) keep(p *Point, window []byte) {
	w.frame = w.single.EncodeAll(window, w.frame[:0])
	p.Window = bytes.Clone(w.frame) // which has no room to spare
}

// flushGroup gives x a group of windows. The one in which least is needed stays with
// its point: decoding can start there without the group.
func (w *windows) flushGroup(x *Index) {
	least, at := w.least()
	size := w.sizes[least]
	w.keep(&x.Points[w.points[least]], w.raw[at:at+size])
	w.raw = append(w.raw[:at], w.raw[at+size:]...)
	off := 0
	for i, size := range w.sizes {
		if i == least {
			continue
		}
		p := &x.Points[w.points[i]]
		p.Group, p.WindowOff, p.WindowSize = len(x.Groups)+1, off, size
		off += size
	}
	start := len(x.Windows)
	x.Windows = w.group.EncodeAll(w.raw, x.Windows)
	x.Groups = append(x.Groups, Group{Off: int64(start), Len: int64(len(x.Windows) - start), Digest: sha256.Sum256(x.Windows[start:])})
	w.clear()
}

// least returns which window has the fewest bytes that are needed, and where it
// begins in w.raw: the others are zero.
func (w *windows) least() (window, at int) {
	fewest, off := inflate.WindowSize+1, 0
	for i, size := range w.sizes {
		if needed := size - bytes.Count(w.raw[off:off+size], []byte{0}); needed < fewest {
			window, at, fewest = i, off, needed
		}
		off += size
	}
	return window, at
}
