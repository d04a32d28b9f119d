package erofs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/erofs"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// acl is a valid POSIX ACL: owner, user 7, group, mask, other.
var acl = func() string {
	b := []byte{2, 0, 0, 0}
	for _, e := range [][3]uint32{{1, 6, math.MaxUint32}, {2, 4, 7}, {4, 4, math.MaxUint32}, {16, 4, math.MaxUint32}, {32, 0, math.MaxUint32}} {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return string(b)
}()

// everything is a tree with every kind of inode, at the limits of its fields.
func everything(s *store) *tree.Node {
	with := func(n *tree.Node, f func(n *tree.Node)) *tree.Node { f(n); return n }
	link := func(target string) *tree.Node {
		return &tree.Node{Mode: unix.S_IFLNK | 0o777, Nlink: 1, Target: target, Size: int64(len(target)), ModTime: 5}
	}
	special := func(mode uint32, rdev uint64) *tree.Node {
		return &tree.Node{Mode: mode, Nlink: 1, Rdev: rdev}
	}
	shared := with(s.file(1, "shared"), func(n *tree.Node) { n.Nlink = 4 }) // the fourth name is hidden
	var many []layer.Xattr
	for i := range 200 {
		many = append(many, layer.Xattr{Name: fmt.Sprintf("user.%03d", i), Value: strings.Repeat("x", i)})
	}
	return with(dir(
		tree.Dirent{Name: "!before-dot", Node: s.file(0, "a")},
		tree.Dirent{Name: ".-between", Node: s.file(0, "b")},
		tree.Dirent{Name: "..after", Node: s.file(0, "c")},
		tree.Dirent{Name: strings.Repeat("n", 255), Node: s.file(0, strings.Repeat("block", 1000))},
		tree.Dirent{Name: "bytes\xff\xfe\x01", Node: s.file(1, "not UTF-8")},
		tree.Dirent{Name: "empty", Node: &tree.Node{Mode: unix.S_IFREG, Nlink: 1}},
		tree.Dirent{Name: "full-block", Node: s.file(1, strings.Repeat("x", 512))},
		tree.Dirent{Name: "before-1970", Node: with(s.file(0, "old"), func(n *tree.Node) { n.ModTime, n.ModNsec = -1e9, 999_999_999 })},
		tree.Dirent{Name: "after-2038", Node: with(s.file(0, "new"), func(n *tree.Node) { n.ModTime, n.ModNsec = 1<<33, 1 })},
		tree.Dirent{Name: "large-ids", Node: with(s.file(0, "i"), func(n *tree.Node) { n.UID, n.GID, n.Mode = math.MaxUint32-1, 65536, unix.S_IFREG|0o7777 })},
		tree.Dirent{Name: "many-links", Node: with(s.file(0, "l"), func(n *tree.Node) { n.Nlink = 70000 })},
		tree.Dirent{Name: "char", Node: special(unix.S_IFCHR|0o600, unix.Mkdev(4095, 1<<20-1))},
		tree.Dirent{Name: "block", Node: special(unix.S_IFBLK|0o660, unix.Mkdev(8, 1))},
		tree.Dirent{Name: "fifo", Node: special(unix.S_IFIFO|0o666, 0)},
		tree.Dirent{Name: "link", Node: link("target")},
		tree.Dirent{Name: "link-long", Node: link(strings.Repeat("t", 4095))},
		tree.Dirent{Name: "link-block", Node: link(strings.Repeat("u", 512))},
		tree.Dirent{Name: "link-xattr", Node: with(link(strings.Repeat("v", 300)), func(n *tree.Node) {
			n.Xattrs = []layer.Xattr{{Name: "security.a", Value: strings.Repeat("w", 400)}}
		})},
		tree.Dirent{Name: "acl", Node: with(dir(), func(n *tree.Node) {
			n.Mode = unix.S_IFDIR | 0o3640
			n.Xattrs = []layer.Xattr{{Name: "system.posix_acl_access", Value: acl}, {Name: "system.posix_acl_default", Value: acl}}
		})},
		tree.Dirent{Name: "xattrs", Node: with(s.file(0, "x"), func(n *tree.Node) { n.Xattrs = many })},
		tree.Dirent{Name: "xattr-limits", Node: with(s.file(0, "x"), func(n *tree.Node) {
			n.Xattrs = []layer.Xattr{{Name: "security." + strings.Repeat("n", 246), Value: strings.Repeat("v", 65535)}, {Name: "user.empty"}, {Name: "user.overlay.opaque", Value: "y"}}
		})},
		tree.Dirent{Name: "capable", Node: with(s.file(0, "c"), func(n *tree.Node) {
			n.Xattrs = []layer.Xattr{{Name: "security.capability", Value: "\x01\x00\x00\x02\x00\x20\x00\x00" + strings.Repeat("\x00", 12)}}
		})},
		tree.Dirent{Name: "hole", Node: s.sparse(0, 1<<20, nil)},
		tree.Dirent{Name: "holes", Node: s.sparse(1, 3<<20+7, map[int64]string{512: strings.Repeat("x", 1024), 1 << 20: strings.Repeat("y", 4096), 3 << 20: "the end"})},
		tree.Dirent{Name: "holes-coarse", Node: with(s.sparse(0, 3<<20, map[int64]string{1 << 20: strings.Repeat("z", 1<<20)}), func(n *tree.Node) {
			n.Xattrs = []layer.Xattr{{Name: "user.a", Value: "b"}}
		})},
		tree.Dirent{Name: "hard1", Node: shared},
		tree.Dirent{Name: "hard2", Node: shared},
		tree.Dirent{Name: "sub", Node: dir(tree.Dirent{Name: "hard3", Node: shared}, tree.Dirent{Name: "nothing", Node: dir()})},
	), func(n *tree.Node) { n.Mode, n.UID, n.ModTime = unix.S_IFDIR|0o1750, 42, 77 })
}

func TestEverything(t *testing.T) {
	s := newStore(3) // the last layer is empty
	root := everything(s)
	img := write(t, root, s.devices())
	if again := write(t, root, s.devices()); !bytes.Equal(img, again) {
		t.Error("two images of one tree differ")
	}
	verify(t, root, s, readImage(openImage(t, img, s)))
	mnt := mount(t, img, s.files(t))
	verify(t, root, s, readMount(mnt))
	entries, err := os.ReadDir(mnt)
	if err != nil || len(entries) != 1 || entries[0].Name() != erofs.RootDir {
		t.Errorf("the image's root holds %v (%v), want only %q", entries, err, erofs.RootDir)
	}
}

func TestRandomTrees(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 2))
			s := newStore(1 + r.IntN(4))
			root := randomTree(r, s, r.IntN(1+r.IntN(1500)))
			img := write(t, root, s.devices())
			verify(t, root, s, readImage(openImage(t, img, s)))
			verify(t, root, s, readMount(mount(t, img, s.files(t))))
		})
	}
}

func TestHugeDirectory(t *testing.T) {
	s := newStore(1)
	children := make([]tree.Dirent, 100_000)
	for i := range children {
		children[i] = tree.Dirent{Name: fmt.Sprintf("%d-%x", i, i*i), Node: s.file(0, fmt.Sprint(i))}
	}
	root := dir(children...)
	img := write(t, root, s.devices())
	t.Logf("%d entries, image of %d bytes", len(children), len(img))
	verify(t, root, s, readMount(mount(t, img, s.files(t))))

	// go-erofs looks a directory up again for every path.
	read := readImage(openImage(t, img, s))
	for i := 0; i < len(children); i += 997 {
		got, _, err := read(erofs.RootDir + "/" + children[i].Name)
		if want := expect(children[i].Node, s); err != nil || got != want {
			t.Fatalf("%s: got %+v (%v), want %+v", children[i].Name, got, err, want)
		}
	}
}

func TestManyDevices(t *testing.T) {
	for _, n := range []int{0, 1, 127} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			s := newStore(n)
			var children []tree.Dirent
			for i := range n {
				children = append(children, tree.Dirent{Name: fmt.Sprint(i), Node: s.file(i, fmt.Sprint("in layer ", i))})
			}
			root := dir(children...)
			img := write(t, root, s.devices())
			verify(t, root, s, readImage(openImage(t, img, s)))
			verify(t, root, s, readMount(mount(t, img, s.files(t))))
		})
	}
}

// TestLargeFile reads the ends of files of more than 4 GiB on a sparse device.
func TestLargeFile(t *testing.T) {
	const size, off = 5<<30 + 3, 1 << 20
	const hugeSize = 1 << 40 // the largest there can be
	device := filepath.Join(t.TempDir(), "layer")
	f, err := os.Create(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at, mark := range map[int64]string{off: "first", off + size - 4: "last"} {
		if _, err := f.WriteAt([]byte(mark), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(off + size + 509); err != nil { // whole blocks
		t.Fatal(err)
	}
	root := dir(
		tree.Dirent{Name: "large", Node: &tree.Node{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: size, Off: off}},
		tree.Dirent{Name: "largest", Node: &tree.Node{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: hugeSize, Off: off}},
		tree.Dirent{Name: "at-the-end", Node: &tree.Node{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: 8 << 20, Off: (1<<32-1)*512 - 8<<20}},
	)
	devices := []erofs.Device{{Size: (1<<32 - 1) * 512}}
	img := write(t, root, devices)
	mnt := mount(t, img, []string{device})
	verify(t, root, nil, readMount(mnt))
	large, err := os.Open(filepath.Join(mnt, erofs.RootDir, "large"))
	if err != nil {
		t.Fatal(err)
	}
	defer large.Close()
	for at, want := range map[int64]string{0: "first", 2 << 30: "\x00\x00", size - 4: "last"} {
		got := make([]byte, len(want))
		if _, err := large.ReadAt(got, at); err != nil || string(got) != want {
			t.Errorf("at %d: got %q (%v), want %q", at, got, err, want)
		}
	}
}

// TestHugeHoles reads files of which there is almost nothing.
func TestHugeHoles(t *testing.T) {
	const gib, tib = 1 << 30, 1 << 40
	s := newStore(1)
	mib := strings.Repeat("m", 1<<20)
	root := dir(
		tree.Dirent{Name: "8 GiB", Node: s.sparse(0, 8*gib, map[int64]string{4096: strings.Repeat("a", 4096), 8*gib - 8192: strings.Repeat("b", 8192)})},
		tree.Dirent{Name: "1 TiB", Node: s.sparse(0, tib, map[int64]string{0: mib, tib / 2: mib, tib - 1<<20: mib})},
		tree.Dirent{Name: "4 TiB", Node: s.sparse(0, 4*tib+1, nil)},
		tree.Dirent{Name: "a byte behind 1 TiB", Node: s.sparse(0, tib+1, map[int64]string{tib: "c"})},
	)
	img := write(t, root, s.devices())
	if most := 27 << 20; len(img) > most { // 8 bytes per 4 KiB of 8 GiB, and per MiB of 1 TiB
		t.Errorf("image of %d bytes, want at most %d", len(img), most)
	}
	t.Logf("image of %d bytes", len(img))
	mnt := mount(t, img, s.files(t))
	verify(t, root, s, readMount(mnt))
	for _, c := range root.Children {
		f, err := os.Open(filepath.Join(mnt, erofs.RootDir, c.Name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		got := make([]byte, 4096)
		for _, x := range c.Node.Sparse {
			for at, want := range map[int64]string{x.Pos: string(s.data[0][x.Off:][:1]), x.Pos - 4096: "\x00", x.End() - 1: string(s.data[0][x.Off:][x.Len-1 : x.Len]), x.End(): "\x00"} {
				if at < 0 || at >= c.Node.Size {
					continue
				}
				if _, err := f.ReadAt(got[:1], at); err != nil || string(got[:1]) != want {
					t.Errorf("%s at %d: got %q (%v), want %q", c.Name, at, got[:1], err, want)
				}
			}
		}
		for at := int64(12345); at < c.Node.Size; at += c.Node.Size/50 + 1 {
			if n, err := f.ReadAt(got, at); n == 0 || err != nil && err != io.EOF || !inData(c.Node, at) && got[0] != 0 {
				t.Errorf("%s at %d: got %q (%v)", c.Name, at, got[:1], err)
			}
		}
	}
}

func inData(n *tree.Node, at int64) bool {
	for _, x := range n.Sparse {
		if x.Pos <= at && at < x.End() {
			return true
		}
	}
	return false
}

// TestDeepTree checks that depth costs no stack.
func TestDeepTree(t *testing.T) {
	root := dir()
	for range 500_000 {
		root = dir(tree.Dirent{Name: "d", Node: root})
	}
	if err := erofs.Write(io.Discard, root, nil); err != nil {
		t.Fatal(err)
	}
}

func TestUnsupported(t *testing.T) {
	reg := func(f func(n *tree.Node)) *tree.Node {
		n := &tree.Node{Mode: unix.S_IFREG, Nlink: 1, Size: 1}
		f(n)
		return n
	}
	xattr := func(name, value string) *tree.Node {
		return reg(func(n *tree.Node) { n.Xattrs = []layer.Xattr{{Name: name, Value: value}} })
	}
	sub := dir()
	one := []erofs.Device{{Size: 1<<41 - 512}}
	for name, c := range map[string]struct {
		node    *tree.Node
		devices []erofs.Device
	}{
		"size":             {reg(func(n *tree.Node) { n.Size = 1<<40 + 1 }), one},
		"negative size":    {reg(func(n *tree.Node) { n.Size = -1 }), one},
		"beyond device":    {reg(func(n *tree.Node) { n.Off = 1<<41 - 512 }), one},
		"negative offset":  {reg(func(n *tree.Node) { n.Off = -512 }), one},
		"overflow":         {reg(func(n *tree.Node) { n.Size, n.Off = 1<<40, math.MaxInt64&^511 }), one},
		"unaligned":        {reg(func(n *tree.Node) { n.Off = 513 }), one},
		"layer":            {reg(func(n *tree.Node) { n.Layer = 1 }), one},
		"negative layer":   {reg(func(n *tree.Node) { n.Layer = -1 }), one},
		"nanoseconds":      {reg(func(n *tree.Node) { n.ModNsec = 1e9 }), one},
		"mode":             {reg(func(n *tree.Node) { n.Mode = 0o644 }), one},
		"socket":           {reg(func(n *tree.Node) { n.Mode = unix.S_IFSOCK }), one},
		"rdev":             {&tree.Node{Mode: unix.S_IFCHR, Rdev: unix.Mkdev(4096, 0)}, one},
		"no target":        {&tree.Node{Mode: unix.S_IFLNK}, one},
		"long target":      {&tree.Node{Mode: unix.S_IFLNK, Target: strings.Repeat("t", 4096)}, one},
		"zero in target":   {&tree.Node{Mode: unix.S_IFLNK, Target: "a\x00b"}, one},
		"xattr prefix":     {xattr("foo.bar", ""), one},
		"xattr ACL suffix": {xattr("system.posix_acl_accessx", ""), one},
		"xattr value":      {xattr("user.a", strings.Repeat("v", 65536)), one},
		"xattr name":       {xattr("user."+strings.Repeat("n", 256), ""), one},
		"xattr total": {reg(func(n *tree.Node) {
			for i := range 5 {
				n.Xattrs = append(n.Xattrs, layer.Xattr{Name: fmt.Sprint("user.", i), Value: strings.Repeat("v", 65535)})
			}
		}), one},
		"holes in blocks": {reg(func(n *tree.Node) { n.Size, n.Sparse = 4096, []layer.Extent{{Pos: 100, Len: 512}} }), one},
		"holes unaligned": {reg(func(n *tree.Node) { n.Size, n.Sparse = 4096, []layer.Extent{{Pos: 512, Len: 512, Off: 100}} }), one},
		"holes too fine":  {reg(func(n *tree.Node) { n.Size, n.Sparse = 1<<40, []layer.Extent{{Pos: 512, Len: 512}} }), one},
		"holes beyond":    {reg(func(n *tree.Node) { n.Size, n.Sparse = 4096, []layer.Extent{{Pos: 512, Len: 512, Off: 1<<41 - 512}} }), one},
		"name":            {dir(tree.Dirent{Name: strings.Repeat("n", 256), Node: sub}), one},
		"empty name":      {dir(tree.Dirent{Name: "", Node: sub}), one},
		"slash":           {dir(tree.Dirent{Name: "a/b", Node: sub}), one},
		"zero in name":    {dir(tree.Dirent{Name: "a\x00", Node: sub}), one},
		"dot":             {dir(tree.Dirent{Name: ".", Node: sub}), one},
		"dotdot":          {dir(tree.Dirent{Name: "..", Node: sub}), one},
		"duplicate":       {dir(tree.Dirent{Name: "a", Node: dir()}, tree.Dirent{Name: "a", Node: dir()}), one},
		"shared dir":      {dir(tree.Dirent{Name: "a", Node: sub}, tree.Dirent{Name: "b", Node: sub}), one},
		"device size":     {dir(), []erofs.Device{{Size: (1<<32-1)*512 + 1}}},
		"device negative": {dir(), []erofs.Device{{Size: -1}}},
		"device tag":      {dir(), []erofs.Device{{Tag: strings.Repeat("t", 65)}}},
		"devices":         {dir(), make([]erofs.Device, 1<<16)},
	} {
		t.Run(name, func(t *testing.T) {
			var buf bytes.Buffer
			err := erofs.Write(&buf, dir(tree.Dirent{Name: "x", Node: c.node}), c.devices)
			if !errors.Is(err, erofs.ErrUnsupported) || buf.Len() > 0 {
				t.Errorf("got %v and %d bytes, want ErrUnsupported and none", err, buf.Len())
			}
		})
	}
}

func TestCycle(t *testing.T) {
	root := dir()
	root.Children = []tree.Dirent{{Name: "up", Node: root}}
	if err := erofs.Write(io.Discard, root, nil); !errors.Is(err, erofs.ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
}

func TestWriteError(t *testing.T) {
	r, w := io.Pipe()
	r.Close()
	if err := erofs.Write(w, dir(), nil); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("got %v, want %v", err, io.ErrClosedPipe)
	}
}

// FuzzWrite reads random trees back with go-erofs.
func FuzzWrite(f *testing.F) {
	for _, seed := range []uint64{0, 1, 99, math.MaxUint64} {
		f.Add(seed, uint16(seed*seed%700), int64(seed), uint32(seed), "name", "target", "user.x", []byte("value"), int64(0))
	}
	f.Add(uint64(5), uint16(3), int64(math.MinInt64), uint32(math.MaxUint32), "\xff", strings.Repeat("t", 600), "security.x", bytes.Repeat([]byte("v"), 600), int64(512))
	f.Fuzz(func(t *testing.T, seed uint64, nodes uint16, sec int64, id uint32, name, target, xattr string, value []byte, off int64) {
		r := rand.New(rand.NewPCG(seed, 3))
		s := newStore(1 + r.IntN(3))
		root := randomTree(r, s, int(nodes%1000))
		if strings.HasPrefix(xattr, "system.") {
			xattr = "user." + xattr // go-erofs spells ACLs in its own way
		}
		file := s.file(0, string(value))
		if off != 0 {
			file.Off = inflate.Out(off)
		}
		file.ModTime, file.UID, file.GID = sec, id, id>>1
		file.Xattrs = []layer.Xattr{{Name: xattr, Value: string(value)}}
		link := &tree.Node{Mode: unix.S_IFLNK | 0o777, Nlink: 1, Target: target, Size: int64(len(target))}
		root = dir(tree.Dirent{Name: name, Node: file}, tree.Dirent{Name: "link", Node: link}, tree.Dirent{Name: "tree", Node: root})
		var buf bytes.Buffer
		if err := erofs.Write(&buf, root, s.devices()); err != nil {
			if !errors.Is(err, erofs.ErrUnsupported) {
				t.Fatal(err)
			}
			return
		}
		verify(t, root, s, readImage(openImage(t, buf.Bytes(), s)))
	})
}

func BenchmarkWrite(b *testing.B) {
	root, s := benchTree(65_000)
	devices := s.devices()
	b.ReportAllocs()
	for b.Loop() {
		var buf bytes.Buffer
		if err := erofs.Write(&buf, root, devices); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(buf.Len()), "imagebytes")
	}
}

// benchTree has about as many files per directory as an image of a
// distribution, and times of their own for most.
func benchTree(n int) (*tree.Node, *store) {
	r := rand.New(rand.NewPCG(7, 7))
	s := newStore(4)
	for i := range s.data {
		s.data[i] = make([]byte, 512*n)
	}
	var top []tree.Dirent
	for n > 0 {
		var files []tree.Dirent
		for range 1 + r.IntN(20) {
			n--
			node := &tree.Node{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: 100, Layer: r.IntN(4), Off: inflate.Out(512 * r.IntN(1000)), ModTime: int64(r.IntN(1e9))}
			files = append(files, tree.Dirent{Name: fmt.Sprintf("file-%x.py", r.IntN(1e9)), Node: node})
		}
		top = append(top, tree.Dirent{Name: fmt.Sprintf("package-%d", n), Node: dir(files...)})
	}
	return dir(top...), s
}

func Example() {
	root := &tree.Node{Mode: 0o40755, Nlink: 2, Children: []tree.Dirent{
		{Name: "hello", Node: &tree.Node{Mode: 0o100644, Nlink: 1, Size: 6, Layer: 0, Off: 512}},
	}}
	var image bytes.Buffer
	err := erofs.Write(&image, root, []erofs.Device{{Tag: "the only layer", Size: 2048}})
	fmt.Println(image.Len(), "bytes,", err)
	// Output: 2048 bytes, <nil>
}
