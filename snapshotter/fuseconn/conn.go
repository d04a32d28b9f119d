// Package fuseconn mounts read-only FUSE file systems and answers the kernel's requests.
//
// The requests are decoded by go-fuse; reading them from /dev/fuse is done
// here, so that a connection belongs to nobody but its mount: it needs no
// mount helper, no mount point, and ends by itself with the last use of the
// mount.
//
// A mount is made detached: no path leads to it, only its descriptor. The
// caller opens files below /proc/self/fd/N, or attaches the mount to a
// directory.
//
// Whoever waits for an answer may hold kernel locks. A process that answers a
// mount must touch it as little as possible: a thread that waits for its own
// process cannot be killed.
package fuseconn

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/containerd/log"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// MaxRead is the largest read that the kernel asks for at once, in bytes. It
// also reads ahead that far.
const MaxRead = 1 << 20

// Forever is how many seconds the kernel may keep what it is told of
// something that never changes. It counts in jiffies, hence not the largest
// number.
const Forever = 1 << 30

// Options says how a file system is mounted and served.
type Options struct {
	Source string   // what mount tables show
	Flags  []string // FUSE's mount options without a value
	Attr   int      // unix.MOUNT_ATTR_*
	// Protocol says what is negotiated with the kernel; its sizes and queue
	// lengths are set here.
	Protocol fuse.MountOptions
}

// Conn is a mounted file system that is being served.
//
// Each worker reads a request, answers it, and reads the next. A worker that
// is answering may wait for the network, so whenever none is left reading, a
// new one is started; of those that come back, at most idleWorkers stay.
type Conn struct {
	ctx     context.Context
	fd      int // /dev/fuse
	mount   int
	server  *fuse.ProtocolServer
	reading atomic.Int32
	workers sync.WaitGroup
	greeted chan struct{} // closed when the kernel has the answer to its first request, INIT
	ended   chan struct{} // closed when the kernel has dropped the mount
}

const idleWorkers = 2

// maxBackground is how many read-ahead requests the kernel may have under way.
const maxBackground = 64

// Request and reply sizes in bytes. A reply's payload starts at a page
// boundary, which lets the kernel take whole pages.
const (
	outHeaderSize = 16
	inBufferSize  = 16 << 10 // FUSE_MIN_READ_BUFFER is 8 KiB; nothing is written
	pageSize      = 4 << 10
	maxWrite      = 4 << 10
)

// Opcode and offset of the InitOut field that is patched, see
// linux/fuse.h: struct fuse_init_out.
const (
	opInit            = 26
	initOutMaxWriteAt = outHeaderSize + 20
)

// Mount mounts fs, attached nowhere, and serves it until the last use of the
// mount ends; the caller's own use ends with Release. ctx carries the logger
// and nothing else.
func Mount(ctx context.Context, fs fuse.RawFileSystem, o Options) (*Conn, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening /dev/fuse: %w", err)
	}
	mnt, err := mountDetached(fd, o)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	o.Protocol.MaxWrite = MaxRead // go-fuse derives the largest read from it
	o.Protocol.MaxBackground = maxBackground
	c := &Conn{
		ctx: context.WithoutCancel(ctx), fd: fd, mount: mnt,
		greeted: make(chan struct{}), ended: make(chan struct{}),
		server: fuse.NewProtocolServer(fs, &o.Protocol),
	}
	c.start()
	go func() {
		c.workers.Wait()
		unix.Close(c.fd)
		close(c.ended)
	}()
	select {
	case <-c.greeted: // the kernel sets a read-ahead of its own when it learns the answer
	case <-c.ended:
		return nil, errors.Join(errors.New("mounting FUSE: the connection ended at once"), c.Release())
	}
	// Files take over the value when they are opened, not later.
	if err := setReadAhead(mnt); err != nil {
		log.G(ctx).WithError(err).Warn("cannot set the read-ahead of a FUSE mount; reading through it will be slower")
	}
	return c, nil
}

// FD is the descriptor of the mount, valid until Release.
func (c *Conn) FD() int { return c.mount }

// Release ends the caller's use of the mount.
func (c *Conn) Release() error { return unix.Close(c.mount) }

// Wait waits until the mount has ended, but no longer than timeout, and says
// whether it has. Uses that remain keep their workers until the process ends.
func (c *Conn) Wait(timeout time.Duration) bool {
	select {
	case <-c.ended:
		return true
	case <-time.After(timeout):
		return false
	}
}

func (c *Conn) start() {
	c.reading.Add(1)
	c.workers.Go(c.work)
}

func (c *Conn) work() {
	in := make([]byte, inBufferSize)
	out := replyBuffer()
	for {
		n, err := unix.Read(c.fd, in)
		if c.reading.Add(-1) == 0 && err == nil {
			c.start()
		}
		switch {
		case err == nil:
			c.answer(in[:n], out)
		case errors.Is(err, unix.ENODEV):
			return // unmounted
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOENT):
			// ENOENT: the request was interrupted before it was read
		default:
			log.G(c.ctx).WithError(err).Error("reading from /dev/fuse failed; what is mounted there can no longer be read")
			return
		}
		if c.reading.Add(1) > idleWorkers {
			c.reading.Add(-1)
			return
		}
	}
}

// answer handles one request.
func (c *Conn) answer(in, out []byte) {
	n, status := c.server.HandleRequest([][]byte{in}, [][]byte{out})
	if n == 0 && status.Ok() {
		return // a request without a reply
	}
	if n == 0 {
		n = errorReply(in, out, status)
	}
	if binary.NativeEndian.Uint32(in[4:]) == opInit {
		defer close(c.greeted)
		if n > initOutMaxWriteAt+4 {
			// The read buffer must hold a write of this size, and there are none.
			binary.NativeEndian.PutUint32(out[initOutMaxWriteAt:], maxWrite)
		}
	}
	if _, err := unix.Write(c.fd, out[:n]); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		log.G(c.ctx).WithError(err).Error("writing to /dev/fuse failed")
	}
}

// errorReply answers a request that could not be handled at all: without an
// answer its caller would wait for ever.
func errorReply(in, out []byte, status fuse.Status) int {
	binary.NativeEndian.PutUint32(out[0:], outHeaderSize)
	binary.NativeEndian.PutUint32(out[4:], uint32(-int32(status)))
	copy(out[8:16], in[8:16]) // unique
	return outHeaderSize
}

// replyBuffer returns a buffer for the largest reply, aligned so that the
// payload behind the header starts at a page boundary.
func replyBuffer() []byte {
	b := make([]byte, MaxRead+2*pageSize)
	skip := pageSize - outHeaderSize - int(uintptr(unsafe.Pointer(&b[0]))%pageSize)
	if skip < 0 {
		skip += pageSize
	}
	return b[skip : skip+outHeaderSize+MaxRead]
}

// Filled is a read's answer that already lies in the buffer that was given.
type Filled []byte

// Bytes implements fuse.ReadResult.
func (b Filled) Bytes([]byte) ([]byte, fuse.Status) { return b, fuse.OK }

// Size implements fuse.ReadResult.
func (b Filled) Size() int { return len(b) }

// Done implements fuse.ReadResult.
func (b Filled) Done() {}
