package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// run is one fetch under way: it brings the spans [pos, end) in this order.
type run struct {
	end    int
	began  time.Time
	cancel context.CancelCauseFunc
	pace   func(ctx context.Context, n int) error // nil unless it is a fill

	expected bool // see Fill and Expect
	whole    bool // guarded by Layer.mu: the whole blob is sent for it
	asked    int  // the span before which everything is what a reader asked for

	bytes int64 // compressed, that the last request was for

	pos     int // guarded by Layer.mu, as end is: the next span
	readers int // guarded by gate.mu: how many wait for it
}

// Fetching: a run that delivers something wrong begins again where it was,
// attempts times without getting further, and it ends when nothing arrives for
// idleTimeout.
const (
	attempts    = 3
	idleTimeout = 60 * time.Second
)

var errIdle = fmt.Errorf("nothing arrived for %s: %w", idleTimeout, errdefs.ErrUnavailable)

// nearRun is how many compressed bytes a run may be farther from a span than a
// run of its own would be: about what arrives in the time that a request takes.
const nearRun = 256 << 10

// nearList is nearRun for what is about to be asked for: there are several
// requests for it at the same time, so that one takes little more than its bytes.
const nearList = 32 << 10

// smallBlob is the size of blobs that are fetched whole, in bytes: all of it
// costs little more than a request.
const smallBlob = 256 << 10

// runForLocked returns the run that brings span soonest, starting one if need
// be: to end or the next seek point behind it, farther if that is little, and
// farther still if a reader has gone forward for long. The caller holds l.mu.
func (l *Layer) runForLocked(span, end int) (*run, error) {
	x, err := l.indexLocked()
	if err != nil {
		return nil, err
	}
	decoded := l.decodeFromLocked(x, span)
	own := x.Spans[span].InEnd - l.inBefore(x, l.head.SpanAt(decoded))
	var best *run
	for r := range l.runs {
		if r.pos <= span && span < r.end && (best == nil || r.pos > best.pos) {
			best = r
		}
	}
	if best != nil && (best.whole || x.Spans[span].InEnd-l.inBefore(x, best.pos) <= own+nearRun) {
		return best, nil
	}
	r := &run{pos: span, end: l.toSeekPointLocked(x, span, end, best), asked: end}
	r.expected = l.expected != nil && l.expected.get(span)
	if !r.expected {
		r.end = l.goOnLocked(x, l.head.SpanAt(decoded), r.end, best)
	}
	if ahead := l.streams.ahead(span, r.end); ahead > 0 {
		r.end = l.toSeekPointLocked(x, span, r.end+ahead, best)
	}
	l.streams.went(span, r.end)
	if l.head.Size <= smallBlob && len(l.runs) == 0 && l.have.count() == 0 {
		r.pos, r.end = 0, l.spans
	}
	r.pos = l.fromSeekPointLocked(decoded, r.pos)
	ctx := l.beginLocked(r)
	l.store.work.Go(func() { _ = l.bring(ctx, x, r) }) // the waits get the error
	return r, nil
}

// fromSeekPointLocked returns where a run that decodes from decoded on in order
// to bring span should begin: spans that it passes through are taken along. The
// caller holds l.mu.
func (l *Layer) fromSeekPointLocked(decoded inflate.Out, span int) int {
	for span > 0 && inflate.Out(span-1)*l.head.SpanSize >= decoded && l.missingLocked(span-1, nil) {
		span--
	}
	return span
}

// inBefore returns about where decoding stands in the blob before span.
func (l *Layer) inBefore(x *layer.Index, span int) inflate.In {
	if span == 0 {
		return 0
	}
	return x.Spans[span-1].InEnd
}

// toSeekPointLocked returns where a run from span should end that brings all
// below end. Where decoding starts at seek points only, what lies between its end
// and the next one would have to be fetched again by whoever reads on. A run
// ends before the first span that is not missing. The caller holds l.mu.
func (l *Layer) toSeekPointLocked(x *layer.Index, span, end int, far *run) int {
	last := span + 1
	for last < min(end, l.spans) && l.missingLocked(last, far) {
		last++
	}
	if l.pauses() {
		return last
	}
	_, stop := l.spanRange(last - 1)
	_, next := x.DecodeRange(stop - 1)
	for last < l.spans && inflate.Out(last)*l.head.SpanSize < next && l.missingLocked(last, far) {
		last++
	}
	return last
}

// missingLocked says whether a span is neither there nor to be brought by a run
// other than far. The caller holds l.mu.
func (l *Layer) missingLocked(span int, far *run) bool {
	return !l.have.get(span) && !l.comingLocked(span, far)
}

// comingLocked says whether a run other than far brings span. The caller holds l.mu.
func (l *Layer) comingLocked(span int, far *run) bool {
	for r := range l.runs {
		if r != far && r.pos <= span && span < r.end {
			return true
		}
	}
	return false
}

// beginLocked registers r. The caller holds l.mu and calls bring next, which
// serves all who come to wait: it outlives the reader that wanted it first.
func (l *Layer) beginLocked(r *run) context.Context {
	ctx, cancel := context.WithCancelCause(l.store.life)
	r.cancel, r.began = cancel, time.Now()
	l.runs[r] = struct{}{}
	return ctx
}

// bring fetches what r is to bring and ends the waits for it.
func (l *Layer) bring(ctx context.Context, x *layer.Index, r *run) (err error) {
	defer func() { l.endRun(r, err) }()
	idle := &idleTimer{timer: time.AfterFunc(idleTimeout, func() { r.cancel(errIdle) })}
	defer idle.stop()
	for failures := 0; ; {
		from, reason, began := r.pos, r.reason(), time.Now()
		err := l.fetch(ctx, x, r, idle)
		if gone := (*noWindow)(nil); errors.As(err, &gone) && ctx.Err() == nil {
			x = l.withoutGroup(x, r, gone.group)
			continue
		}
		l.note(r, from, Fetch{Reason: reason, Began: began, Took: time.Since(began), Err: err})
		l.store.metrics.requests.WithLabelValues(reason, outcome(err)).Inc()
		if err == nil || errors.Is(err, ErrFull) {
			l.succeeded(began)
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		log.G(ctx).WithError(err).WithField("diffID", l.head.DiffID).WithField("span", r.pos).Warn("fetching a span failed")
		l.failed(err)
		if r.pos > from {
			failures = 0
		}
		var open openError
		if failures++; failures == attempts || errors.As(err, &open) {
			return err // the fetcher has tried all it can
		}
	}
}

// endRun ends the waits for what r did not bring.
func (l *Layer) endRun(r *run, err error) {
	r.cancel(nil)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.runs, r)
	if r.pace != nil {
		err = errAgain // that a fill failed is no reader's business
	}
	for span, w := range l.waits {
		if r.pos <= span && span < r.end && !l.comingLocked(span, nil) {
			w.began = r.began
			l.landLocked(span, nil, err)
		}
	}
}

// landLocked ends the wait for a span, if there is one. The caller holds l.mu.
func (l *Layer) landLocked(span int, b []byte, err error) {
	w := l.waits[span]
	if w == nil {
		return
	}
	delete(l.waits, span)
	w.err, w.bytes = err, b
	close(w.done)
}

// openError marks an error of Fetcher.Open.
type openError struct{ error }

func (e openError) Unwrap() error { return e.error }

// fetch sends one request for what r has still to bring, and verifies and
// stores what comes.
func (l *Layer) fetch(ctx context.Context, x *layer.Index, r *run, idle *idleTimer) error {
	at, err := l.begin(ctx, x, r)
	if err != nil {
		return err
	}
	l.mu.Lock()
	sources := slices.Clone(l.sources)
	l.mu.Unlock()
	r.bytes = int64(x.Spans[r.end-1].InEnd - at.point.In)
	rc, err := l.store.fetch.Open(ctx, sources, x.Digest, int64(at.point.In), r.bytes)
	if err != nil {
		return openError{err}
	}
	defer rc.Close()
	defer l.servedBy(rc)
	blob := &body{ctx: ctx, r: rc, run: r, store: l.store, idle: idle}
	if !sendsWhole(rc, x) {
		l.ranged(r)
	} else if !l.widen(r) {
		return nil // another run brings it
	} else if !l.fits(r) {
		return ErrFull
	} else if at, err = l.skipTo(x, r, blob); err != nil {
		return err
	} else {
		r.bytes = int64(x.Spans[r.end-1].InEnd)
	}
	if err := at.wait(ctx); err != nil {
		return err
	}
	blob.resumed = at.pause > 0
	from := r.pos
	err = l.decode(x, r, blob, at)
	if err != nil && at.pause > 0 && r.pos == from {
		l.forgetPause(at.pause)
	}
	return err
}

// decode verifies and stores what comes of r in blob, which is decoded from at on.
func (l *Layer) decode(x *layer.Index, r *run, blob *body, at beginning) error {
	decoded, err := x.Decode(blob, at.point)
	if err != nil {
		blob.blame(wrongStream)
		return err
	}
	defer decoded.Close()
	start, _ := l.spanRange(r.pos)
	stream, err := at.stream(decoded, start)
	if err != nil {
		blob.blame(wrongStream)
		return err
	}
	if err := l.take(x, r, stream, blob); err != nil {
		return err
	}
	l.pause(r.pos, decoded)
	return nil
}

// note remembers a request of r that began at the span from.
func (l *Layer) note(r *run, from int, f Fetch) {
	if r.whole {
		from = 0
	}
	start, _ := l.spanRange(from)
	f.DiffID, f.Off, f.Bytes = l.head.DiffID, int64(start), r.bytes
	if r.pos > from {
		_, end := l.spanRange(r.pos - 1)
		f.Len = int64(end - start)
	}
	l.mu.Lock()
	f.Host = l.host
	l.mu.Unlock()
	l.store.fetches.add(f)
	f.trace(l.store.life)
}

// outcome is what a metric calls the end of a request.
func outcome(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, context.Canceled), errors.Is(err, errEnded), errors.Is(err, ErrFull):
		return "ended" // nobody wants it any more
	}
	return "failed"
}

// take verifies and stores the spans of r as stream delivers them, which
// decodes blob.
func (l *Layer) take(x *layer.Index, r *run, stream io.Reader, blob *body) error {
	pooled := spanBuffers.Get().(*[]byte)
	defer spanBuffers.Put(pooled)
	*pooled = slices.Grow((*pooled)[:0], int(x.SpanSize))
	for r.pos < r.end {
		from, to := l.spanRange(r.pos)
		buf := (*pooled)[:to-from]
		if _, err := io.ReadFull(stream, buf); err != nil {
			blob.blame(wrongStream)
			return err
		}
		l.mu.Lock()
		here := l.have.get(r.pos)
		l.mu.Unlock()
		if !here {
			if err := x.VerifySpan(r.pos, buf); err != nil {
				blob.blame(wrongSpan)
				return err
			}
			l.store.metrics.spans.WithLabelValues(r.reason()).Inc()
		}
		if err := l.put(r, buf, here); err != nil {
			return err
		}
	}
	return nil
}

var spanBuffers = sync.Pool{New: func() any { return new([]byte) }}

// blame tells whoever opened b that what it delivered is wrong, so that the
// next try asks another source. Errors of its own it knows to tell apart.
func (b *body) blame(what string) {
	if b.resumed {
		return
	}
	if b.failed == nil || what != wrongStream {
		b.store.metrics.wrong.WithLabelValues(what).Inc()
	}
	if r, ok := b.r.(interface{ Blame() }); ok {
		r.Blame()
	}
}

// body is the answer to a run's request. It knows when nothing arrives any
// more, and holds a fill back while readers wait for something else.
type body struct {
	ctx    context.Context
	r      io.Reader
	run    *run
	store  *Store
	idle   *idleTimer
	failed error // of r, or of what holds it back

	resumed bool // that what it delivers is wrong may be for want of the right window
}

// bodyChunk is how much of a fill is read before it is looked again whether
// somebody waits, in bytes.
const bodyChunk = 64 << 10

func (b *body) Read(p []byte) (int, error) {
	n, err := b.read(p)
	for n == 0 && err == nil && len(p) > 0 { // what comes before is still arriving
		n, err = b.read(p)
	}
	if n > 0 {
		b.store.metrics.bytes.WithLabelValues(b.run.reason(), hostOf(b.r)).Add(float64(n))
	}
	if err != nil && err != io.EOF {
		b.failed = err
	}
	return n, err
}

func (b *body) read(p []byte) (int, error) {
	if b.run.pace == nil {
		n, err := b.r.Read(p)
		b.idle.reset()
		return n, err
	}
	p = p[:min(len(p), bodyChunk)]
	b.idle.stop()
	if err := b.store.gate.wait(b.ctx, b.run); err != nil {
		return 0, err
	}
	b.idle.reset()
	n, err := b.r.Read(p)
	if n > 0 && !b.store.gate.wanted(b.run) {
		b.idle.stop()
		if err := b.run.pace(b.ctx, n); err != nil {
			return 0, err
		}
	}
	b.idle.reset()
	return n, err
}

// idleTimer ends a run in which nothing happens.
type idleTimer struct{ timer *time.Timer }

func (t *idleTimer) reset() { t.timer.Reset(idleTimeout) }
func (t *idleTimer) stop()  { t.timer.Stop() }

// streams are the readers that go forward through a layer.
type streams struct {
	known [8]stream
	turn  int // the one to forget next
}

// stream is a reader that goes forward.
type stream struct{ next, spans int }

// Read-ahead. A reader that comes back to where the last run for it ended, or
// skips a little, gets an aheadShare-th of what it has read so far beyond what
// it asks for, at most aheadMost spans: reading everything takes few requests,
// and reading little fetches little that is not wanted.
const (
	aheadShare = 8
	aheadLeast = 4  // spans; less is not worth it, since runs end at seek points
	aheadMost  = 64 // spans
	aheadSkip  = 4  // spans
)

// ahead returns how many spans behind end a run from span should bring.
func (s *streams) ahead(span, end int) int {
	i := s.find(span)
	if i < 0 {
		return 0
	}
	n := (s.known[i].spans + end - span) / aheadShare
	if n < aheadLeast {
		return 0
	}
	return min(n, aheadMost)
}

// went notes that a reader is brought the spans [span, end).
func (s *streams) went(span, end int) {
	if i := s.find(span); i >= 0 {
		s.known[i] = stream{next: end, spans: s.known[i].spans + end - span}
		return
	}
	s.known[s.turn] = stream{next: end, spans: end - span}
	s.turn = (s.turn + 1) % len(s.known)
}

func (s *streams) find(span int) int {
	return slices.IndexFunc(s.known[:], func(k stream) bool {
		return k.spans > 0 && k.next <= span && span <= k.next+aheadSkip
	})
}
