package treefs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/erofs"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/snapshotter/fuseconn"
)

// mounted mounts a tree until the test ends and returns the directory that it is.
func mounted(t *testing.T, root *tree.Node, layers ...Layer) string {
	t.Helper()
	target := t.TempDir()
	require.NoError(t, Mount(t.Context(), target, root, layers, Keep{}), "this test needs root and /dev/fuse")
	t.Cleanup(func() { require.NoError(t, unix.Unmount(target, 0)) })
	return filepath.Join(target, erofs.RootDir)
}

func dir(children ...tree.Dirent) *tree.Node {
	slices.SortFunc(children, func(a, b tree.Dirent) int { return strings.Compare(a.Name, b.Name) })
	return &tree.Node{Mode: unix.S_IFDIR | 0o755, Nlink: 2, Children: children}
}

// open opens a file of this process's own file system.
func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := testutil.Open(path)
	require.NoError(t, err, path)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func stat(t *testing.T, path string) (st unix.Stat_t) {
	t.Helper()
	require.NoError(t, unix.Lstat(path, &st), path)
	return st
}

func TestAttributes(t *testing.T) {
	linked := &tree.Node{Mode: unix.S_IFREG | 0o600, Nlink: 2, ModTime: 1}
	nodes := map[string]*tree.Node{
		"file":   {Mode: unix.S_IFREG | 0o6755, Nlink: 1, UID: 1, GID: 4000000000, Size: 5, ModTime: -5, ModNsec: 7},
		"huge":   {Mode: unix.S_IFREG | 0o400, Nlink: 1, Size: 1 << 40, ModTime: 1 << 33, ModNsec: 999999999},
		"link":   {Mode: unix.S_IFLNK | 0o777, Nlink: 1, UID: 3, Target: "../somewhere", Size: 12},
		"char":   {Mode: unix.S_IFCHR | 0o666, Nlink: 1, Rdev: unix.Mkdev(1, 3)},
		"block":  {Mode: unix.S_IFBLK | 0o660, Nlink: 1, Rdev: unix.Mkdev(4095, 1<<20-1)},
		"fifo":   {Mode: unix.S_IFIFO | 0o622, Nlink: 1},
		"sticky": {Mode: unix.S_IFDIR | 0o3777, Nlink: 2, GID: 9},
		"one":    linked,
		"two":    linked,
	}
	var children []tree.Dirent
	for name, n := range nodes {
		children = append(children, tree.Dirent{Name: name, Node: n})
	}
	root := mounted(t, dir(children...), testutil.Stream{Reader: bytes.NewReader([]byte("hello"))})
	seen := map[uint64]string{}
	for name, n := range nodes {
		st := stat(t, filepath.Join(root, name))
		got := tree.Node{Mode: st.Mode, Nlink: uint32(st.Nlink), UID: st.Uid, GID: st.Gid, Size: st.Size, Rdev: st.Rdev,
			ModTime: st.Mtim.Sec, ModNsec: uint32(st.Mtim.Nsec), Target: n.Target}
		require.Equal(t, *n, got, name)
		require.Equal(t, st.Mtim, st.Ctim)
		if other, ok := seen[st.Ino]; ok {
			require.ElementsMatch(t, []string{"one", "two"}, []string{name, other})
		}
		seen[st.Ino] = name
	}
	require.Len(t, seen, len(nodes)-1)
	target, err := os.Readlink(filepath.Join(root, "link"))
	require.NoError(t, err)
	require.Equal(t, "../somewhere", target)
	require.ErrorIs(t, unix.Lstat(filepath.Join(root, "missing"), &unix.Stat_t{}), unix.ENOENT)
	require.ErrorIs(t, unix.Mkdir(filepath.Join(root, "new"), 0o755), unix.EROFS)
	var fs unix.Statfs_t
	require.NoError(t, unix.Statfs(root, &fs))
	require.EqualValues(t, 255, fs.Namelen)
	require.EqualValues(t, 10, fs.Files, "two of the nodes are one, and there are two directories above")
	require.Equal(t, uint64(1<<40/4096+1), fs.Blocks)
}

func TestXattrs(t *testing.T) {
	large := strings.Repeat("v", 60000)
	n := &tree.Node{Mode: unix.S_IFREG | 0o600, Nlink: 1, Xattrs: []layer.Xattr{
		{Name: "security.capability", Value: "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{Name: "user.empty", Value: ""}, {Name: "user.large", Value: large},
	}}
	root := mounted(t, dir(tree.Dirent{Name: "file", Node: n}, tree.Dirent{Name: "none", Node: &tree.Node{Mode: unix.S_IFREG, Nlink: 1}}))
	file, none := filepath.Join(root, "file"), filepath.Join(root, "none")
	buf := make([]byte, 1<<16)
	for _, x := range n.Xattrs {
		size, err := unix.Lgetxattr(file, x.Name, nil)
		require.NoError(t, err)
		require.Equal(t, len(x.Value), size)
		size, err = unix.Lgetxattr(file, x.Name, buf)
		require.NoError(t, err)
		require.Equal(t, x.Value, string(buf[:size]))
	}
	_, err := unix.Lgetxattr(file, "user.large", buf[:100])
	require.ErrorIs(t, err, unix.ERANGE)
	_, err = unix.Lgetxattr(file, "user.missing", buf)
	require.ErrorIs(t, err, unix.ENODATA)
	size, err := unix.Llistxattr(file, buf)
	require.NoError(t, err)
	require.Equal(t, "security.capability\x00user.empty\x00user.large\x00", string(buf[:size]))
	size, err = unix.Llistxattr(none, buf)
	require.NoError(t, err)
	require.Zero(t, size)
}

// TestContents reads files that lie side by side in two layers, in pieces and
// at once.
func TestContents(t *testing.T) {
	var data [2][]byte
	var children []tree.Dirent
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 40 {
		l := i % 2
		content := make([]byte, random.IntN(300<<10))
		for j := range content {
			content[j] = byte(random.Uint32())
		}
		children = append(children, tree.Dirent{Name: fmt.Sprint(i), Node: &tree.Node{
			Mode: unix.S_IFREG | 0o644, Nlink: 1, Layer: l, Off: inflate.Out(len(data[l])), Size: int64(len(content)),
		}})
		data[l] = append(append(data[l], content...), "padding"...)
	}
	root := mounted(t, dir(children...), testutil.Stream{Reader: bytes.NewReader(data[0])}, testutil.Stream{Reader: bytes.NewReader(data[1])})
	var wg sync.WaitGroup
	for i, c := range children {
		f := open(t, filepath.Join(root, c.Name))
		want := data[c.Node.Layer][c.Node.Off:][:c.Node.Size]
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 3))
			for range 20 {
				off, p := r.Int64N(c.Node.Size+1), make([]byte, r.IntN(100<<10)+1)
				n, err := f.ReadAt(p, off)
				if err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(p[:n], want[off:off+int64(n)]) {
					t.Errorf("file %d at %d: %d bytes, %v", i, off, n, err)
				}
			}
			if all, err := io.ReadAll(f); err != nil || !bytes.Equal(all, want) {
				t.Errorf("file %d: %d bytes instead of %d, %v", i, len(all), len(want), err)
			}
		})
	}
	wg.Wait()
}

// TestHoles reads a file with holes at its start, between its data and at its
// end, and one that is all hole, from everywhere.
func TestHoles(t *testing.T) {
	data := bytes.Repeat([]byte("data"), 1024)
	holed := &tree.Node{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: 20_000, Sparse: []layer.Extent{
		{Pos: 512, Len: 1024, Off: 2048}, {Pos: 1536, Len: 512, Off: 512}, {Pos: 8192, Len: 1000, Off: 0},
	}}
	hole := &tree.Node{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: 9000, Sparse: []layer.Extent{}}
	root := mounted(t, dir(tree.Dirent{Name: "hole", Node: hole}, tree.Dirent{Name: "holed", Node: holed}), testutil.Stream{Reader: bytes.NewReader(data)})
	for name, n := range map[string]*tree.Node{"holed": holed, "hole": hole} {
		want := make([]byte, n.Size)
		for _, x := range n.Sparse {
			copy(want[x.Pos:x.End()], data[x.Off:])
		}
		s := &server{layers: []Layer{testutil.Stream{Reader: bytes.NewReader(data)}}}
		for off := int64(0); off < n.Size; off += 97 {
			for _, size := range []int64{1, 100, 4096, n.Size} {
				p := bytes.Repeat([]byte{0xff}, int(min(size, n.Size-off)))
				require.NoError(t, s.readFile(n, p, off))
				require.True(t, bytes.Equal(want[off:off+int64(len(p))], p), "%s: %d bytes at %d", name, len(p), off)
			}
		}
		got, err := io.ReadAll(open(t, filepath.Join(root, name)))
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, got), name)
	}
}

// TestDirectories lists an empty directory and one whose list takes many
// requests, whole and from every place in it.
func TestDirectories(t *testing.T) {
	var children []tree.Dirent
	for i := range 5000 {
		children = append(children, tree.Dirent{Name: fmt.Sprintf("%s%d", strings.Repeat("n", i%200), i), Node: &tree.Node{Mode: unix.S_IFREG, Nlink: 1}})
	}
	large := dir(children...)
	root := mounted(t, dir(tree.Dirent{Name: "empty", Node: dir()}, tree.Dirent{Name: "large", Node: large}))
	names := func(f *os.File) []string {
		names, err := f.Readdirnames(0)
		require.NoError(t, err)
		return names
	}
	require.Empty(t, names(open(t, filepath.Join(root, "empty"))))
	f := open(t, filepath.Join(root, "large"))
	got := names(f)
	require.Len(t, got, len(children))
	for i, c := range large.Children {
		require.Equal(t, c.Name, got[i], "in the order of the tree")
	}
	for range 100 {
		i := rand.IntN(len(children))
		_, err := f.Seek(int64(i)+2, io.SeekStart) // behind "." and ".."
		require.NoError(t, err)
		require.Equal(t, got[i:], names(f), "from entry %d", i)
	}
	require.NotEqual(t, stat(t, filepath.Join(root, "large")).Ino, stat(t, root).Ino)
	require.Equal(t, stat(t, root).Ino, stat(t, filepath.Join(root, "large", "..")).Ino)
}

// TestReadErrors fails a layer for a while, and leaves one out.
func TestReadErrors(t *testing.T) {
	var fail atomic.Bool
	fail.Store(true)
	broken := testutil.Stream{Reader: bytes.NewReader([]byte("content and more")), Before: func() error {
		if fail.Load() {
			return errors.New("registry is away")
		}
		return nil
	}}
	file := func(layer int, off inflate.Out) *tree.Node {
		return &tree.Node{Mode: unix.S_IFREG | 0o644, Nlink: 1, Layer: layer, Off: off, Size: 7}
	}
	root := mounted(t, dir(tree.Dirent{Name: "file", Node: file(0, 0)}, tree.Dirent{Name: "beyond", Node: file(0, 12)},
		tree.Dirent{Name: "nowhere", Node: file(1, 0)}), broken)
	f := open(t, filepath.Join(root, "file"))
	_, err := f.ReadAt(make([]byte, 7), 0)
	require.ErrorIs(t, err, unix.EIO)
	fail.Store(false)
	got := make([]byte, 7)
	_, err = f.ReadAt(got, 0)
	require.NoError(t, err, "errors are not remembered")
	require.Equal(t, "content", string(got))
	for _, name := range []string{"beyond", "nowhere"} {
		_, err := open(t, filepath.Join(root, name)).ReadAt(got, 0)
		require.ErrorIs(t, err, unix.EIO, name)
	}
}

func TestRefusedTrees(t *testing.T) {
	twice := dir()
	err := Mount(t.Context(), t.TempDir(), dir(tree.Dirent{Name: "a", Node: twice}, tree.Dirent{Name: "b", Node: twice}), nil, Keep{})
	require.ErrorContains(t, err, "two names")
	require.ErrorIs(t, Mount(t.Context(), "/nowhere", dir(), nil, Keep{}), unix.ENOENT)
}

// TestKernelMayKeepAll looks at the answers that save requests later on.
func TestKernelMayKeepAll(t *testing.T) {
	var s server
	require.NoError(t, s.know(dir(tree.Dirent{Name: "a", Node: dir()}, tree.Dirent{Name: "b", Node: &tree.Node{Mode: unix.S_IFREG, Nlink: 1}}), nil))
	var entry fuse.EntryOut
	const root = 2
	require.Equal(t, fuse.OK, s.Lookup(nil, &fuse.InHeader{NodeId: root}, "missing", &entry))
	require.Zero(t, entry.NodeId)
	require.EqualValues(t, fuseconn.Forever, entry.EntryValid, "that there is no such name")
	var attr fuse.AttrOut
	require.Equal(t, fuse.OK, s.GetAttr(nil, &fuse.GetAttrIn{InHeader: fuse.InHeader{NodeId: root}}, &attr))
	require.EqualValues(t, fuseconn.Forever, attr.AttrValid)

	list := fuse.NewDirEntryList(make([]byte, 4096), 0)
	require.Equal(t, fuse.OK, s.ReadDirPlus(nil, &fuse.ReadIn{InHeader: fuse.InHeader{NodeId: root}}, list))
	names, entries, err := fuse.ParseDirLookupEntries(list.Bytes())
	require.NoError(t, err)
	require.Len(t, entries, 4)
	for i, name := range []string{".", "..", "a", "b"} {
		require.Equal(t, name, names[i].Name)
		if i < 2 {
			require.Zero(t, entries[i].NodeId, "the kernel would take them for names of their own")
			continue
		}
		require.Equal(t, names[i].Ino, entries[i].NodeId)
		require.EqualValues(t, fuseconn.Forever, entries[i].EntryValid)
		require.EqualValues(t, fuseconn.Forever, entries[i].AttrValid)
	}
	// After these the kernel never asks again.
	require.Equal(t, fuse.ENOSYS, s.Open(nil, nil, nil))
	require.Equal(t, fuse.ENOSYS, s.OpenDir(nil, nil, nil))
	require.Equal(t, fuse.ENOSYS, s.Flush(nil, nil))
}

// TestUnknown has everything be an input/output error until the tree is known: nothing must be taken for what does not
// exist.
func TestUnknown(t *testing.T) {
	s := newServer(t.Context())
	in := fuse.InHeader{NodeId: fuse.FUSE_ROOT_ID}
	answers := func() map[string]fuse.Status {
		_, readlink := s.Readlink(nil, &in)
		_, getxattr := s.GetXAttr(nil, &in, "user.a", nil)
		_, listxattr := s.ListXAttr(nil, &in, nil)
		_, read := s.Read(nil, &fuse.ReadIn{InHeader: in}, make([]byte, 1))
		return map[string]fuse.Status{
			"lookup":      s.Lookup(nil, &in, "root", &fuse.EntryOut{}),
			"getattr":     s.GetAttr(nil, &fuse.GetAttrIn{InHeader: in}, &fuse.AttrOut{}),
			"readdir":     s.ReadDir(nil, &fuse.ReadIn{InHeader: in}, fuse.NewDirEntryList(make([]byte, 4096), 0)),
			"readdirplus": s.ReadDirPlus(nil, &fuse.ReadIn{InHeader: in}, fuse.NewDirEntryList(make([]byte, 4096), 0)),
			"statfs":      s.StatFs(nil, &in, &fuse.StatfsOut{}),
			"readlink":    readlink, "getxattr": getxattr, "listxattr": listxattr, "read": read,
		}
	}
	for name, status := range answers() {
		require.Equal(t, fuse.EIO, status, name)
	}
	require.NoError(t, s.know(dir(), nil))
	require.NoError(t, s.know(nil, nil), "it is known")
	for name, status := range answers() {
		require.NotEqual(t, fuse.EIO, status, name)
	}
}
