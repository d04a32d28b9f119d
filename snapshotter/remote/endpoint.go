package remote

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/semaphore"
)

// endpoint is a machine that is talked to: how busy it is, and how well.
//
// Its circuit is closed while it answers. A failure opens the circuit for a
// pause that doubles with each further one; then one request may try whether
// it answers again, with less patience, and all others wait for the outcome.
type endpoint struct {
	host  string
	slots *semaphore.Weighted

	mu        sync.Mutex // guards the fields below
	failures  int        // since the last success
	openUntil time.Time  // the circuit is open before
	probing   bool       // a request tries whether it answers again
	notBefore time.Time  // it asked to be left alone before
}

// Pauses of an endpoint that fails, and the longest one that it may ask for.
const (
	firstOpen     = time.Second
	maxOpen       = 30 * time.Second
	maxRetryAfter = 30 * time.Second
)

func newEndpoint(host string) *endpoint {
	return &endpoint{host: host, slots: semaphore.NewWeighted(maxPerEndpoint)}
}

// unavailable is the error of an endpoint that was not asked.
type unavailable struct {
	host    string
	until   time.Time
	refused bool // it said so itself; otherwise it may be asked if nobody else can
}

func (e *unavailable) Error() string {
	if e.refused {
		return fmt.Sprintf("%s asked to be left alone for a while", e.host)
	}
	return fmt.Sprintf("%s failed a moment ago", e.host)
}
func (e *unavailable) Unwrap() error {
	if e.refused {
		return errdefs.ErrResourceExhausted
	}
	return errdefs.ErrUnavailable
}

// admit says whether the endpoint may be asked now, and how long its answer
// may take if patience is what an answer may usually take. With force an open
// circuit does not matter.
func (e *endpoint) admit(patience time.Duration, force bool) (time.Duration, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	if now.Before(e.notBefore) {
		return 0, &unavailable{e.host, e.notBefore, true}
	}
	if force || e.failures == 0 {
		return patience, nil
	}
	if now.Before(e.openUntil) {
		return 0, &unavailable{e.host, e.openUntil, false}
	}
	patience /= 5
	e.openUntil, e.probing = now.Add(patience), true
	return patience, nil
}

// isOpen says that others should be asked before this endpoint.
func (e *endpoint) isOpen() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return time.Now().Before(e.openUntil)
}

// failed opens the circuit. Of requests that fail together one counts.
func (e *endpoint) failed(ctx context.Context, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.probing && time.Now().Before(e.openUntil) {
		return
	}
	e.probing = false
	e.failures++
	pause := min(firstOpen<<min(e.failures-1, 10), maxOpen)
	e.openUntil = time.Now().Add(jitter(pause))
	if e.failures == 2 { // a single failure is nothing to tell
		log.G(ctx).WithError(err).WithField("host", e.host).Warn("a registry host fails; others are asked before it")
	}
}

// answered closes the circuit.
func (e *endpoint) answered() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failures, e.openUntil, e.probing = 0, time.Time{}, false
}

// later keeps everybody from asking for a while.
func (e *endpoint) later(d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if until := time.Now().Add(d); until.After(e.notBefore) {
		e.notBefore = until
	}
}

// jitter returns a duration around d, so that those who failed together do not
// come back together.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d) }
