package cache

import (
	"context"
	"slices"
	"time"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Spans is a range of a layer's spans: [First, End).
type Spans struct{ First, End int }

// All returns all spans of the layer.
func (l *Layer) All() []Spans { return []Spans{{0, l.spans}} }

// Cover returns the spans that the bytes [off, end) of the stream lie in.
func (l *Layer) Cover(off, end int64) Spans {
	size := int64(l.head.SpanSize)
	return Spans{First: int(off / size), End: int((end + size - 1) / size)}
}

// Expect says that readers are about to ask for these spans, so that one who
// does holds no fill back that is expected as well.
func (l *Layer) Expect(spans Spans) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, w := range l.clip([]Spans{spans}) {
		if l.expected == nil {
			l.expected = newBitmap(l.spans)
		}
		for span := w.First; span < w.End; span++ {
			l.expected.set(span)
		}
	}
}

// Fill is a fetch of what nobody waits for yet.
type Fill struct {
	// Want is what to fetch; spans that the layer does not have are ignored.
	Want []Spans
	// Bytes is about how many compressed bytes to fetch in one request: more
	// where the next seek point is farther.
	Bytes int64
	// Expected says that readers are about to ask for this: it goes on while
	// one waits for what is expected, too (see Expect).
	Expected bool
	// Pace is called with the number of compressed bytes whenever some have
	// arrived, unless a reader waits for them; its error ends the fill.
	Pace func(ctx context.Context, n int) error
}

// Filled is what a fill did.
type Filled struct {
	Bytes int64         // compressed, that it asked for; 0 if there was nothing to begin
	Took  time.Duration // since it asked
}

// Fill sends one request for those of the wanted spans that are missing and
// that nobody fetches yet, from the front. Gaps that cost less than a request
// are taken along, and all that is missing where only whole blobs are sent. It
// returns when the spans are there.
//
// While a reader waits for something else it stands still, and it begins only
// when none did for a moment; if it is not expected, for two seconds. ErrFull says
// that there is no room for what the request would bring: a fill displaces nothing,
// and asks for nothing in vain.
func (l *Layer) Fill(ctx context.Context, f Fill) (done Filled, err error) {
	want := l.clip(f.Want)
	if err := l.store.gate.begin(ctx, f.Expected); err != nil {
		return done, err
	}
	l.prepareIndex()
	l.mu.Lock()
	if l.nextWantedLocked(want, 0) == l.spans || l.distrusted {
		l.mu.Unlock()
		return done, nil
	}
	x, err := l.indexLocked()
	if err != nil {
		l.mu.Unlock()
		return done, err
	}
	near := int64(nearRun)
	if f.Expected {
		near = nearList
	}
	r := l.fillLocked(x, want, f.Bytes, near)
	r.pace, r.expected = f.Pace, f.Expected
	if l.rangeless {
		r.end = l.spans // it comes anyway
	}
	if !l.roomLocked(r) {
		l.mu.Unlock()
		return done, ErrFull
	}
	from := r.pos
	done.Bytes = max(int64(x.Spans[r.end-1].InEnd-l.inBefore(x, from)), 1)
	life := l.beginLocked(r)
	l.store.work.Add(1)
	defer l.store.work.Done()
	l.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { r.cancel(context.Cause(ctx)) })
	defer stop()
	began := time.Now()
	err = l.bring(life, x, r)
	done.Took = time.Since(began)
	switch {
	case r.whole:
		done.Bytes = int64(x.Spans[r.end-1].InEnd)
	case r.pos == from && err == nil:
		done.Bytes = 0 // another run brings it
	}
	return done, err
}

// roomLocked says whether there is room for what a fill is to bring. The caller
// holds l.mu.
func (l *Layer) roomLocked(r *run) bool {
	n := 0
	for span := r.pos; span < r.end; span++ {
		if !l.have.get(span) {
			n++
		}
	}
	size := int64(n) * l.SpanSize()
	free, err := freeOnDisk(l.store.dir)
	return l.store.hasRoom(size) && (err != nil || free >= size)
}

// clip returns the ranges in the layer's order, without what it does not have.
func (l *Layer) clip(want []Spans) []Spans {
	clipped := make([]Spans, 0, len(want))
	for _, w := range want {
		if w = (Spans{max(w.First, 0), min(w.End, l.spans)}); w.First < w.End {
			clipped = append(clipped, w)
		}
	}
	slices.SortFunc(clipped, func(a, b Spans) int { return a.First - b.First })
	return clipped
}

// nextWantedLocked returns the first wanted span from span on that is missing,
// or the number of spans. The caller holds l.mu.
func (l *Layer) nextWantedLocked(want []Spans, span int) int {
	for _, w := range want {
		for i := max(w.First, span); i < w.End; i++ {
			if l.missingLocked(i, nil) {
				return i
			}
		}
	}
	return l.spans
}

// fillLocked returns a run for the first of the wanted spans. The caller holds
// l.mu and has made sure that there is one.
func (l *Layer) fillLocked(x *layer.Index, want []Spans, n, near int64) *run {
	span := l.nextWantedLocked(want, 0)
	end := span + 1
	for {
		if int64(x.Spans[end-1].InEnd-l.inBefore(x, span)) >= n && l.resumes(x, end) {
			break
		}
		next := l.nextWantedLocked(want, end)
		if next == l.spans || !l.nearLocked(x, end, next, near) {
			break
		}
		end = next + 1
	}
	return &run{pos: l.fromSeekPointLocked(l.decodeFromLocked(x, span), span), end: end}
}

// nearLocked says whether a run that comes to the span at should go on to the
// span next: all in between is missing, and has at most so many compressed
// bytes. The caller holds l.mu.
func (l *Layer) nearLocked(x *layer.Index, at, next int, most int64) bool {
	for i := at; i < next; i++ {
		if !l.missingLocked(i, nil) {
			return false
		}
	}
	return int64(l.inBefore(x, l.head.SpanAt(l.decodeFromLocked(x, next)))-l.inBefore(x, at)) <= most
}
