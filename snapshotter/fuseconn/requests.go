package fuseconn

import (
	"encoding/binary"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// AnswerTimeout is how long a request may take. Whatever answers it gives up
// earlier by itself, unless something is stuck that nobody thought of: then the
// reader gets an input/output error from here.
const AnswerTimeout = 90 * time.Second

// requests are what was taken from the kernel and is being answered.
type requests struct {
	mu   sync.Mutex // guards open
	open map[*request]struct{}
}

// request is one of them.
type request struct {
	header [headerSize]byte
	began  time.Time
	limit  *time.Timer

	mu    sync.Mutex // held while it is answered too late; guards ended
	ended bool
}

// headerSize is that of what begins every request, see linux/fuse.h: struct
// fuse_in_header.
const headerSize = 40

func newRequests() *requests { return &requests{open: map[*request]struct{}{}} }

// begin notes the request in, and has late called if it takes longer than limit.
func (r *requests) begin(in []byte, limit time.Duration, late func(*request)) *request {
	q := &request{began: time.Now()}
	copy(q.header[:], in)
	q.limit = time.AfterFunc(limit, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if !q.ended {
			late(q)
		}
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open[q] = struct{}{}
	return q
}

func (r *requests) end(q *request) {
	q.limit.Stop()
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.open, q)
}

// inFlight returns how many requests there are and the age of the oldest.
func (r *requests) inFlight() (n int, oldest time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for q := range r.open {
		oldest = max(oldest, time.Since(q.began))
	}
	return len(r.open), oldest
}

// tooLate answers a request whose worker is stuck. The worker's own answer will
// be for a request that the kernel no longer knows.
func (c *Conn) tooLate(q *request) {
	header := make([]byte, outHeaderSize)
	errorReply(q.header[:], header, fuse.EIO)
	log.G(c.ctx).WithField("opcode", binary.NativeEndian.Uint32(q.header[4:])).
		WithField("timeout", c.timeout).Error("a request of the kernel was not answered within its time, its reader gets an input/output error; see whether the disk with the daemon's files answers, and restart the daemon")
	c.reply(header)
}
