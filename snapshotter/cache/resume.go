package cache

import (
	"bytes"
	"context"
	"io"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// pause is where decoding was when a run had brought what lies before a span: the
// next one goes on there, and fetches nothing twice. What was output before it, which
// decoding refers to, is on disk.
type pause struct {
	point inflate.Point
	ahead []byte // what the span begins with: decoding was farther already
}

// pauses says whether decoding can go on where a run has ended: of what is not gzip, it
// starts where the index says, and the window must be in the span before.
func (l *Layer) pauses() bool {
	return l.head.Compression == layer.Gzip && l.head.SpanSize >= inflate.WindowSize
}

// pause notes where stream is, which has delivered all before span.
func (l *Layer) pause(span int, stream io.Reader) {
	p, can := stream.(layer.Pauser)
	if !can || !l.pauses() || span >= l.spans {
		return
	}
	at, ahead, ok := p.Pause()
	if !ok {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.have.get(span) || !l.have.get(span-1) {
		return
	}
	if l.paused == nil {
		l.paused = map[int]pause{}
	}
	l.paused[span] = pause{at, ahead}
}

// pausedLocked returns the last span up to span at which decoding can go on, if that
// is not before the one that the seek point at decoded is in. The caller holds l.mu.
func (l *Layer) pausedLocked(span int, decoded inflate.Out) (at int, ok bool) {
	for at = span; len(l.paused) > 0 && at > l.head.SpanAt(decoded); at-- {
		if _, ok := l.paused[at]; ok && l.have.get(at-1) && !l.unprovenLocked(at-1) {
			return at, true
		}
	}
	return 0, false
}

// decodeFromLocked returns where decoding starts for what a span has. The caller
// holds l.mu.
func (l *Layer) decodeFromLocked(x *layer.Index, span int) inflate.Out {
	start, _ := l.spanRange(span)
	decoded, _ := x.DecodeRange(start)
	if at, ok := l.pausedLocked(span, decoded); ok {
		decoded, _ = l.spanRange(at)
	}
	return decoded
}

// beginning is where decoding for a run begins.
type beginning struct {
	window <-chan windowed // what the window of point is still to come from; nil if it is there
	point  inflate.Point
	ahead  []byte      // what comes before that, behind a pause
	from   inflate.Out // where the two begin
	pause  int         // the span that was paused at; 0 if point is from the index
}

// begin returns where to decode from for what r is to bring. The error may be a
// noWindow.
func (l *Layer) begin(ctx context.Context, x *layer.Index, r *run) (b beginning, err error) {
	if b, ok := l.resume(x, r); ok {
		return b, nil
	}
	start, _ := l.spanRange(r.pos)
	group, grouped := x.GroupAt(start)
	if !grouped {
		b.point, err = x.SeekPoint(start)
	} else if frame := l.windowHere(x, group); frame != nil {
		b.point, err = pointIn(x, start, group, frame)
	} else if l.knowsPlace() {
		b.point = x.SeekPointWithout(start)
		b.window = l.comingWindow(ctx, x, start, group)
	} else {
		err = &noWindow{group, errNoPlace}
	}
	b.from = b.point.Out
	return b, err
}

// pointIn returns the seek point before start, whose window is in a group.
func pointIn(x *layer.Index, start inflate.Out, group int, frame []byte) (inflate.Point, error) {
	p, err := x.SeekPointIn(start, frame)
	if err != nil {
		return p, &noWindow{group, err}
	}
	return p, nil
}

// knowsPlace says whether windows can be asked for.
func (l *Layer) knowsPlace() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.located.Source != ""
}

// windowed is a seek point whose window has come.
type windowed struct {
	point inflate.Point
	err   error
}

// comingWindow fetches a group for the seek point before start, which comes through
// the channel.
func (l *Layer) comingWindow(ctx context.Context, x *layer.Index, start inflate.Out, group int) <-chan windowed {
	coming := make(chan windowed, 1)
	l.store.work.Go(func() {
		frame, err := l.window(ctx, x, group)
		if err != nil {
			coming <- windowed{err: &noWindow{group, err}}
			return
		}
		p, err := pointIn(x, start, group, frame)
		coming <- windowed{p, err}
	})
	return coming
}

// wait returns when the point has its window.
func (b *beginning) wait(ctx context.Context) error {
	if b.window == nil {
		return nil
	}
	select {
	case w := <-b.window:
		b.point = w.point
		return w.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// resume returns where to go on behind a pause, if there is one.
func (l *Layer) resume(x *layer.Index, r *run) (b beginning, ok bool) {
	l.punching.RLock()
	defer l.punching.RUnlock()
	start, _ := l.spanRange(r.pos)
	decoded, _ := x.DecodeRange(start)
	l.mu.Lock()
	b.pause, ok = l.pausedLocked(r.pos, decoded)
	at := l.paused[b.pause]
	l.mu.Unlock()
	if !ok || at.point.In >= x.Spans[r.end-1].InEnd {
		return beginning{}, false
	}
	b.point, b.ahead = at.point, at.ahead
	b.from, _ = l.spanRange(b.pause)
	window := make([]byte, inflate.WindowSize-len(at.ahead), inflate.WindowSize)
	if _, err := l.data.ReadAt(window, int64(b.from)-int64(len(window))); err != nil {
		return beginning{}, false // whoever reads it is told
	}
	b.point.Window = append(window, at.ahead...)
	return b, true
}

// stream returns decoded, which begins at b, from the byte start of the stream on.
func (b *beginning) stream(decoded io.Reader, start inflate.Out) (io.Reader, error) {
	if b.pause > 0 {
		decoded = io.MultiReader(bytes.NewReader(b.ahead), decoded)
	}
	_, err := io.CopyN(io.Discard, decoded, int64(start-b.from))
	return decoded, err
}

// forgetPause has decoded what failed behind a pause from a seek point.
func (l *Layer) forgetPause(span int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.paused, span)
}
