package layer

import (
	"context"
	"fmt"
	"io"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// Fetch returns the bytes [off, off+n) of a layer's compressed blob. The caller
// closes the reader.
type Fetch func(ctx context.Context, off, n inflate.In) (io.ReadCloser, error)

// Copy writes the bytes [off, off+n) of the uncompressed stream to w. It makes
// one fetch of the compressed bytes that the spans around them need, and writes
// nothing of a span that it has not verified: such an error wraps ErrMismatch.
func (x *Index) Copy(ctx context.Context, w io.Writer, off inflate.Out, n int64, fetch Fetch) error {
	if off < 0 || n < 0 || off > x.OutSize || inflate.Out(n) > x.OutSize-off {
		return fmt.Errorf("layer %s: %d bytes at %d are beyond its end at %d", x.DiffID, n, off, x.OutSize)
	}
	if n == 0 {
		return nil
	}
	first, last := x.SpanAt(off), x.SpanAt(off+inflate.Out(n)-1)
	start, _ := x.SpanRange(first)
	p, err := x.SeekPoint(start)
	if err != nil {
		return err
	}
	rc, err := fetch(ctx, p.In, x.Spans[last].InEnd-p.In)
	if err != nil {
		return err
	}
	defer rc.Close()
	stream, err := x.Decode(rc, p)
	if err != nil {
		return err
	}
	defer stream.Close()
	if _, err := io.CopyN(io.Discard, stream, int64(start-p.Out)); err != nil {
		return fmt.Errorf("layer %s: %w", x.DiffID, err)
	}
	buf := make([]byte, x.SpanSize)
	for i := first; i <= last; i++ {
		from, to := x.SpanRange(i)
		span := buf[:to-from]
		if _, err := io.ReadFull(stream, span); err != nil {
			return fmt.Errorf("layer %s: span %d: %w", x.DiffID, i, err)
		}
		if err := x.VerifySpan(i, span); err != nil {
			return err
		}
		if _, err := w.Write(span[max(off, from)-from : min(off+inflate.Out(n), to)-from]); err != nil {
			return err
		}
	}
	return nil
}
