package cache

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Layer is one layer's uncompressed stream, of which the spans that were read
// are on disk. It is safe for concurrent use.
type Layer struct {
	store *Store
	index *layer.Index // without entries
	data  *os.File

	mu      sync.Mutex // guards the fields below
	sources []string
	have    bitmap
	flights map[int]*flight // by span: the fetch that will bring it
	dirty   bool            // have is ahead of its file
	removed bool
}

// flight is a fetch under way. A span's flight ends when the span is there or
// the fetch has failed.
type flight struct {
	done chan struct{}
	err  error // valid after done
}

// Reading. A read waits at most readTimeout for its spans; a fetch that
// delivers something wrong is tried attempts times.
const (
	readTimeout = 60 * time.Second
	attempts    = 3
)

func newLayer(s *Store, x *layer.Index) *Layer {
	return &Layer{store: s, index: x, have: make(bitmap, (len(x.Spans)+63)/64), flights: map[int]*flight{}}
}

// Size returns the length of the uncompressed stream in bytes.
func (l *Layer) Size() int64 { return int64(l.index.OutSize) }

// ReadAt reads from the uncompressed stream, fetching what is not there. It
// returns io.EOF only together with the last bytes or beyond them.
func (l *Layer) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off >= l.Size() {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), l.Size()-off)]
	if len(p) > 0 {
		ctx, cancel := context.WithTimeoutCause(ctx, readTimeout, errReadTimeout)
		defer cancel()
		first, last := l.index.SpanAt(inflate.Out(off)), l.index.SpanAt(inflate.Out(off)+inflate.Out(len(p))-1)
		if err := l.ensure(ctx, first, last+1); err != nil {
			return 0, fmt.Errorf("layer %s [%d, %d): %w", l.index.DiffID, off, off+int64(len(p)), err)
		}
	}
	return l.data.ReadAt(p, off)
}

var errReadTimeout = fmt.Errorf("data did not arrive within %s: %w", readTimeout, errdefs.ErrUnavailable)

// ensure returns when the spans [first, end) are there.
func (l *Layer) ensure(ctx context.Context, first, end int) error {
	for span := first; span < end; {
		l.mu.Lock()
		if l.have.get(span) {
			l.mu.Unlock()
			span++
			continue
		}
		f := l.flights[span]
		if f == nil {
			f = l.startLocked(ctx, span, end)
		}
		l.mu.Unlock()
		select {
		case <-f.done:
			if f.err != nil {
				return f.err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// startLocked starts a fetch of the missing spans from span on, to end or the
// next seek point behind it, and returns span's flight. Spans before it that
// decoding passes through anyway are taken along.
func (l *Layer) startLocked(ctx context.Context, span, end int) *flight {
	last := span + 1
	for last < end && l.missing(last) {
		last++
	}
	// Decoding starts at seek points only: what lies between here and the next
	// one would have to be fetched again by whoever reads on.
	_, stop := l.index.SpanRange(last - 1)
	_, next := l.index.DecodeRange(stop - 1)
	for last < len(l.index.Spans) && inflate.Out(last)*l.index.SpanSize < next && l.missing(last) {
		last++
	}
	first := span
	start, _ := l.index.SpanRange(span)
	decoded, _ := l.index.DecodeRange(start)
	for first > 0 && inflate.Out(first-1)*l.index.SpanSize >= decoded && l.missing(first-1) {
		first--
	}
	flights := make([]*flight, last-first)
	for i := range flights {
		flights[i] = &flight{done: make(chan struct{})}
		l.flights[first+i] = flights[i]
	}
	// The fetch serves everyone who comes to wait for it: it outlives the
	// reader that started it.
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), readTimeout, errReadTimeout)
	go func() {
		defer cancel()
		l.run(ctx, first, last)
	}()
	return flights[span-first]
}

// missing says that a span is neither there nor on its way.
func (l *Layer) missing(span int) bool { return !l.have.get(span) && l.flights[span] == nil }

// run fetches the spans [first, end) and ends their flights.
func (l *Layer) run(ctx context.Context, first, end int) {
	var err error
	for range attempts {
		if first, err = l.fetch(ctx, first, end); err == nil {
			return
		}
		log.G(ctx).WithError(err).WithField("diffID", l.index.DiffID).WithField("span", first).Warn("fetching a span failed")
		var open openError
		if errors.As(err, &open) || ctx.Err() != nil {
			break // the fetcher has tried all it can
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for span := first; span < end; span++ {
		l.land(span, err)
	}
}

// land ends a span's flight. The caller holds l.mu.
func (l *Layer) land(span int, err error) {
	f := l.flights[span]
	delete(l.flights, span)
	f.err = err
	close(f.done)
}

// openError marks an error of Fetcher.Open.
type openError struct{ error }

func (e openError) Unwrap() error { return e.error }

// fetch reads, verifies and stores the spans [first, end). It returns the
// first span that it did not store.
func (l *Layer) fetch(ctx context.Context, first, end int) (int, error) {
	start, _ := l.index.SpanRange(first)
	p, err := l.index.SeekPoint(start)
	if err != nil {
		return first, err
	}
	in := l.index.Spans[end-1].InEnd - p.In
	l.mu.Lock()
	sources := slices.Clone(l.sources)
	l.mu.Unlock()
	rc, err := l.store.fetch.Open(ctx, sources, l.index.Digest, int64(p.In), int64(in))
	if err != nil {
		return first, openError{err}
	}
	defer rc.Close()
	stream, err := l.index.Decode(rc, p)
	if err != nil {
		return first, err
	}
	defer stream.Close()
	if _, err := io.CopyN(io.Discard, stream, int64(start-p.Out)); err != nil {
		blame(rc)
		return first, err
	}
	buf := make([]byte, l.index.SpanSize)
	for span := first; span < end; span++ {
		from, to := l.index.SpanRange(span)
		if _, err := io.ReadFull(stream, buf[:to-from]); err != nil {
			blame(rc)
			return span, err
		}
		if err := l.index.VerifySpan(span, buf[:to-from]); err != nil {
			blame(rc)
			return span, err
		}
		if err := l.put(span, buf[:to-from]); err != nil {
			return span, err
		}
	}
	return end, nil
}

// blame tells whoever opened r that what it delivered is wrong, so that the
// next try asks another source. Errors of r itself it knows to tell apart.
func blame(r io.Reader) {
	if b, ok := r.(interface{ Blame() }); ok {
		b.Blame()
	}
}

// put stores a verified span and ends its flight.
func (l *Layer) put(span int, b []byte) error {
	start, _ := l.index.SpanRange(span)
	if _, err := l.data.WriteAt(b, int64(start)); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.have.set(span)
	l.dirty = true
	l.land(span, nil)
	return nil
}

// Fetched returns how many bytes of the stream are on disk.
func (l *Layer) Fetched() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := int64(l.have.count()) * int64(l.index.SpanSize)
	return min(n, l.Size())
}

// sync makes what is there durable and records it.
func (l *Layer) sync() error {
	l.mu.Lock()
	if !l.dirty || l.removed {
		l.mu.Unlock()
		return nil
	}
	have := slices.Clone(l.have)
	l.dirty = false
	l.mu.Unlock()
	err := unix.Fdatasync(int(l.data.Fd()))
	if err == nil {
		err = writeFile(l.store.path(l.index.DiffID, "have"), have.encode())
	}
	if err != nil {
		l.mu.Lock()
		l.dirty = true
		l.mu.Unlock()
	}
	return err
}

// loadHave reads which spans are there. A file that does not fit is as good as
// none: everything is fetched again.
func (l *Layer) loadHave() {
	st, err := l.data.Stat()
	if err != nil || st.Size() != l.Size() {
		// Spans that are written later extend the file to its size.
		_ = l.data.Truncate(l.Size())
		return
	}
	raw, err := os.ReadFile(l.store.path(l.index.DiffID, "have"))
	if err != nil {
		return
	}
	if have, ok := decodeBitmap(raw, len(l.have)); ok {
		l.have = have
	}
}

func (l *Layer) remove() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.removed = true
	return l.data.Close()
}

// bitmap has one bit per span, the lowest first.
type bitmap []uint64

func (b bitmap) get(i int) bool { return b[i/64]>>(i%64)&1 == 1 }
func (b bitmap) set(i int)      { b[i/64] |= 1 << (i % 64) }

func (b bitmap) count() int {
	n := 0
	for _, w := range b {
		n += bits.OnesCount64(w)
	}
	return n
}

// encode returns the bitmap, little-endian, behind its SHA-256.
func (b bitmap) encode() []byte {
	raw := make([]byte, 0, 8*len(b))
	for _, w := range b {
		raw = binary.LittleEndian.AppendUint64(raw, w)
	}
	sum := sha256.Sum256(raw)
	return append(sum[:], raw...)
}

// decodeBitmap returns the encoded bitmap if it is whole and has words words.
func decodeBitmap(raw []byte, words int) (bitmap, bool) {
	if len(raw) != sha256.Size+8*words || sha256.Sum256(raw[sha256.Size:]) != [sha256.Size]byte(raw[:sha256.Size]) {
		return nil, false
	}
	b := make(bitmap, words)
	for i := range b {
		b[i] = binary.LittleEndian.Uint64(raw[sha256.Size+8*i:])
	}
	return b, true
}
