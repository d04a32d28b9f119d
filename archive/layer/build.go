package layer

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// ErrUnsupported is wrapped when a layer is sound but cannot be read lazily.
// The error names the reason; an ordinary unpack of the layer works.
var ErrUnsupported = errors.New("layer cannot be read lazily")

// Defaults of Options.
const (
	DefaultSpanSize      inflate.Out = 256 << 10
	DefaultPointInterval inflate.Out = 640 << 10
	DefaultMaxEntries                = 8 << 20
)

// Options configures Build. The zero value means the defaults.
type Options struct {
	SpanSize      inflate.Out // uncompressed bytes per span, a multiple of 64; default 256 KiB
	PointInterval inflate.Out // about the distance of seek points, uncompressed bytes; default 640 KiB
	// PointsAt are uncompressed offsets, ascending, close before which there
	// shall be seek points as well. Only gzip can have them.
	PointsAt   []inflate.Out
	MaxEntries int // entries that a layer may have; default and most 8 Mi
	// Buffers, if set, is memory for one Build at a time, which the next one
	// uses again: an image has many small layers.
	Buffers *Buffers
	// Progress, if set, is called with the number of compressed bytes read
	// since the last call. Calls come from one goroutine.
	Progress func(n int64)
	// Out, if set, is given the uncompressed stream, front to back, in one
	// goroutine; its error ends Build. What it has is only worth something
	// when Build has returned without one.
	Out io.Writer
}

// Normalize returns o with its defaults filled in, or what is wrong with it.
func (o Options) Normalize() (Options, error) {
	if o.SpanSize == 0 {
		o.SpanSize = DefaultSpanSize
	}
	if o.PointInterval == 0 {
		o.PointInterval = DefaultPointInterval
	}
	if o.MaxEntries == 0 {
		o.MaxEntries = DefaultMaxEntries
	}
	if o.SpanSize%64 != 0 || o.SpanSize < minSpanSize || o.SpanSize > maxSpanSize {
		return o, fmt.Errorf("span size %d: must be a multiple of 64 between %d and %d", o.SpanSize, minSpanSize, maxSpanSize)
	}
	if o.MaxEntries > DefaultMaxEntries {
		return o, fmt.Errorf("%d entries: a reader accepts at most %d", o.MaxEntries, DefaultMaxEntries)
	}
	if !slices.IsSorted(o.PointsAt) {
		return o, errors.New("offsets of seek points do not ascend")
	}
	if o.PointInterval < o.SpanSize {
		return o, fmt.Errorf("seek point interval %d: must be at least the span size %d", o.PointInterval, o.SpanSize)
	}
	return o, nil
}

// builder is the state of one Build. Each stage writes its own fields of idx;
// they are read together after all stages have ended.
type builder struct {
	idx  *Index
	opts Options
	mem  *Buffers
	ends []inflate.In // span ends, from the inflate stage

	// Of the tar stage.
	spans  [][32]byte  // span digests
	chain  *chain      // of the uncompressed stream
	hashed inflate.Out // its length so far

	sources sources // of the tar stage, too
}

// Build reads the blob that desc describes and returns its index. Blob digest
// and size are checked against desc; the diff ID is computed and left to the
// caller to compare. The error wraps ErrUnsupported, inflate.ErrCorrupt,
// ErrMismatch or archive/tar's where these are the cause.
func Build(ctx context.Context, blob io.Reader, desc ocispec.Descriptor, opts Options) (*Index, error) {
	opts, err := opts.Normalize()
	if err != nil {
		return nil, err
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("layer %q: %w", desc.Digest, err)
	}
	mem := opts.Buffers
	if mem == nil {
		mem = new(Buffers)
	}
	if err := mem.prepare(); err != nil {
		return nil, err
	}
	b := &builder{opts: opts, mem: mem, idx: &Index{
		Digest: desc.Digest, Size: inflate.In(desc.Size), SpanSize: opts.SpanSize,
	}}
	if err := b.run(ctx, blob, desc); err != nil {
		return nil, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	for i := range b.ends {
		b.idx.Spans = append(b.idx.Spans, Span{InEnd: b.ends[i], Digest: b.spans[i]})
	}
	return b.idx, nil
}

func (b *builder) run(ctx context.Context, blob io.Reader, desc ocispec.Descriptor) error {
	var (
		g, gctx  = errgroup.WithContext(ctx)
		source   = make(chan *chunk, sourceChunks)
		toTar    = make(chan *chunk, outChunks)
		compress = &chunkReader{ctx: gctx, ch: source}
	)
	to := []chan *chunk{toTar}
	if b.opts.Out != nil {
		toOut := make(chan *chunk, outChunks)
		to = append(to, toOut)
		g.Go(func() error { return b.copyOut(&chunkReader{ctx: gctx, ch: toOut}) })
	}
	g.Go(func() error { return b.readBlob(gctx, blob, desc, source) })
	g.Go(func() error { return b.inflate(gctx, compress, to...) })
	b.chain = newChain()
	g.Go(func() error { return b.readTar(&chunkReader{ctx: gctx, ch: toTar, each: b.hash}) })
	if err := g.Wait(); err != nil {
		return err
	}
	b.endHash()
	return nil
}

// A stage closes its output only if it has ended well. Otherwise the next one
// could report the end of a stream before the failure that caused it is known.

// readBlob reads and digests the compressed bytes.
func (b *builder) readBlob(ctx context.Context, blob io.Reader, desc ocispec.Descriptor, to chan *chunk) error {
	verifier := desc.Digest.Verifier()
	var size int64
	for {
		c, err := take(ctx, b.mem.source)
		if err != nil {
			return err
		}
		n, err := io.ReadFull(blob, c.in)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("reading blob: %w", err)
		}
		if n > 0 {
			c.data = c.in[:n]
			verifier.Write(c.data)
			if size += int64(n); size > desc.Size {
				return fmt.Errorf("blob is longer than its %d bytes: %w", desc.Size, ErrMismatch)
			}
			if b.opts.Progress != nil {
				b.opts.Progress(int64(n))
			}
			if err := send(ctx, c, to); err != nil {
				return err
			}
		} else {
			c.putBack()
		}
		if err != nil {
			break
		}
	}
	if size != desc.Size {
		return fmt.Errorf("blob has %d bytes instead of %d: %w", size, desc.Size, ErrMismatch)
	}
	if !verifier.Verified() {
		return fmt.Errorf("blob: %w", ErrMismatch)
	}
	close(to)
	return nil
}

// inflate decompresses the blob span by span and records seek points.
func (b *builder) inflate(ctx context.Context, blob *chunkReader, to ...chan *chunk) error {
	fill, in, err := b.open(bufio.NewReaderSize(blob, 4<<10))
	if err != nil {
		return err
	}
	for {
		c, err := take(ctx, b.mem.out)
		if err != nil {
			return err
		}
		left := b.opts.SpanSize - b.idx.OutSize%b.opts.SpanSize // of the span
		c.data, err = fill(c.out, int(min(left, inflate.MaxFill)))
		if len(c.data) > 0 {
			n := inflate.Out(len(c.data))
			b.idx.OutSize += n
			if n == left {
				b.ends = append(b.ends, in())
			}
			if err := send(ctx, c, to...); err != nil {
				return err
			}
		} else {
			c.putBack()
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if b.idx.OutSize%b.opts.SpanSize > 0 {
		b.ends = append(b.ends, in())
	}
	b.mem.windows.flush(b.idx)
	if err := blob.drain(); err != nil {
		return err
	}
	for _, ch := range to {
		close(ch)
	}
	return nil
}

// Magic numbers at the start of a blob. Like containerd, the bytes decide, not
// the media type.
var (
	magicGzip = []byte{0x1f, 0x8b}
	magicZstd = []byte{0x28, 0xb5, 0x2f, 0xfd}
	// skippable zstd frames start with 0x184D2A50 to 0x184D2A5F, little-endian
	magicZstdSkippable = []byte{0x2a, 0x4d, 0x18}
)

// filler returns the next n bytes of a stream, in a buffer, or less and then io.EOF.
type filler func(to *inflate.Buffer, n int) ([]byte, error)

// fillFrom returns the filler of the stream r.
func fillFrom(r io.Reader) filler {
	return func(to *inflate.Buffer, n int) ([]byte, error) {
		n, err := io.ReadFull(r, to[:n])
		if errors.Is(err, io.ErrUnexpectedEOF) && n > 0 && !errors.Is(err, inflate.ErrCorrupt) {
			err = io.EOF
		}
		return to[:n], err
	}
}

// open returns the uncompressed stream of blob and a function that tells how
// far into the compressed one its reading has come.
func (b *builder) open(blob *bufio.Reader) (filler, func() inflate.In, error) {
	head, err := blob.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(head, magicGzip):
		b.idx.Compression = Gzip
		z := &b.mem.gzip
		if err := z.Reset(blob, inflate.Options{Interval: b.opts.PointInterval, At: b.opts.PointsAt, OnPoint: b.addPoint}); err != nil {
			return nil, nil, err
		}
		return z.Fill, z.In, nil
	case bytes.HasPrefix(head, magicZstd), len(head) == 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:], magicZstdSkippable):
		b.idx.Compression = Zstd
		dec, err := b.mem.decoder()
		if err != nil {
			return nil, nil, err
		}
		z := newZstdStream(blob, dec, b.addFrame)
		return fillFrom(z), z.in, nil
	}
	b.idx.Compression = Uncompressed
	return fillFrom(blob), func() inflate.In { return inflate.In(b.idx.OutSize) }, nil
}

// addFrame makes the start of a zstd frame a seek point, unless the last one is
// near: a writer may make a frame of every few bytes.
func (b *builder) addFrame(out inflate.Out, in inflate.In) {
	points := b.idx.Points
	if len(points) == 0 || out >= points[len(points)-1].Out+b.opts.PointInterval {
		b.idx.Points = append(points, Point{Out: out, In: in})
	}
}

// addPoint records a seek point; its window follows when some have come together.
func (b *builder) addPoint(p inflate.Point) error {
	b.idx.Points = append(b.idx.Points, Point{Out: p.Out, In: p.In, Bit: p.Bit, State: p.State})
	b.mem.windows.add(b.idx, p.Window)
	return nil
}

// copyOut gives the stream to Options.Out.
func (b *builder) copyOut(from *chunkReader) error {
	for {
		if err := from.fill(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if _, err := b.opts.Out.Write(from.next(len(from.cur.data))); err != nil {
			return fmt.Errorf("writing the uncompressed stream: %w", err)
		}
	}
}

// hash adds a chunk to the diff ID and records the chaining value behind each span.
// The reader of the tar stream does it: a stage of its own would have to be woken up
// for every chunk, which takes more time than to read the headers in it.
func (b *builder) hash(c *chunk) error {
	b.chain.write(c.data)
	b.hashed += inflate.Out(len(c.data))
	if b.hashed%b.opts.SpanSize > 0 {
		return nil
	}
	value, err := b.chain.value()
	b.spans = append(b.spans, value)
	return err
}

// endHash takes what is left of the last span, whose value is the sum.
func (b *builder) endHash() {
	sum := b.chain.sum()
	if b.hashed%b.opts.SpanSize > 0 {
		b.spans = append(b.spans, sum)
	} else if len(b.spans) > 0 {
		b.spans[len(b.spans)-1] = sum
	}
	b.idx.DiffID = digest.NewDigestFromBytes(digest.SHA256, sum[:])
}
