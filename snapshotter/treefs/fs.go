// Package treefs serves a merged tree over FUSE, for kernels that cannot mount it as EROFS.
//
// One file system serves one root, whole: its own root holds one directory,
// erofs.RootDir, which is the root of the container, as in an EROFS root.
// Everything is immutable, so the kernel is told to keep all it learns: names
// (those that do not exist, too), attributes, directories, symlink targets,
// file contents. Only extended attributes are asked for each time, because
// FUSE caches none but ACLs.
//
// Node numbers follow from the tree alone, and there are no file handles, so
// requests mean the same to any process that answers them: the mount can
// outlive the process (Resume).
//
// The package does not merge layers and does not fetch.
package treefs

import (
	"context"
	"fmt"
	"sort"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/erofs"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/snapshotter/fuseconn"
)

// server is the raw file system.
type server struct {
	fuse.RawFileSystem // everything it does not implement is ENOSYS
	ctx                context.Context

	known  atomic.Bool // the fields below are set, and stay as they are
	layers []Layer
	inodes []inode // by node number, which starts at 1
	size   uint64  // of all files, in bytes
}

// inode is a node of the tree with its number and those of its children.
type inode struct {
	*tree.Node
	number, parent uint64
	children       []uint32 // of Node.Children
}

// Keep says who keeps a root's connection for the next process, and under
// which name. No session or no name keeps nothing.
type Keep struct {
	Session *fuseconn.Session
	Name    string
}

// newServer returns a server that answers everything with EIO until it knows a tree.
func newServer(ctx context.Context) *server {
	return &server{RawFileSystem: fuse.NewDefaultRawFileSystem(), ctx: context.WithoutCancel(ctx)}
}

// know has the server serve a tree from now on, unless it has one. It is not called
// twice at the same time.
func (s *server) know(root *tree.Node, layers []Layer) error {
	if s.known.Load() {
		return nil
	}
	s.layers = layers
	if err := s.number(root); err != nil {
		return err
	}
	s.known.Store(true)
	return nil
}

func options(keep Keep) fuseconn.Options {
	return fuseconn.Options{
		Source: "clip-root",
		Flags:  []string{"allow_other", "default_permissions", "ro"},
		Attr:   unix.MOUNT_ATTR_RDONLY,
		Protocol: fuse.MountOptions{
			EnableAcl:            true,
			EnableSymlinkCaching: true,
			IDMappedMount:        true,
			ExtraCapabilities:    fuse.CAP_ASYNC_DIO,
			DisabledCapabilities: fuse.CAP_PASSTHROUGH, // it would count as a stacked file system
		},
		ReadAhead: fuseconn.MaxRead, // a round trip for each 128 KiB is too many
		Session:   keep.Session, Name: keep.Name,
	}
}

// Mount serves root at target, read-only, until it is unmounted there and its
// last use ends. layers are those of the tree's nodes. ctx carries the logger
// and nothing else.
func Mount(ctx context.Context, target string, root *tree.Node, layers []Layer, keep Keep) error {
	s := newServer(ctx)
	if err := s.know(root, layers); err != nil {
		return err
	}
	conn, err := fuseconn.Mount(ctx, s, options(keep))
	if err != nil {
		return err
	}
	err = unix.MoveMount(conn.FD(), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
	if rerr := conn.Release(); err == nil {
		err = rerr
	}
	if err != nil {
		return fmt.Errorf("mounting at %s: %w", target, err)
	}
	return nil
}

// Resume goes on serving a root that an earlier process mounted. It returns
// errdefs.ErrNotFound if its connection was not kept or has ended.
func Resume(ctx context.Context, root *tree.Node, layers []Layer, keep Keep) error {
	s := newServer(ctx)
	if err := s.know(root, layers); err != nil {
		return err
	}
	_, err := fuseconn.Resume(ctx, s, options(keep))
	return err
}

// ResumeUnknown is Resume for a root that is not known at the moment. Everything
// there is an input/output error until know has been called without an error, once
// or one time after the other.
func ResumeUnknown(ctx context.Context, keep Keep) (know func(root *tree.Node, layers []Layer) error, err error) {
	s := newServer(ctx)
	_, err = fuseconn.Resume(ctx, s, options(keep))
	return s.know, err
}

// number gives every node below the file system's own root its number, in the
// order of a depth-first walk. Hard links share theirs.
func (s *server) number(root *tree.Node) error {
	top := &tree.Node{Mode: unix.S_IFDIR | 0o755, Nlink: 3, Children: []tree.Dirent{{Name: erofs.RootDir, Node: root}}}
	s.inodes = []inode{{}} // there is no node 0
	numbers := map[*tree.Node]uint32{}
	var visit func(n *tree.Node, parent uint64) (uint32, error)
	visit = func(n *tree.Node, parent uint64) (uint32, error) {
		if number, ok := numbers[n]; ok {
			if n.Mode&unix.S_IFMT == unix.S_IFDIR {
				return 0, fmt.Errorf("directory %d has two names", number)
			}
			return number, nil
		}
		number := uint32(len(s.inodes))
		if n.Nlink > 1 {
			numbers[n] = number
		}
		s.inodes = append(s.inodes, inode{Node: n, number: uint64(number), parent: parent})
		if n.Mode&unix.S_IFMT == unix.S_IFREG {
			s.size += uint64(n.Size)
		}
		children := make([]uint32, len(n.Children))
		for i, c := range n.Children {
			var err error
			if children[i], err = visit(c.Node, uint64(number)); err != nil {
				return 0, err
			}
		}
		s.inodes[number].children = children
		return number, nil
	}
	_, err := visit(top, fuse.FUSE_ROOT_ID)
	return err
}

// inode returns the node with a number that the kernel names.
func (s *server) inode(number uint64) (inode, fuse.Status) {
	if !s.known.Load() {
		return inode{}, fuse.EIO
	}
	if number == 0 || number >= uint64(len(s.inodes)) {
		return inode{}, fuse.ENOENT
	}
	return s.inodes[number], fuse.OK
}

// attr is what stat(2) shows.
func (n inode) attr() fuse.Attr {
	a := fuse.Attr{
		Ino: n.number, Mode: n.Mode, Nlink: n.Nlink, Owner: fuse.Owner{Uid: n.UID, Gid: n.GID},
		Size: uint64(n.Size), Blksize: 4096,
		// The kernel takes the seconds for signed ones.
		Mtime: uint64(n.ModTime), Mtimensec: n.ModNsec,
	}
	a.Atime, a.Atimensec, a.Ctime, a.Ctimensec = a.Mtime, a.Mtimensec, a.Mtime, a.Mtimensec
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		a.Blocks = (a.Size + 511) / 512
	case unix.S_IFLNK:
		a.Size = uint64(len(n.Target))
	case unix.S_IFCHR, unix.S_IFBLK:
		a.Rdev = uint32(n.Rdev) // for the device numbers that Linux has, makedev(3)'s form is the kernel's
	}
	return a
}

// entry fills in what the kernel keeps of a name.
func (n inode) entry(out *fuse.EntryOut) {
	out.NodeId, out.Attr = n.number, n.attr()
	out.EntryValid, out.AttrValid = fuseconn.Forever, fuseconn.Forever
}

func (s *server) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	dir, status := s.inode(in.NodeId)
	if status != fuse.OK {
		return status
	}
	i := sort.Search(len(dir.Children), func(i int) bool { return dir.Children[i].Name >= name })
	if i == len(dir.Children) || dir.Children[i].Name != name {
		out.EntryValid = fuseconn.Forever // node 0: there is no such name
		return fuse.OK
	}
	s.inodes[dir.children[i]].entry(out)
	return fuse.OK
}

func (s *server) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, status := s.inode(in.NodeId)
	if status != fuse.OK {
		return status
	}
	out.Attr, out.AttrValid = n.attr(), fuseconn.Forever
	return fuse.OK
}

func (s *server) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	n, status := s.inode(in.NodeId)
	if status != fuse.OK {
		return nil, status
	}
	if n.Mode&unix.S_IFMT != unix.S_IFLNK {
		return nil, fuse.EINVAL
	}
	return []byte(n.Target), fuse.OK
}

// Open, OpenDir and Flush are said not to exist. The kernel then opens and
// closes by itself and keeps what was read.
func (s *server) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

func (s *server) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	return fuse.ENOSYS
}

func (s *server) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

func (s *server) Release(<-chan struct{}, *fuse.ReleaseIn) {}

func (s *server) ReleaseDir(*fuse.ReleaseIn) {}

func (s *server) Forget(uint64, uint64) {}

func (s *server) GetXAttr(_ <-chan struct{}, in *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	n, status := s.inode(in.NodeId)
	if status != fuse.OK {
		return 0, status
	}
	for _, x := range n.Xattrs {
		if x.Name == name {
			return fill(dest, x.Value)
		}
	}
	return 0, fuse.ENOATTR
}

func (s *server) ListXAttr(_ <-chan struct{}, in *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	n, status := s.inode(in.NodeId)
	if status != fuse.OK {
		return 0, status
	}
	var list []byte
	for _, x := range n.Xattrs {
		list = append(append(list, x.Name...), 0)
	}
	return fill(dest, string(list))
}

// fill copies value to dest, or says that it does not fit.
func fill(dest []byte, value string) (uint32, fuse.Status) {
	if len(value) > len(dest) {
		return uint32(len(value)), fuse.Status(syscall.ERANGE)
	}
	return uint32(copy(dest, value)), fuse.OK
}

func (s *server) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	if !s.known.Load() {
		return fuse.EIO
	}
	const block = 4096
	out.Bsize, out.Frsize, out.NameLen = block, block, 255
	out.Blocks, out.Files = (s.size+block-1)/block, uint64(len(s.inodes)-1)
	return fuse.OK
}
