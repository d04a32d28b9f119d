package layer

import (
	"bytes"

	"github.com/klauspost/compress/zstd"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// windowsAtOnce is how many windows are compressed one after the other: what is
// inflated between two of them takes the encoder's tables out of the processor's cache.
const windowsAtOnce = 16

// windows are those of the last seek points, each of which becomes a zstd frame. The
// zero value needs a reset.
type windows struct {
	enc   *zstd.Encoder
	raw   []byte // one behind the other
	sizes []int  // of each
	frame []byte // scratch
}

// reset forgets what an earlier Build has left.
func (w *windows) reset() (err error) {
	w.raw, w.sizes = w.raw[:0], w.sizes[:0]
	if w.enc == nil {
		w.enc, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
			zstd.WithWindowSize(inflate.WindowSize), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithLowerEncoderMem(true))
	}
	return err
}

// add copies the window of the next point, and returns how many wait to be compressed.
func (w *windows) add(window []byte) int {
	w.raw = append(w.raw, window...)
	w.sizes = append(w.sizes, len(window))
	return len(w.sizes)
}

// compress gives the last of points the windows that wait.
func (w *windows) compress(points []Point) {
	points = points[len(points)-len(w.sizes):]
	raw := w.raw
	for i, size := range w.sizes {
		if size > 0 {
			w.frame = w.enc.EncodeAll(raw[:size], w.frame[:0])
			points[i].Window = bytes.Clone(w.frame) // which has no room to spare
		}
		raw = raw[size:]
	}
	w.raw, w.sizes = w.raw[:0], w.sizes[:0]
}
