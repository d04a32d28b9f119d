package layer

import (
	"context"
	"errors"
	"io"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

const (
	sourceChunk  = 256 << 10 // compressed bytes read at a time
	sourceChunks = 4
	outChunks    = 6 // chunks in flight between inflating and hashing
)

// Buffers is memory that one Build after the other uses. The zero value is
// ready.
type Buffers struct {
	source  chan *chunk // pool of chunks of compressed bytes
	out     chan *chunk // pool of chunks of the stream
	windows windows
	gzip    inflate.Reader
	dec     *zstd.Decoder // of the layer; nil before the first zstd layer
}

// prepare makes all chunks available. After a Build that failed some are lost.
func (m *Buffers) prepare() error {
	if m.dec != nil && m.dec.Reset(nil) != nil { // it lets go of the last layer
		m.dec = nil
	}
	m.source = fullPool(m.source, sourceChunks, func(c *chunk) { c.in = make([]byte, sourceChunk) })
	m.out = fullPool(m.out, outChunks, func(c *chunk) { c.out = new(inflate.Buffer) })
	return m.windows.reset()
}

// fullPool returns pool if all its chunks are there, or else another one.
func fullPool(pool chan *chunk, chunks int, alloc func(*chunk)) chan *chunk {
	if len(pool) == chunks {
		return pool
	}
	pool = make(chan *chunk, chunks)
	for range chunks {
		c := &chunk{pool: pool}
		alloc(c)
		pool <- c
	}
	return pool
}

// decoder returns the decoder of zstd layers.
func (m *Buffers) decoder() (*zstd.Decoder, error) {
	var err error
	if m.dec == nil {
		m.dec, err = newZstdDecoder(nil)
	}
	return m.dec, err
}

// A chunk is a buffer that travels down the pipeline and returns to its pool
// when its last reader has released it.
type chunk struct {
	data []byte          // the filled part of the buffer
	in   []byte          // the buffer, for compressed bytes
	out  *inflate.Buffer // the buffer, for others
	refs atomic.Int32
	pool chan *chunk
}

func (c *chunk) release() {
	if c.refs.Add(-1) == 0 {
		c.putBack()
	}
}

// putBack returns a chunk that was not sent.
func (c *chunk) putBack() { c.pool <- c } // never blocks: the pool has room for all its chunks

// take waits for a free chunk.
func take(ctx context.Context, pool chan *chunk) (*chunk, error) {
	select {
	case c := <-pool:
		return c, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// send hands c to every stage in to.
func send(ctx context.Context, c *chunk, to ...chan *chunk) error {
	c.refs.Store(int32(len(to)))
	for _, ch := range to {
		select {
		case ch <- c:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// chunkReader reads the chunks of one channel as a stream. It seeks forward,
// which lets archive/tar skip file contents without copying them.
type chunkReader struct {
	ctx  context.Context
	ch   <-chan *chunk
	each func(*chunk) error // is shown every chunk as it comes; may be nil
	cur  *chunk
	off  int   // into cur.data
	pos  int64 // in the stream

	keeping bool
	head    []byte // what was read since keep, at most maxHead bytes
}

// maxHead bounds the headers kept of one entry: archive/tar reads PAX records,
// long names and sparse maps of 1 MiB each.
const maxHead = 5 << 20

// keep starts to collect what is read.
func (r *chunkReader) keep() { r.keeping, r.head = true, r.head[:0] }

// kept ends that and returns it, until keep is called again.
func (r *chunkReader) kept() []byte {
	r.keeping = false
	return r.head
}

// next consumes up to n bytes of the current chunk.
func (r *chunkReader) next(n int) []byte {
	p := r.cur.data[r.off:]
	p = p[:min(n, len(p))]
	r.off += len(p)
	r.pos += int64(len(p))
	if r.keeping && len(r.head) < maxHead {
		r.head = append(r.head, p...)
	}
	return p
}

// fill makes sure that cur holds unread bytes, or returns io.EOF.
func (r *chunkReader) fill() error {
	for r.cur == nil || r.off == len(r.cur.data) {
		r.drop()
		select {
		case c, ok := <-r.ch:
			if !ok {
				return io.EOF
			}
			r.cur = c
			if r.each != nil {
				if err := r.each(c); err != nil {
					return err
				}
			}
		case <-r.ctx.Done():
			return context.Cause(r.ctx)
		}
	}
	return nil
}

func (r *chunkReader) drop() {
	if r.cur != nil {
		r.cur.release()
		r.cur, r.off = nil, 0
	}
}

func (r *chunkReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.fill(); err != nil {
		return 0, err
	}
	return copy(p, r.next(len(p))), nil
}

// block returns the next block of the tar stream without consuming it, or what
// there is of it in the current chunk; its length says which.
func (r *chunkReader) block() ([]byte, error) {
	if err := r.fill(); err != nil {
		return nil, err
	}
	p := r.cur.data[r.off:]
	return p[:min(len(p), blockSize)], nil
}

// Seek moves forward, relative to the current position. Beyond the end of the
// stream it stops there; the read that follows reports it.
func (r *chunkReader) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || offset < 0 {
		return 0, errors.New("only seeks forward")
	}
	for offset > 0 {
		if err := r.fill(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return 0, err
		}
		offset -= int64(len(r.next(int(min(offset, int64(len(r.cur.data)))))))
	}
	return r.pos, nil
}

// drain reads to the end of the stream.
func (r *chunkReader) drain() error {
	for {
		if err := r.fill(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		r.pos += int64(len(r.cur.data) - r.off)
		r.off = len(r.cur.data)
	}
}
