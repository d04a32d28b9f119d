package cache

import (
	"io"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// widener is what delivers a part of a blob, and may be sent all of it.
type widener interface{ Widen(off, end int64) bool }

// sendsWhole says whether rc, which was opened for a part of the blob, delivers
// all of it from now on: somebody sends that whatever he is asked for.
func sendsWhole(rc io.Reader, x *layer.Index) bool {
	w, ok := rc.(widener)
	return ok && w.Widen(0, int64(x.Size))
}

// ranged notes that r is sent the part of the blob that was asked for.
func (l *Layer) ranged(r *run) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r.whole, l.rangeless = false, false
}

// widen has r, which is sent the whole blob, bring all that is missing and that no
// other such run brings, so that the blob is sent once. It returns false if nothing
// is left that r was to bring.
func (l *Layer) widen(r *run) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rangeless = true
	pos, end := l.spans, 0
	wanted := false
	for span := range l.spans {
		if !l.have.get(span) && !l.sentLocked(span, r) {
			pos, end = min(pos, span), span+1
			wanted = wanted || r.pos <= span && span < r.end
		}
	}
	if !wanted {
		pos, end = l.spans, l.spans
		delete(l.runs, r) // nobody joins it
	}
	for span := range l.waits {
		if r.pos <= span && span < r.end && (span < pos || end <= span) {
			l.landLocked(span, nil, errAgain) // who waits is to wait for the other run
		}
	}
	if wanted {
		r.whole, r.pos, r.end = true, pos, end
	}
	return wanted
}

// fits says whether there is room for what r brings, if it is a fill.
func (l *Layer) fits(r *run) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return r.pace == nil || l.roomLocked(r)
}

// sentLocked says whether a run other than r that is sent the whole blob brings
// span. The caller holds l.mu.
func (l *Layer) sentLocked(span int, r *run) bool {
	for other := range l.runs {
		if other != r && other.whole && other.pos <= span && span < other.end {
			return true
		}
	}
	return false
}

// skipTo reads blob, which is the whole of it, up to where decoding what r brings
// can start.
func (l *Layer) skipTo(x *layer.Index, r *run, blob io.Reader) (at beginning, err error) {
	start, _ := l.spanRange(r.pos)
	if at.point, err = x.SeekPoint(start); err == nil { // no window is worth a request
		at.from = at.point.Out
		_, err = io.CopyN(io.Discard, blob, int64(at.point.In))
	}
	return at, err
}
