package harness

import (
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Link is a network between a registry and its clients: what a proxy sends goes through it at its rate, over all
// connections together, and every message takes its latency. The zero value is no network at all.
//
// A new connection costs a round trip before its first request. TCP's slow start and losses are not imitated.
type Link struct {
	Rate    int64         // bytes per second to clients; 0 is no limit
	Up      int64         // bytes per second to the registry; 0 is no limit
	Latency time.Duration // in each direction
}

// Of how a link is imitated.
const (
	linkChunk = 16 << 10               // bytes that one connection sends before it is the next one's turn
	linkIdle  = 5 * time.Millisecond   // after which nobody has anything to catch up
	linkLate  = 200 * time.Millisecond // most that senders who are woken late may catch up
	linkQueue = 64                     // chunks on their way on one connection
	linkClose = time.Second            // how long a connection that is closed may take to deliver
)

// wire is a Link in use.
type wire struct {
	Link
	down, up lane
}

// lane is one direction of a wire.
type lane struct {
	mu   sync.Mutex // guards the fields below
	free time.Time  // when everything sent so far is through
	busy time.Time  // when somebody sent last
}

// pass waits until n bytes are through at a rate, behind those that were sent before.
func (l *lane) pass(n int, rate int64) {
	if rate == 0 {
		return
	}
	l.mu.Lock()
	now := time.Now()
	earliest := now
	if now.Sub(l.busy) < linkIdle {
		// The wire was in use all the time: whoever was woken late catches up.
		earliest = now.Add(-linkLate)
	}
	if l.free.Before(earliest) {
		l.free = earliest
	}
	l.free = l.free.Add(time.Duration(int64(n) * int64(time.Second) / rate))
	free := l.free
	l.mu.Unlock()
	time.Sleep(time.Until(free))
	l.mu.Lock()
	l.busy = time.Now()
	l.mu.Unlock()
}

// shapedListener puts connections behind the wire that is in use at the moment.
type shapedListener struct {
	net.Listener
	wire *atomic.Pointer[wire]
}

func (l shapedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &shapedConn{Conn: conn, wire: l.wire, sending: make(chan parcel, linkQueue), sent: make(chan struct{})}
	c.turn.Store(true)
	go c.deliver()
	return c, nil
}

// shapedConn is the server's end of a connection. It is for requests and answers that take turns, as in HTTP/1.
type shapedConn struct {
	net.Conn
	wire *atomic.Pointer[wire]

	greeted bool        // the first request has come
	turn    atomic.Bool // what is read next begins a request

	sending  chan parcel
	underway atomic.Int64          // parcels that were sent and have not arrived
	failed   atomic.Pointer[error] // of the last delivery
	sent     chan struct{}         // closed when deliver has ended
	closing  sync.Once
	mu       sync.RWMutex // held shared while sending is used, guards closed
	closed   bool
}

// parcel is a part of an answer on its way.
type parcel struct {
	bytes []byte
	due   time.Time
}

// Read holds a request back for as long as it is on its way.
func (c *shapedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	w := c.wire.Load()
	w.up.pass(n, w.Up)
	if n > 0 && w.Latency > 0 && c.turn.Swap(false) {
		if !c.greeted {
			time.Sleep(2 * w.Latency)
		}
		time.Sleep(w.Latency)
	}
	c.greeted = c.greeted || n > 0
	return n, err
}

// Write returns when p is through the wire, which is before it has arrived.
func (c *shapedConn) Write(p []byte) (n int, err error) {
	c.turn.Store(true)
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.closed {
		return 0, net.ErrClosed
	}
	for n < len(p) {
		if failed := c.failed.Load(); failed != nil {
			return n, *failed
		}
		w := c.wire.Load()
		if w.Link == (Link{}) && c.underway.Load() == 0 {
			m, err := c.Conn.Write(p[n:])
			return n + m, err
		}
		chunk := p[n:min(len(p), n+linkChunk)]
		w.down.pass(len(chunk), w.Rate)
		c.underway.Add(1)
		c.sending <- parcel{slices.Clone(chunk), time.Now().Add(w.Latency)}
		n += len(chunk)
	}
	return n, nil
}

// deliver has what was sent arrive in time.
func (c *shapedConn) deliver() {
	defer close(c.sent)
	for parcel := range c.sending {
		if c.failed.Load() == nil {
			time.Sleep(time.Until(parcel.due))
			if _, err := c.Conn.Write(parcel.bytes); err != nil {
				c.failed.Store(&err)
			}
		}
		c.underway.Add(-1)
	}
}

// Close has what is on its way arrive first.
func (c *shapedConn) Close() error {
	c.closing.Do(func() {
		_ = c.Conn.SetWriteDeadline(time.Now().Add(linkClose)) // a peer that does not read holds nobody up
		c.mu.Lock()
		c.closed = true
		c.mu.Unlock()
		close(c.sending)
	})
	<-c.sent
	return c.Conn.Close()
}
