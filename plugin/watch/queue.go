package watch

import (
	"context"
	"sync"
	"time"
)

// key names an image in a containerd.
type key struct{ namespace, name string }

// sweeping is queued to remove archives whose images are gone. No image has
// that name.
var sweeping key

// queue holds images until they are due. Each is in it once: adding it again
// moves it.
type queue struct {
	changed chan struct{} // has one element after add

	mu    sync.Mutex // guards the fields below
	items map[key]item
	tries map[key]int // how often an image has failed in a row
}

type item struct{ due time.Time }

func newQueue() *queue {
	return &queue{changed: make(chan struct{}, 1), items: map[key]item{}, tries: map[key]int{}}
}

// add has k worked on at due.
func (q *queue) add(k key, due time.Time) {
	q.mu.Lock()
	q.items[k] = item{due}
	q.mu.Unlock()
	select {
	case q.changed <- struct{}{}:
	default:
	}
}

// waiting returns how many images wait.
func (q *queue) waiting() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := len(q.items)
	if _, ok := q.items[sweeping]; ok {
		n--
	}
	return n
}

// next takes the image out that is due first, and waits until it is. It also
// returns how often that has failed. It is false when ctx ends.
func (q *queue) next(ctx context.Context) (key, int, bool) {
	for {
		k, due, found := q.first()
		wait := time.Until(due)
		if found && wait <= 0 {
			if attempt, ok := q.take(k, due); ok {
				return k, attempt, true
			}
			continue
		}
		if !found {
			wait = time.Hour
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return key{}, 0, false
		case <-q.changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (q *queue) first() (k key, due time.Time, found bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for candidate, i := range q.items {
		if !found || i.due.Before(due) {
			k, due, found = candidate, i.due, true
		}
	}
	return k, due, found
}

// take removes k unless it was moved.
func (q *queue) take(k key, due time.Time) (attempt int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if i, there := q.items[k]; !there || !i.due.Equal(due) {
		return 0, false
	}
	delete(q.items, k)
	return q.tries[k], true
}

// again says when to work on an image another time; the zero value is never.
type again struct {
	after  time.Duration
	failed bool // it counts as a failure
}

// done says how work on k ended.
func (q *queue) done(k key, a again) {
	q.mu.Lock()
	if a.failed {
		q.tries[k]++
	} else if a.after == 0 {
		delete(q.tries, k)
	}
	_, moved := q.items[k]
	q.mu.Unlock()
	if a.after > 0 && !moved {
		q.add(k, time.Now().Add(a.after))
	}
}
