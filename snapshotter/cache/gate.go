package cache

import (
	"context"
	"sync"
	"time"
)

// gate lets fills pass only while no reader waits. The zero value is open.
type gate struct {
	mu      sync.Mutex    // guards the fields below and run.readers
	readers int           // that wait for anything
	others  int           // of them, those who wait for what was not expected of them
	left    time.Time     // when the last of these had what it waited for
	last    time.Time     // when the last reader of all had
	changed chan struct{} // closed and replaced when they become more or fewer
}

// quiet is how long no fill begins after a reader had to wait: a process that
// missed something misses something again soon, and what was asked for before
// comes before what it asks for.
const quiet = 50 * time.Millisecond

// longestHold is how long a fill stands still at a time: servers give up
// connections that nobody reads from.
const longestHold = 5 * time.Second

// A fill that nobody expects does not begin while a start goes on: what a server has
// sent of it is in the way of what is missed next, and on a slow link that is
// seconds. Where somebody misses something all the time it begins all the same.
const (
	startQuiet = 2 * time.Second
	startHold  = 30 * time.Second
)

// enter says that a reader waits for what r brings.
func (g *gate) enter(r *run) { g.count(r, 1) }

// leave says that it waits no more.
func (g *gate) leave(r *run) { g.count(r, -1) }

func (g *gate) count(r *run, n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.readers += n
	r.readers += n
	if n < 0 {
		g.last = time.Now()
	}
	if !r.expected {
		if g.others += n; n < 0 {
			g.left = time.Now()
		}
	}
	if g.changed != nil {
		close(g.changed)
		g.changed = nil
	}
}

// wanted says whether a reader waits for what r brings.
func (g *gate) wanted(r *run) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return r.readers > 0
}

// wait returns when nobody waits for anything that holds r back, or after a while.
func (g *gate) wait(ctx context.Context, r *run) error {
	return g.until(ctx, longestHold, func() (bool, time.Duration) { return r.readers > 0 || g.freeLocked(r.expected), 0 })
}

// begin is wait for a fill that has not begun.
func (g *gate) begin(ctx context.Context, expected bool) error {
	if expected {
		return g.until(ctx, longestHold, func() (bool, time.Duration) {
			rest := quiet - time.Since(g.left)
			return g.freeLocked(true) && rest <= 0, rest
		})
	}
	return g.until(ctx, startHold, func() (bool, time.Duration) {
		rest := startQuiet - time.Since(g.last)
		return g.freeLocked(false) && rest <= 0, rest
	})
}

// freeLocked says whether no reader holds fills back that are expected, or
// others. The caller holds g.mu.
func (g *gate) freeLocked(expected bool) bool {
	if expected {
		return g.others == 0
	}
	return g.readers == 0
}

// until waits until free, which is called with g.mu held, says yes, at most hold.
// It is asked when readers become more or fewer, and in the time that it returns if
// that is positive.
func (g *gate) until(ctx context.Context, hold time.Duration, free func() (bool, time.Duration)) error {
	timeout := time.NewTimer(hold)
	defer timeout.Stop()
	for {
		g.mu.Lock()
		ok, again := free()
		if ok {
			g.mu.Unlock()
			return ctx.Err()
		}
		if g.changed == nil {
			g.changed = make(chan struct{})
		}
		changed := g.changed
		g.mu.Unlock()
		var soon <-chan time.Time
		if again > 0 {
			soon = time.After(again)
		}
		select {
		case <-changed:
		case <-soon:
		case <-timeout.C:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
