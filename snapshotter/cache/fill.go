package cache

import "context"

// Fill fetches missing spans that nobody fetches yet, from the front: about n
// compressed bytes in one request, more where the next seek point is farther.
// It returns when they are there, and whether there was anything to begin.
//
// While a reader waits for something else it stands still. pace is called with
// the number of compressed bytes whenever some have arrived, unless a reader
// waits for them, and its error ends the fill. ErrFull says that there is no
// room: a fill displaces nothing.
func (l *Layer) Fill(ctx context.Context, n int64, pace func(ctx context.Context, n int) error) (begun bool, err error) {
	l.mu.Lock()
	x, err := l.indexLocked()
	if err != nil {
		l.mu.Unlock()
		return false, err
	}
	span := 0
	for span < l.spans && !l.missingLocked(span, nil) {
		span++
	}
	if span == l.spans || l.distrusted {
		l.mu.Unlock()
		return false, nil
	}
	if !l.store.hasRoom() {
		l.mu.Unlock()
		return false, ErrFull
	}
	end := span + 1
	for end < l.spans && int64(x.Spans[end-1].InEnd-l.inBefore(x, span)) < n {
		end++
	}
	r := &run{pos: span, end: l.toSeekPointLocked(x, span, end, nil), pace: pace}
	life := l.beginLocked(r)
	l.store.work.Add(1)
	defer l.store.work.Done()
	l.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { r.cancel(context.Cause(ctx)) })
	defer stop()
	return true, l.bring(life, x, r)
}
