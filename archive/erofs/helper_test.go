package erofs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/erofs"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
)

// store makes up the devices of a tree.
type store struct {
	data [][]byte
}

func newStore(layers int) *store { return &store{make([][]byte, layers)} }

// file adds content to a layer and returns a node for it.
func (s *store) file(layer int, content string) *tree.Node {
	s.pad(layer)
	n := &tree.Node{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: int64(len(content)), Layer: layer, Off: inflate.Out(len(s.data[layer]))}
	s.data[layer] = append(s.data[layer], content...)
	s.pad(layer)
	return n
}

func (s *store) pad(layer int) {
	for len(s.data[layer])%512 != 0 {
		s.data[layer] = append(s.data[layer], 0xee) // must never be seen
	}
}

func (s *store) devices() []erofs.Device {
	devices := make([]erofs.Device, len(s.data))
	for i, d := range s.data {
		devices[i] = erofs.Device{Tag: fmt.Sprintf("layer%d", i), Size: inflate.Out(len(d))}
	}
	return devices
}

func (s *store) content(n *tree.Node) string {
	data := make([]byte, n.Size)
	for _, x := range n.Extents() {
		copy(data[x.Pos:x.End()], s.data[n.Layer][x.Off:])
	}
	return string(data)
}

// sparse returns a node of a file with size bytes and data at positions, one
// piece after the other in the layer. Pieces are whole blocks, but for one at
// the file's end.
func (s *store) sparse(layerID int, size int64, pieces map[int64]string) *tree.Node {
	n := s.file(layerID, "")
	n.Size, n.Sparse = size, []layer.Extent{}
	for _, pos := range slices.Sorted(maps.Keys(pieces)) {
		n.Sparse = append(n.Sparse, layer.Extent{Pos: pos, Len: int64(len(pieces[pos])), Off: inflate.Out(len(s.data[layerID]))})
		s.data[layerID] = append(s.data[layerID], pieces[pos]...)
	}
	s.pad(layerID)
	return n
}

func dir(children ...tree.Dirent) *tree.Node {
	slices.SortFunc(children, func(a, b tree.Dirent) int { return strings.Compare(a.Name, b.Name) })
	return &tree.Node{Mode: unix.S_IFDIR | 0o755, Nlink: 2, Children: children}
}

func write(tb testing.TB, root *tree.Node, devices []erofs.Device) []byte {
	tb.Helper()
	var buf bytes.Buffer
	if err := erofs.Write(&buf, root, devices); err != nil {
		tb.Fatal(err)
	}
	if buf.Len()%512 != 0 {
		tb.Errorf("image of %d bytes, not whole blocks", buf.Len())
	}
	return buf.Bytes()
}

// image is what the tests need of go-erofs' file system.
type image interface {
	fs.ReadDirFS
	ReadFile(name string) ([]byte, error)
	ReadLink(name string) (string, error)
	Lstat(name string) (fs.FileInfo, error)
}

func openImage(tb testing.TB, img []byte, s *store) image {
	tb.Helper()
	var devices []io.ReaderAt
	for _, d := range s.data {
		devices = append(devices, bytes.NewReader(d))
	}
	f, err := goerofs.Open(bytes.NewReader(img), goerofs.WithExtraDevices(devices...))
	if err != nil {
		tb.Fatal(err)
	}
	return f.(image)
}

// goMode is a mode as io/fs has it.
func goMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		m |= fs.ModeDir
	case unix.S_IFLNK:
		m |= fs.ModeSymlink
	case unix.S_IFIFO:
		m |= fs.ModeNamedPipe
	case unix.S_IFCHR:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFBLK:
		m |= fs.ModeDevice
	}
	for bit, flag := range map[uint32]fs.FileMode{unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky} {
		if mode&bit != 0 {
			m |= flag
		}
	}
	return m
}

// seen is a tree as a reader shows it, in a common form.
type seen struct {
	Mode                         fs.FileMode
	UID, GID, Nlink, Rdev, MNsec uint32
	MSec                         int64
	Size                         int64 // regular files and symlinks
	Target, Data, Xattrs         string
	Children                     string
}

// reader shows a path of an image and says which inode it is.
type reader func(path string) (seen, uint64, error)

// verify compares every path of a tree with what a reader shows. Contents of
// files larger than a few MiB are left to the caller.
func verify(tb testing.TB, root *tree.Node, s *store, read reader) {
	tb.Helper()
	type item struct {
		path string
		node *tree.Node
	}
	inodes := map[*tree.Node]uint64{}
	nodes := map[uint64]*tree.Node{}
	todo := []item{{erofs.RootDir, root}}
	for len(todo) > 0 && !tb.Failed() {
		it := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		got, ino, err := read(it.path)
		if err != nil {
			tb.Errorf("%q: %v", it.path, err)
			continue
		}
		if want := expect(it.node, s); got != want {
			tb.Errorf("%q:\n\tgot  %.600v\n\twant %.600v", it.path, got, want)
		}
		if prev, ok := inodes[it.node]; ok && prev != ino {
			tb.Errorf("%q: a hard link has inode %d and %d", it.path, prev, ino)
		}
		if prev, ok := nodes[ino]; ok && prev != it.node {
			tb.Errorf("%q: inode %d is another file's too", it.path, ino)
		}
		inodes[it.node], nodes[ino] = ino, it.node
		for _, c := range it.node.Children {
			todo = append(todo, item{it.path + "/" + c.Name, c.Node})
		}
	}
}

// expect is what a node should look like.
func expect(n *tree.Node, s *store) seen {
	e := seen{
		Mode: goMode(n.Mode), UID: n.UID, GID: n.GID, Nlink: n.Nlink, Rdev: uint32(n.Rdev),
		MSec: n.ModTime, MNsec: n.ModNsec, Target: n.Target, Xattrs: xattrString(n.Xattrs),
	}
	var names strings.Builder
	for _, c := range n.Children {
		fmt.Fprintf(&names, "%q ", c.Name)
	}
	e.Children = names.String()
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Size = n.Size
		if n.Size > 0 && n.Size < maxCompared {
			e.Data = s.content(n)
		}
	case unix.S_IFLNK:
		e.Size = int64(len(n.Target))
	}
	return e
}

const maxCompared = 4 << 20

func xattrString(xattrs []layer.Xattr) string {
	var b strings.Builder
	sorted := slices.SortedFunc(slices.Values(xattrs), func(a, b layer.Xattr) int { return strings.Compare(a.Name, b.Name) })
	for _, x := range sorted {
		fmt.Fprintf(&b, "%s=%q ", x.Name, x.Value)
	}
	return b.String()
}

// readImage reads with go-erofs.
func readImage(img image) reader {
	return func(p string) (seen, uint64, error) {
		fi, err := img.Lstat(p)
		if err != nil {
			return seen{}, 0, err
		}
		st := fi.Sys().(*goerofs.Stat)
		s := seen{Mode: st.Mode, UID: st.UID, GID: st.GID, Nlink: uint32(st.Nlink), Rdev: st.Rdev, MSec: int64(st.Mtime), MNsec: st.MtimeNs}
		var xattrs []layer.Xattr
		for k, v := range st.Xattrs {
			if strings.HasPrefix(k, "system.") {
				k = strings.TrimSuffix(k, ".") // go-erofs' spelling of the ACLs' names
			}
			xattrs = append(xattrs, layer.Xattr{Name: k, Value: v})
		}
		s.Xattrs = xattrString(xattrs)
		switch {
		case fi.Mode().IsRegular():
			if s.Size = st.Size; s.Size < maxCompared {
				var data []byte
				data, err = img.ReadFile(p)
				s.Data = string(data)
			}
		case fi.Mode()&fs.ModeSymlink != 0:
			s.Size = st.Size
			s.Target, err = img.ReadLink(p)
		case fi.IsDir():
			var entries []fs.DirEntry
			entries, err = img.ReadDir(p)
			var names strings.Builder
			for _, e := range entries {
				fmt.Fprintf(&names, "%q ", e.Name())
			}
			s.Children = names.String()
		}
		return s, uint64(st.Ino), err
	}
}

// readMount reads with the kernel.
func readMount(mnt string) reader {
	return func(p string) (seen, uint64, error) {
		p = mnt + "/" + p
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return seen{}, 0, err
		}
		s := seen{Mode: goMode(st.Mode), UID: st.Uid, GID: st.Gid, Nlink: uint32(st.Nlink), Rdev: uint32(st.Rdev), MSec: st.Mtim.Sec, MNsec: uint32(st.Mtim.Nsec)}
		xattrs, err := readXattrs(p)
		if err != nil {
			return seen{}, 0, err
		}
		s.Xattrs = xattrString(xattrs)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			if s.Size = st.Size; s.Size < maxCompared {
				var data []byte
				data, err = os.ReadFile(p)
				s.Data = string(data)
			}
		case unix.S_IFLNK:
			s.Size = st.Size
			s.Target, err = os.Readlink(p)
		case unix.S_IFDIR:
			var names strings.Builder
			var entries []os.DirEntry
			entries, err = os.ReadDir(p)
			for _, e := range entries {
				fmt.Fprintf(&names, "%q ", e.Name())
			}
			s.Children = names.String()
		}
		return s, st.Ino, err
	}
}

func readXattrs(p string) ([]layer.Xattr, error) {
	n, err := unix.Llistxattr(p, nil)
	if n == 0 || err != nil {
		return nil, err
	}
	list := make([]byte, n)
	if n, err = unix.Llistxattr(p, list); err != nil {
		return nil, err
	}
	var xattrs []layer.Xattr
	buf := make([]byte, 64<<10)
	for _, name := range strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(p, name, buf)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		xattrs = append(xattrs, layer.Xattr{Name: name, Value: string(buf[:n])})
	}
	return xattrs, nil
}

// mount mounts an image over devices with the kernel, until the test ends.
func mount(tb testing.TB, img []byte, devices []string) string {
	tb.Helper()
	need.Root(tb)
	dir := tb.TempDir()
	file, mnt := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	if err := os.WriteFile(file, img, 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Mkdir(mnt, 0o755); err != nil {
		tb.Fatal(err)
	}
	if err := attach(file, devices, mnt); err != nil {
		tb.Fatalf("mount of %d devices: %v", len(devices), err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			tb.Errorf("unmount: %v", err)
			_ = unix.Unmount(mnt, unix.MNT_DETACH)
		}
	})
	return mnt
}

func attach(file string, devices []string, mnt string) (err error) {
	fsfd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fsfd)
	defer func() {
		if err == nil {
			return
		}
		buf := make([]byte, 1024)
		for {
			n, rerr := unix.Read(fsfd, buf)
			if rerr != nil {
				return
			}
			err = errors.Join(err, errors.New(string(buf[:n])))
		}
	}()
	if err := unix.FsconfigSetString(fsfd, "source", file); err != nil {
		return err
	}
	for _, d := range devices {
		if err := unix.FsconfigSetString(fsfd, "device", d); err != nil {
			return err
		}
	}
	if err := unix.FsconfigSetFlag(fsfd, "ro"); err != nil {
		return err
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return err
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(mfd)
	return unix.MoveMount(mfd, "", unix.AT_FDCWD, mnt, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// files writes a store's layers to files.
func (s *store) files(tb testing.TB) []string {
	tb.Helper()
	dir := tb.TempDir()
	var paths []string
	for i, d := range s.data {
		p := filepath.Join(dir, fmt.Sprintf("layer%d", i))
		if err := os.WriteFile(p, d, 0o600); err != nil {
			tb.Fatal(err)
		}
		paths = append(paths, p)
	}
	return paths
}

// randomTree makes a tree of n nodes, some of them hard links.
func randomTree(r *rand.Rand, s *store, n int) *tree.Node {
	root := dir()
	dirs := []*tree.Node{root}
	var linkable []*tree.Node
	for i := range n {
		parent := dirs[r.IntN(len(dirs))]
		var node *tree.Node
		if len(linkable) > 0 && r.IntN(12) == 0 {
			node = linkable[r.IntN(len(linkable))]
			node.Nlink++
		} else {
			node = randomNode(r, s)
			switch {
			case node.Mode&unix.S_IFMT == unix.S_IFDIR:
				dirs = append(dirs, node)
			default:
				linkable = append(linkable, node)
			}
		}
		parent.Children = append(parent.Children, tree.Dirent{Name: randomName(r, i), Node: node})
	}
	for _, d := range dirs {
		slices.SortFunc(d.Children, func(a, b tree.Dirent) int { return strings.Compare(a.Name, b.Name) })
	}
	return root
}

// randomName is unique by its number; some sort before "." and "..".
func randomName(r *rand.Rand, i int) string {
	name := fmt.Sprintf("%c%d", "!.-a~\xff"[r.IntN(6)], i)
	if r.IntN(4) == 0 {
		name += strings.Repeat("n", r.IntN(256-len(name)))
	}
	return name
}

func randomSparse(r *rand.Rand, s *store) *tree.Node {
	pieces, pos := map[int64]string{}, int64(0)
	unit := 512 << r.IntN(8)
	for range r.IntN(5) {
		pos += int64((1 + r.IntN(20)) * unit)
		pieces[pos] = strings.Repeat("piece of data...", (1+r.IntN(9))*unit/16)
		pos += int64(len(pieces[pos]))
	}
	pos += int64((1 + r.IntN(20)) * unit)
	if r.IntN(2) == 0 {
		pieces[pos] = strings.Repeat("e", 1+r.IntN(2000))
		pos += int64(len(pieces[pos]))
	}
	return s.sparse(r.IntN(len(s.data)), pos, pieces)
}

func randomNode(r *rand.Rand, s *store) *tree.Node {
	n := &tree.Node{Nlink: 1}
	switch r.IntN(9) {
	case 8:
		n = randomSparse(r, s)
	case 0, 1:
		n = dir()
	case 2, 3, 4:
		n = s.file(r.IntN(len(s.data)), strings.Repeat("data", r.IntN(700)))
	case 5:
		n.Mode = unix.S_IFLNK
		n.Target = strings.Repeat("t", 1+r.IntN(1+r.IntN(4095)))
		n.Size = int64(len(n.Target))
	case 6:
		n.Mode = []uint32{unix.S_IFCHR, unix.S_IFBLK}[r.IntN(2)]
		n.Rdev = unix.Mkdev(uint32(r.IntN(4096)), uint32(r.IntN(1<<20)))
	default:
		n.Mode = unix.S_IFIFO
	}
	n.Mode = n.Mode&unix.S_IFMT | uint32(r.IntN(0o10000))
	if n.Mode&unix.S_IFMT == unix.S_IFLNK {
		n.Mode |= 0o777
	}
	if r.IntN(2) == 0 { // else the epoch, and a compact inode
		n.ModTime, n.ModNsec = r.Int64N(1<<36)-1<<35, uint32(r.IntN(1e9))
	}
	n.UID, n.GID = uint32(r.IntN(1<<17)), uint32(r.IntN(1<<17))
	if r.IntN(2) == 0 {
		n.UID, n.GID = 0, uint32(r.IntN(1000))
	}
	for i := 0; r.IntN(3) == 0; i++ {
		n.Xattrs = append(n.Xattrs, layer.Xattr{Name: fmt.Sprintf("security.x%02d", i), Value: strings.Repeat("v", r.IntN(1+r.IntN(3000)))})
	}
	return n
}
