package layerfs

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/containerd/log"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// conn answers the requests of one /dev/fuse connection.
//
// Each worker reads a request, answers it, and reads the next. A worker that
// is answering may wait for the network, so whenever none is left reading, a
// new one is started; of those that come back, at most idleWorkers stay.
type conn struct {
	ctx     context.Context
	fd      int
	server  *fuse.ProtocolServer
	reading atomic.Int32
	workers sync.WaitGroup
}

const idleWorkers = 2

// Request and reply sizes in bytes. A reply's payload starts at a page
// boundary, which lets the kernel take whole pages.
const (
	outHeaderSize = 16
	inBufferSize  = 16 << 10 // FUSE_MIN_READ_BUFFER is 8 KiB; layer files are not written to
	pageSize      = 4 << 10
	maxWrite      = 4 << 10
)

// Opcode and offset of the InitOut field that is patched, see
// linux/fuse.h: struct fuse_init_out.
const (
	opInit            = 26
	initOutMaxWriteAt = outHeaderSize + 20
)

func serve(ctx context.Context, fd int, fs fuse.RawFileSystem) *conn {
	c := &conn{ctx: ctx, fd: fd, server: fuse.NewProtocolServer(fs, &fuse.MountOptions{
		MaxWrite:             maxRead, // go-fuse derives the largest read from it
		MaxBackground:        maxBackground,
		ExtraCapabilities:    fuse.CAP_ASYNC_DIO,
		DisabledCapabilities: fuse.CAP_PASSTHROUGH | fuse.CAP_READDIRPLUS,
	})}
	c.start()
	return c
}

// closeTimeout is how long close waits for uses of the mount to end.
const closeTimeout = 2 * time.Second

// close waits for the workers, which end when the kernel has dropped the last
// use of the mount. Uses that remain keep their workers until the process ends.
func (c *conn) close() error {
	done := make(chan struct{})
	go func() {
		c.workers.Wait()
		close(done)
	}()
	select {
	case <-done:
		return unix.Close(c.fd)
	case <-time.After(closeTimeout):
		return errors.New("layer files are still in use")
	}
}

func (c *conn) start() {
	c.reading.Add(1)
	c.workers.Go(c.work)
}

func (c *conn) work() {
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
		case errors.Is(err, unix.ENODEV), errors.Is(err, unix.EBADF):
			return // unmounted, or closed
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOENT):
			// ENOENT: the request was interrupted before it was read
		default:
			log.G(c.ctx).WithError(err).Error("reading from /dev/fuse failed; layer files can no longer be read")
			return
		}
		if c.reading.Add(1) > idleWorkers {
			c.reading.Add(-1)
			return
		}
	}
}

// answer handles one request.
func (c *conn) answer(in, out []byte) {
	n, status := c.server.HandleRequest([][]byte{in}, [][]byte{out})
	if n == 0 && status.Ok() {
		return // a request without a reply
	}
	if n == 0 {
		n = errorReply(in, out, status)
	}
	if binary.NativeEndian.Uint32(in[4:]) == opInit && n > initOutMaxWriteAt+4 {
		// The read buffer must hold a write of this size, and there are none.
		binary.NativeEndian.PutUint32(out[initOutMaxWriteAt:], maxWrite)
	}
	if _, err := unix.Write(c.fd, out[:n]); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EBADF) {
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
	b := make([]byte, maxRead+2*pageSize)
	skip := pageSize - outHeaderSize - int(uintptr(unsafe.Pointer(&b[0]))%pageSize)
	if skip < 0 {
		skip += pageSize
	}
	return b[skip : skip+outHeaderSize+maxRead]
}
