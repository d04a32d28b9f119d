package fuseconn

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/snapshotter/keeper"
)

// Session is the connections of one process, and what its successor shall go on
// with. A nil session is one that counts nothing and has no successor.
type Session struct {
	keeper   *keeper.Keeper // nil if there is no successor
	requests *requests

	mu   sync.RWMutex // held shared while an answer is written; guards the field below
	over bool

	connsMu sync.Mutex // guards conns
	conns   map[string]*Conn
}

// NewSession returns a session whose connections k keeps; with nil they end with
// the process.
func NewSession(k *keeper.Keeper) *Session {
	return &Session{keeper: k, requests: newRequests(), conns: map[string]*Conn{}}
}

// Outlives says whether connections are kept for another process.
func (s *Session) Outlives() bool { return s != nil && s.keeper != nil }

// InFlight returns how many requests of the kernel are being answered now, and
// the age of the oldest, which is below AnswerTimeout unless something is stuck.
func (s *Session) InFlight() (n int, oldest time.Duration) { return s.requests.inFlight() }

// counted returns where requests are noted.
func (s *Session) counted() *requests {
	if s == nil {
		return newRequests()
	}
	return s.requests
}

// Wait waits until the connection, if there is one, has ended and is no longer
// kept, but no longer than timeout.
func (s *Session) Wait(name string, timeout time.Duration) {
	if s == nil {
		return
	}
	s.connsMu.Lock()
	c := s.conns[name]
	s.connsMu.Unlock()
	if c != nil {
		c.Wait(timeout)
	}
}

// began notes a connection that is kept.
func (s *Session) began(c *Conn) {
	s.connsMu.Lock()
	defer s.connsMu.Unlock()
	s.conns[c.name] = c
}

// finish ends the keeping of a connection.
func (s *Session) finish(c *Conn) error {
	s.connsMu.Lock()
	defer s.connsMu.Unlock()
	if s.conns[c.name] != c {
		return nil
	}
	delete(s.conns, c.name)
	return s.keeper.Drop(c.name)
}

// HandOver ends the answering: what the kernel is told from now on, the next
// process tells it. It is called before anything ends that answers need.
func (s *Session) HandOver() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
}

// Waiting lists the connections of an earlier process that nobody resumed.
func (s *Session) Waiting() []string {
	if !s.Outlives() {
		return nil
	}
	return s.keeper.Names()
}

// Abandon ends a connection of an earlier process: requests that wait, and
// all that come, fail.
func (s *Session) Abandon(name string) error { return s.keeper.Drop(name) }

// reply calls write unless the answering has ended.
func (s *Session) reply(write func()) {
	if s == nil {
		write()
		return
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if !s.over {
		write()
	}
}

// A connection is kept as the descriptor of /dev/fuse, that of the mount if it
// is attached nowhere, and a file in memory with the greeting. Which is which,
// their names in /proc say: systemd does not keep their order, and asking the
// mount itself would be a request that nobody answers yet.
const (
	greetingName = "clip-fuse-greeting"
	fuseDevice   = "/dev/fuse"
)

// kept is what is kept of a connection; -1 is none.
type kept struct{ fd, mount, greeting int }

func sortKept(fds []int) (k kept, err error) {
	k = kept{-1, -1, -1}
	for _, fd := range fds {
		name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		if err != nil {
			return k, err
		}
		switch {
		case name == fuseDevice:
			k.fd = fd
		case strings.HasPrefix(name, "/memfd:"+greetingName):
			k.greeting = fd
		default:
			k.mount = fd
		}
	}
	if k.fd < 0 || k.greeting < 0 {
		return k, errors.New("a part of the connection is missing")
	}
	return k, nil
}

// list returns the descriptors that there are.
func (k kept) list() (fds []int) {
	for _, fd := range []int{k.fd, k.mount, k.greeting} {
		if fd >= 0 {
			fds = append(fds, fd)
		}
	}
	return fds
}

func (k kept) close() error {
	var errs []error
	for _, fd := range k.list() {
		errs = append(errs, unix.Close(fd))
	}
	return errors.Join(errs...)
}

// Offsets in the INIT request and its answer, see linux/fuse.h: struct
// fuse_init_in and fuse_init_out.
const (
	initInSize    = 40 + 64
	initInMinor   = 44
	initInFlags   = 52
	initOutMinor  = outHeaderSize + 4
	initOutFlags  = outHeaderSize + 12
	initOutFlags2 = outHeaderSize + 32
	initOutSize   = outHeaderSize + 64
)

// greetingOf returns the INIT request that has the answer for its offer: a
// process that is greeted with it assumes what was agreed upon, no matter what
// it would agree upon itself. It is nil for kernels that say less than those
// that can resend.
func greetingOf(in, out []byte) []byte {
	if len(in) < initInSize || len(out) < initOutSize {
		return nil
	}
	g := bytes.Clone(in[:initInSize])
	copy(g[initInMinor:initInFlags], out[initOutMinor:initOutFlags]) // and the read-ahead
	copy(g[initInFlags:], out[initOutFlags:initOutFlags+4])
	copy(g[initInFlags+4:], out[initOutFlags2:initOutFlags2+4])
	return g
}

// canResend says whether the kernel hands requests out again that a process
// took and did not answer. Without that, some would be lost with it.
func canResend(greeting []byte) bool {
	if greeting == nil {
		return false
	}
	flags2 := binary.NativeEndian.Uint32(greeting[initInFlags+4:])
	return uint64(flags2)<<32&fuse.CAP_HAS_RESEND != 0
}

// writeGreeting returns a file in memory that holds the greeting.
func writeGreeting(greeting []byte) (int, error) {
	fd, err := unix.MemfdCreate(greetingName, unix.MFD_CLOEXEC)
	if err != nil {
		return -1, err
	}
	if _, err := unix.Pwrite(fd, greeting, 0); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

func readGreeting(fd int) ([]byte, error) {
	g := make([]byte, initInSize)
	n, err := unix.Pread(fd, g, 0)
	if err != nil {
		return nil, err
	}
	if n != initInSize || binary.NativeEndian.Uint32(g[4:]) != opInit {
		return nil, errors.New("the greeting of the connection is damaged")
	}
	return g, nil
}
