package cache

import (
	"context"
	"slices"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Spans is a range of a layer's spans: [First, End).
type Spans struct{ First, End int }

// All returns all spans of the layer.
func (l *Layer) All() []Spans { return []Spans{{0, l.spans}} }

// Fill fetches those of the wanted spans that are missing and that nobody
// fetches yet, from the front: about n compressed bytes in one request, more
// where the next seek point is farther. Gaps that cost less than a request are
// taken along. It returns when they are there, and whether there was anything
// to begin. Spans that the layer does not have are ignored.
//
// While a reader waits for something else it stands still. pace is called with
// the number of compressed bytes whenever some have arrived, unless a reader
// waits for them, and its error ends the fill. ErrFull says that there is no
// room: a fill displaces nothing.
func (l *Layer) Fill(ctx context.Context, want []Spans, n int64, pace func(ctx context.Context, n int) error) (begun bool, err error) {
	want = l.clip(want)
	l.mu.Lock()
	if l.nextWantedLocked(want, 0) == l.spans || l.distrusted {
		l.mu.Unlock()
		return false, nil
	}
	x, err := l.indexLocked()
	if err == nil && !l.store.hasRoom() {
		err = ErrFull
	}
	if err != nil {
		l.mu.Unlock()
		return false, err
	}
	r := l.fillLocked(x, want, n)
	r.pace = pace
	life := l.beginLocked(r)
	l.store.work.Add(1)
	defer l.store.work.Done()
	l.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { r.cancel(context.Cause(ctx)) })
	defer stop()
	return true, l.bring(life, x, r)
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
func (l *Layer) fillLocked(x *layer.Index, want []Spans, n int64) *run {
	span := l.nextWantedLocked(want, 0)
	end := span + 1
	for int64(x.Spans[end-1].InEnd-l.inBefore(x, span)) < n {
		next := l.nextWantedLocked(want, end)
		if next == l.spans || !l.nearLocked(x, end, next) {
			break
		}
		end = next + 1
	}
	if len(want) == 1 && want[0] == (Spans{0, l.spans}) {
		end = l.toSeekPointLocked(x, span, end, nil)
	}
	start, _ := l.spanRange(span)
	decoded, _ := x.DecodeRange(start)
	return &run{pos: l.fromSeekPointLocked(decoded, span), end: end}
}

// nearLocked says whether a run that comes to the span at should go on to the
// span next: all in between is missing, and costs less than another request.
// The caller holds l.mu.
func (l *Layer) nearLocked(x *layer.Index, at, next int) bool {
	for i := at; i < next; i++ {
		if !l.missingLocked(i, nil) {
			return false
		}
	}
	start, _ := l.spanRange(next)
	decoded, _ := x.DecodeRange(start)
	return l.inBefore(x, l.head.SpanAt(min(decoded, start)))-l.inBefore(x, at) <= nearRun
}
