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
// A connection of a Session outlives the process: a keeper has its descriptors,
// and the process that starts next resumes it. The kernel then hands out again
// what was asked and not answered, so readers only wait. For that a file
// system must give the same node numbers again and use no file handles.
//
// Whoever waits for an answer may hold kernel locks. A process that answers a
// mount must touch it as little as possible: a thread that waits for its own
// process cannot be killed.
package fuseconn

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// MaxRead is the largest read that the kernel asks for at once, in bytes.
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
	// ReadAhead is how far the kernel reads ahead in a file, in bytes; 0 is what
	// FUSE negotiates, 128 KiB.
	ReadAhead int
	// Session counts the requests. It keeps the connection under Name for the
	// next process; with KeepMount also the mount, if it is attached nowhere. No
	// name keeps nothing. It may be nil.
	Session   *Session
	Name      string
	KeepMount bool

	timeout time.Duration // AnswerTimeout but in tests
}

// kept says whether the connection is for the next process, too.
func (o Options) kept() bool { return o.Session.Outlives() && o.Name != "" }

// Conn is a mounted file system that is being served.
//
// Each worker reads a request, answers it, and reads the next. A worker that
// is answering may wait for the network, so whenever none is left reading, a
// new one is started; of those that come back, at most idleWorkers stay.
type Conn struct {
	ctx      context.Context
	kept     kept
	session  *Session // nil if the connection ends with the process
	name     string
	requests *requests
	timeout  time.Duration // of an answer
	// keeps is the session if the keeper has the connection, keepsMount says
	// that it has the mount, too.
	keeps      *Session
	keepsMount bool
	server     *fuse.ProtocolServer
	reading    atomic.Int32
	workers    sync.WaitGroup
	greeted    chan []byte   // gets the greeting when the kernel has the answer to its first request, INIT
	ended      chan struct{} // closed when the kernel has dropped the mount
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

// Opcode, notice, and offset of the InitOut field that is patched, see
// linux/fuse.h: struct fuse_init_out.
const (
	opInit            = 26
	notifyResend      = 7
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
	c := newConn(ctx, fs, o, kept{fd: fd, mount: mnt, greeting: -1})
	c.start()
	stopped := make(chan struct{})
	go func() {
		c.workers.Wait()
		close(stopped)
	}()
	select {
	case greeting := <-c.greeted: // the kernel sets a read-ahead of its own when it learns the answer
		err = c.keep(o, greeting)
	case <-stopped:
		err = errors.New("mounting FUSE: the connection ended at once")
	}
	c.end()
	if err != nil {
		return nil, errors.Join(err, c.Release())
	}
	if o.ReadAhead == 0 {
		return c, nil
	}
	// Files take over the value when they are opened, not later.
	if err := setReadAhead(mnt, o.ReadAhead); err != nil {
		log.G(ctx).WithError(err).Warn("cannot set the read-ahead of a FUSE mount; reading through it will be slower")
	}
	return c, nil
}

func newConn(ctx context.Context, fs fuse.RawFileSystem, o Options, k kept) *Conn {
	o.Protocol.MaxWrite = MaxRead // go-fuse derives the largest read from it
	o.Protocol.MaxBackground = maxBackground
	o.Protocol.ExtraCapabilities |= fuse.CAP_HAS_RESEND
	c := &Conn{
		ctx: context.WithoutCancel(ctx), kept: k, name: o.Name,
		requests: o.Session.counted(), timeout: cmp.Or(o.timeout, AnswerTimeout),
		greeted: make(chan []byte, 1), ended: make(chan struct{}),
		server: fuse.NewProtocolServer(fs, &o.Protocol),
	}
	if o.kept() {
		c.session = o.Session
	}
	return c
}

// keep has the connection kept. A kernel that cannot resend leaves it to end
// with the process.
func (c *Conn) keep(o Options, greeting []byte) (err error) {
	if !o.kept() {
		return nil
	}
	if !canResend(greeting) {
		log.G(c.ctx).Warn("this kernel is older than Linux 6.9: when the daemon ends, containers can no longer read what is not in memory")
		return nil
	}
	if c.kept.greeting, err = writeGreeting(greeting); err != nil {
		return fmt.Errorf("keeping a FUSE connection: %w", err)
	}
	k := c.kept
	if !o.KeepMount {
		k.mount = -1
	}
	if err := o.Session.keeper.Keep(o.Name, k.list()...); err != nil {
		return fmt.Errorf("keeping a FUSE connection: %w", err)
	}
	c.keeps, c.keepsMount = o.Session, o.KeepMount
	c.keeps.began(c)
	return nil
}

// Resume serves fs on the connection that an earlier process served, with the
// options it was mounted with. It returns errdefs.ErrNotFound if there is none,
// or it has ended. fs must be ready: readers may be waiting.
func Resume(ctx context.Context, fs fuse.RawFileSystem, o Options) (_ *Conn, err error) {
	if !o.kept() {
		return nil, errdefs.ErrNotFound
	}
	fds := o.Session.keeper.Take(o.Name)
	if fds == nil {
		return nil, fmt.Errorf("FUSE connection %s: %w", o.Name, errdefs.ErrNotFound)
	}
	k, err := sortKept(fds)
	if err == nil && o.KeepMount && k.mount < 0 {
		err = errors.New("its mount is missing")
	}
	c := newConn(ctx, fs, o, k)
	if err == nil {
		err = c.resume()
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("resuming FUSE connection %s: %w", o.Name, errors.Join(err, o.Session.keeper.Drop(o.Name)))
	}
	c.keeps, c.keepsMount = o.Session, o.KeepMount
	c.keeps.began(c)
	c.start()
	c.end()
	return c, nil
}

// resume greets the new server and has the kernel hand out what is not
// answered.
func (c *Conn) resume() error {
	state := []unix.PollFd{{Fd: int32(c.kept.fd)}}
	if _, err := unix.Poll(state, 0); err != nil {
		return err
	}
	if state[0].Revents&unix.POLLERR != 0 {
		return fmt.Errorf("it has ended: %w", errdefs.ErrNotFound)
	}
	greeting, err := readGreeting(c.kept.greeting)
	if err != nil {
		return err
	}
	if n, status := c.server.HandleRequest([][]byte{greeting}, [][]byte{replyBuffer()}); n == 0 || !status.Ok() {
		return fmt.Errorf("go-fuse does not take the greeting: %v", status)
	}
	if _, err := unix.Write(c.kept.fd, resendNotice()); err != nil {
		return fmt.Errorf("asking for the requests that wait: %w", err)
	}
	return nil
}

// resendNotice is the message FUSE_NOTIFY_RESEND: the kernel hands out again
// what was taken and not answered.
func resendNotice() []byte {
	b := make([]byte, outHeaderSize) // the unique number of a notice is 0
	binary.NativeEndian.PutUint32(b[0:], outHeaderSize)
	binary.NativeEndian.PutUint32(b[4:], notifyResend)
	return b
}

// end waits for the end of the connection and lets go of it.
func (c *Conn) end() {
	go func() {
		c.workers.Wait()
		if c.keeps != nil {
			if err := c.keeps.finish(c); err != nil {
				log.G(c.ctx).WithError(err).Warn("a FUSE connection that has ended is still kept")
			}
		}
		if err := (kept{c.kept.fd, -1, c.kept.greeting}).close(); err != nil {
			log.G(c.ctx).WithError(err).Warn("closing a FUSE connection")
		}
		close(c.ended)
	}()
}

// Kept says that the connection outlives the process.
func (c *Conn) Kept() bool { return c.keeps != nil }

// FD is the descriptor of the mount, valid until Release.
func (c *Conn) FD() int { return c.kept.mount }

// Release ends the caller's use of the mount, and that of a keeper.
func (c *Conn) Release() error {
	var err error
	if c.keepsMount {
		err = c.keeps.finish(c)
	}
	return errors.Join(err, unix.Close(c.kept.mount))
}

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
	in := requestBuffer()
	out := replyBuffer()
	for {
		n, err := unix.Read(c.kept.fd, in)
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
	q := c.requests.begin(in, c.timeout, c.tooLate)
	n, status := c.server.HandleRequest([][]byte{in}, [][]byte{out})
	c.requests.end(q)
	if n == 0 && status.Ok() {
		return // a request without a reply
	}
	if n == 0 {
		n = errorReply(in, out, status)
	}
	if binary.NativeEndian.Uint32(in[4:]) == opInit {
		greeting := greetingOf(in, out[:n])
		defer func() { c.greeted <- greeting }()
		if n > initOutMaxWriteAt+4 {
			// The read buffer must hold a write of this size, and there are none.
			binary.NativeEndian.PutUint32(out[initOutMaxWriteAt:], maxWrite)
		}
	}
	c.reply(out[:n])
}

// reply writes an answer, unless the next process is to give it.
func (c *Conn) reply(out []byte) { c.session.reply(func() { c.write(out) }) }

func (c *Conn) write(out []byte) {
	// ENOENT: the request was interrupted, or answered when it was too late.
	if _, err := unix.Write(c.kept.fd, out); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
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

// requestBuffer returns a buffer for a request, in memory from the start. Into
// memory that was never touched, the kernel's copy would need a page fault, and
// in a process that is being killed that fails: the kernel would then end the
// request with an error instead of leaving it to the next process.
func requestBuffer() []byte {
	b := make([]byte, inBufferSize)
	for i := 0; i < len(b); i += pageSize {
		b[i] = 1
	}
	b[len(b)-1] = 1 // it need not begin with a page
	return b
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
