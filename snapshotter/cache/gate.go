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
	changed chan struct{} // closed and replaced when they become more or fewer
}

// longestHold is how long a fill stands still at a time: servers give up
// connections that nobody reads from.
const longestHold = 5 * time.Second

// enter says that a reader waits for what r brings.
func (g *gate) enter(r *run) { g.count(r, 1) }

// leave says that it waits no more.
func (g *gate) leave(r *run) { g.count(r, -1) }

func (g *gate) count(r *run, n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.readers += n
	r.readers += n
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

// wait returns when nobody waits for anything but r, or after a while.
func (g *gate) wait(ctx context.Context, r *run) error {
	timeout := time.NewTimer(longestHold)
	defer timeout.Stop()
	for {
		g.mu.Lock()
		if g.readers == 0 || r.readers > 0 {
			g.mu.Unlock()
			return ctx.Err()
		}
		if g.changed == nil {
			g.changed = make(chan struct{})
		}
		changed := g.changed
		g.mu.Unlock()
		select {
		case <-changed:
		case <-timeout.C:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
