// Package layerfs serves layer files to the kernel over FUSE.
//
// One file system has one directory with one read-only file per layer, named
// by the hex of its diff ID and holding the layer's uncompressed stream, filled
// up with zeros to a whole block. EROFS opens these files as its devices;
// nothing else sees them, because the mount is not attached anywhere.
//
// Node numbers are derived from diff IDs and file handles are 0, so requests
// mean the same to any process that answers them: the mount can outlive the
// process (Resume).
//
// A reader of a layer file holds kernel locks while it waits. Whatever answers
// it must never touch a file system that stands on this one.
package layerfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/snapshotter/fuseconn"
)

// File is a layer's uncompressed stream. ReadAt is called concurrently; it
// must return in bounded time.
type File interface {
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	Size() int64
}

// table is the raw file system: which layer files there are.
type table struct {
	fuse.RawFileSystem // everything it does not implement is ENOSYS
	ctx                context.Context

	mu    sync.RWMutex // guards files
	files map[uint64]File
}

// nodeID returns the node number of a layer file: the first 8 bytes of its
// digest, kept away from the numbers that FUSE reserves.
func nodeID(diffID digest.Digest) (uint64, error) {
	if err := diffID.Validate(); err != nil {
		return 0, err
	}
	var id uint64
	if _, err := fmt.Sscanf(diffID.Encoded()[:16], "%x", &id); err != nil {
		return 0, err
	}
	return id&^(1<<63) | 1<<62, nil
}

func (t *table) get(id uint64) (File, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	f, ok := t.files[id]
	return f, ok
}

// gone is what is answered about a file that the kernel knows and the table does
// not: its layer is damaged on disk, or removed. It may be there again.
const gone = fuse.EIO

func (t *table) attr(id uint64, out *fuse.Attr) fuse.Status {
	if id == fuse.FUSE_ROOT_ID {
		*out = fuse.Attr{Ino: id, Mode: unix.S_IFDIR | 0o500, Nlink: 2}
		return fuse.OK
	}
	f, ok := t.get(id)
	if !ok {
		return gone
	}
	size := uint64(paddedSize(f))
	*out = fuse.Attr{Ino: id, Mode: unix.S_IFREG | 0o400, Nlink: 1, Size: size, Blocks: (size + 511) / 512, Blksize: 4096}
	return fuse.OK
}

func (t *table) Lookup(_ <-chan struct{}, parent *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	id, err := nodeID(digest.NewDigestFromEncoded(digest.SHA256, name))
	if err != nil || parent.NodeId != fuse.FUSE_ROOT_ID {
		return fuse.ENOENT
	}
	if status := t.attr(id, &out.Attr); status != fuse.OK {
		return fuse.ENOENT
	}
	out.NodeId = id
	out.EntryValid, out.AttrValid = fuseconn.Forever, fuseconn.Forever
	return fuse.OK
}

func (t *table) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.AttrValid = fuseconn.Forever
	return t.attr(in.NodeId, &out.Attr)
}

func (t *table) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if _, ok := t.get(in.NodeId); !ok {
		return gone
	}
	if in.Flags&unix.O_ACCMODE != unix.O_RDONLY {
		return fuse.EROFS
	}
	out.OpenFlags = cached | fuse.FOPEN_NOFLUSH
	return fuse.OK
}

// Flush is said not to exist. Nothing is to be flushed, and who closes a file
// while it ends would wait for the answer even if nobody is there to give it:
// a child that this process has just forked would then hold the connection
// beyond the end of both.
func (t *table) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// Read ignores interrupts: EROFS turns an interrupted read into a failed one.
func (t *table) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	f, ok := t.get(in.NodeId)
	if !ok {
		return nil, gone
	}
	off := int64(in.Offset)
	want := min(int64(in.Size), int64(len(buf)), paddedSize(f)-off)
	if want <= 0 {
		return fuseconn.Filled(nil), fuse.OK
	}
	n, err := f.ReadAt(t.ctx, buf[:want], off)
	// Only the end of the file may be filled up: an error that wraps io.EOF is
	// an error, of a connection that was closed for example.
	if err == io.EOF && off+int64(n) < f.Size() {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		log.G(t.ctx).WithError(err).WithField("off", in.Offset).WithField("len", in.Size).Error("reading a layer failed")
		return nil, fuse.EIO
	}
	clear(buf[n:want]) // the padding
	return fuseconn.Filled(buf[:want]), fuse.OK
}

// blockSize is EROFS's. It reads whole blocks, also the last one of a stream
// that ends inside it.
const blockSize = 512

func paddedSize(f File) int64 { return (f.Size() + blockSize - 1) / blockSize * blockSize }

func (t *table) Release(<-chan struct{}, *fuse.ReleaseIn) {}

func (t *table) Forget(uint64, uint64) {}

func (t *table) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.NameLen = 4096, 255
	return fuse.OK
}

// FS is a mounted layer file system.
type FS struct {
	table *table
	conn  *fuseconn.Conn

	closing  sync.Once
	closeErr error // of the first Close
}

// connection is the name under which the file system is kept for the next
// process. The number changes when requests no longer mean the same.
const connection = "layers-1"

func newTable(ctx context.Context) *table {
	return &table{
		RawFileSystem: fuse.NewDefaultRawFileSystem(), ctx: context.WithoutCancel(ctx), files: map[uint64]File{},
	}
}

func options(session *fuseconn.Session) fuseconn.Options {
	return fuseconn.Options{
		Source: "clip-layers",
		Flags:  []string{"allow_other"}, // EROFS reads on behalf of every user
		Attr:   unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID,
		Protocol: fuse.MountOptions{
			ExtraCapabilities:    fuse.CAP_ASYNC_DIO,
			DisabledCapabilities: fuse.CAP_PASSTHROUGH | fuse.CAP_READDIRPLUS,
		},
		Session: session, Name: connection, KeepMount: true,
	}
}

// cached gives read-ahead across the small files in a layer: the page cache of
// the layer file has it. It goes as far as EROFS's in one file, 128 KiB. More
// would be fetched and not read; and what is fetched with it is the cache's
// affair, which knows where seek points are.
const cached = fuse.FOPEN_KEEP_CACHE

// New mounts a layer file system, which session keeps for the next process; it
// may be nil. ctx carries the logger and nothing else.
func New(ctx context.Context, session *fuseconn.Session) (*FS, error) {
	return mount(ctx, options(session))
}

// NewBrief is New for a file system of which the kernel has nothing in memory
// yet. It ends with the process.
func NewBrief(ctx context.Context, session *fuseconn.Session) (*FS, error) {
	o := options(session)
	o.Name, o.KeepMount = "", false
	return mount(ctx, o)
}

func mount(ctx context.Context, o fuseconn.Options) (*FS, error) {
	t := newTable(ctx)
	conn, err := fuseconn.Mount(ctx, t, o)
	if err != nil {
		return nil, err
	}
	return &FS{table: t, conn: conn}, nil
}

// Resume goes on serving the layer file system of an earlier process, with
// files, which may already be waited for. It returns errdefs.ErrNotFound if
// there is none.
func Resume(ctx context.Context, session *fuseconn.Session, files map[digest.Digest]File) (*FS, error) {
	t := newTable(ctx)
	for diffID, f := range files {
		if err := t.add(diffID, f); err != nil {
			return nil, err
		}
	}
	conn, err := fuseconn.Resume(ctx, t, options(session))
	if err != nil {
		return nil, err
	}
	return &FS{table: t, conn: conn}, nil
}

// Kept says that the file system outlives the process.
func (fs *FS) Kept() bool { return fs.conn.Kept() }

// Add makes the layer readable under the path that Path returns.
func (fs *FS) Add(diffID digest.Digest, f File) error { return fs.table.add(diffID, f) }

func (t *table) add(diffID digest.Digest, f File) error {
	id, err := nodeID(diffID)
	if err != nil {
		return fmt.Errorf("diff ID %q: %w", diffID, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.files[id] = f
	return nil
}

// Remove makes the layer unreadable, also through descriptors that are open.
func (fs *FS) Remove(diffID digest.Digest) {
	if id, err := nodeID(diffID); err == nil {
		fs.table.mu.Lock()
		defer fs.table.mu.Unlock()
		delete(fs.table.files, id)
	}
}

// Path returns the path of a layer file. It is valid as long as this process
// lives.
func (fs *FS) Path(diffID digest.Digest) string {
	return fmt.Sprintf("/proc/%d/fd/%d/%s", os.Getpid(), fs.conn.FD(), diffID.Encoded())
}

// closeTimeout is how long Close waits for uses of the mount to end.
const closeTimeout = 2 * time.Second

// Close unmounts the file system once nothing stands on it any more. It fails
// if something still does. Closing again returns what the first Close did.
func (fs *FS) Close() error {
	fs.closing.Do(func() {
		fs.closeErr = fs.conn.Release()
		if !fs.conn.Wait(closeTimeout) {
			fs.closeErr = errors.Join(fs.closeErr, errors.New("layer files are still in use"))
		}
	})
	return fs.closeErr
}
