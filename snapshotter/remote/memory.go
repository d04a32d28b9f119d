package remote

import (
	"net/url"
	"time"

	"github.com/opencontainers/go-digest"
)

// place is where a blob may be: a repository at a host.
type place struct {
	scheme, host, path string
	digest             digest.Digest
}

// memory is what earlier reads found out about places. All of it is guarded by
// Client.mu, bounded, and a matter of speed alone: it may be forgotten.
type memory struct {
	redirects map[place]*location
	good      map[digest.Digest]remembered // the last place that delivered, if it was not the first
	bad       map[place]time.Time          // delivered wrong bytes; not asked first until then
	rangeless map[place]time.Time          // answers with the whole blob; until then
	hopeless  map[digest.Digest]time.Time  // a read gave up; another need not wait as long until then
}

// remembered is a place that is asked first until a time.
type remembered struct {
	place
	until time.Time
}

// location is where a place's host redirected to.
type location struct {
	url   *url.URL // nil: its redirects are good for one request
	since time.Time
}

// How much is remembered, of each kind, and for how long.
const (
	maxRemembered = 4096
	preferGood    = time.Minute
	avoidBad      = 10 * time.Minute
	keepHopeless  = 2 * time.Second
	oneTime       = 10 * time.Second // a redirect that ends sooner is not worth keeping
)

func newMemory() memory {
	return memory{
		redirects: map[place]*location{}, good: map[digest.Digest]remembered{},
		bad: map[place]time.Time{}, rangeless: map[place]time.Time{}, hopeless: map[digest.Digest]time.Time{},
	}
}

// put stores a value in a map that has room for it, or makes room.
func put[K comparable, V any](m map[K]V, key K, value V) {
	if len(m) >= maxRemembered {
		for old := range m { // any
			delete(m, old)
			break
		}
	}
	m[key] = value
}

// redirect returns where a place's last answer came from, or nil.
func (c *Client) redirect(p place) *url.URL {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.memory.redirects[p]; l != nil {
		return l.url
	}
	return nil
}

// keepRedirect remembers that u answered for a place.
func (c *Client) keepRedirect(p place, u *url.URL) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.memory.redirects[p]; l != nil && l.url == nil && time.Since(l.since) < avoidBad {
		return
	}
	put(c.memory.redirects, p, &location{u, time.Now()})
}

// dropRedirect forgets a redirect that led nowhere. One that was refused soon
// after it was given shows that the place's redirects are not worth keeping.
func (c *Client) dropRedirect(p place, u *url.URL, refused bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.memory.redirects[p]
	if l == nil || l.url != u {
		return // another read was quicker
	}
	if refused && time.Since(l.since) < oneTime {
		put(c.memory.redirects, p, &location{nil, time.Now()})
		return
	}
	delete(c.memory.redirects, p)
}

// prefer has a place asked first.
func (c *Client) prefer(p place) {
	c.mu.Lock()
	defer c.mu.Unlock()
	put(c.memory.good, p.digest, remembered{p, time.Now().Add(preferGood)})
}

// avoid has a place asked last.
func (c *Client) avoid(p place) {
	c.mu.Lock()
	defer c.mu.Unlock()
	put(c.memory.bad, p, time.Now().Add(avoidBad))
	delete(c.memory.redirects, p)
	if c.memory.good[p.digest].place == p {
		delete(c.memory.good, p.digest)
	}
}

// noRanges remembers that a place sends whole blobs only.
func (c *Client) noRanges(p place) {
	c.mu.Lock()
	defer c.mu.Unlock()
	put(c.memory.rangeless, p, time.Now().Add(avoidBad))
}

// gaveUp remembers that a read of a blob waited in vain. The kernel asks
// several times for what a process reads once, at once after a failure, and the
// process should not wait each time.
func (c *Client) gaveUp(d digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	put(c.memory.hopeless, d, time.Now().Add(keepHopeless))
}

// isHopeless says that a read should try once and not wait.
func (c *Client) isHopeless(d digest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Before(c.memory.hopeless[d])
}

// rank says how soon a place is asked: 0 first.
func (c *Client) rank(p place) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	switch g := c.memory.good[p.digest]; {
	case now.Before(c.memory.bad[p]), now.Before(c.memory.rangeless[p]):
		return 2
	case g.place == p && now.Before(g.until):
		return 0
	}
	return 1
}
