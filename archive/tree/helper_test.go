package tree_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	mounts "github.com/beam-cloud/containerd-clip/snapshotter/root"
)

func TestMain(m *testing.M) {
	if err := log.SetLevel("error"); err != nil { // containerd warns of every xattr it ignores
		panic(err)
	}
	os.Exit(m.Run())
}

// file is a tar entry with its content.
type file struct {
	tar.Header
	Data   string
	Sparse *testimage.Sparse // written instead, if set
}

// makeTar writes entries as a tar stream.
func makeTar(tb testing.TB, files []file) []byte {
	tb.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range files {
		if f.Sparse != nil {
			if err := tw.Flush(); err != nil {
				tb.Fatal(err)
			}
			buf.Write(f.Sparse.Bytes(tb))
			continue
		}
		h := f.Header
		h.Size = int64(len(f.Data))
		if h.ModTime.Nanosecond() != 0 {
			h.Format = tar.FormatPAX
		}
		if err := tw.WriteHeader(&h); err != nil {
			tb.Fatalf("%q: %v", h.Name, err)
		}
		if _, err := io.WriteString(tw, f.Data); err != nil {
			tb.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

// countingReader counts what tar.Reader has consumed, which is the offset of
// an entry's content once Next has returned.
type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// indexTar reads a tar stream's entries, as the product does. Some owners it
// leaves to an ordinary unpack; Merge knows them all the same.
func indexTar(tb testing.TB, data []byte) *layer.Index {
	tb.Helper()
	l, err := layer.Build(tb.Context(), bytes.NewReader(data), testimage.Descriptor("", data), layer.Options{})
	if err == nil {
		return l
	}
	if !errors.Is(err, layer.ErrUnsupported) || !strings.Contains(err.Error(), ": owner ") {
		tb.Fatal(err)
	}
	return listTar(tb, data)
}

func listTar(tb testing.TB, data []byte) *layer.Index {
	tb.Helper()
	c := &countingReader{r: bytes.NewReader(data)}
	tr := tar.NewReader(c)
	l := &layer.Index{DiffID: digest.FromBytes(data), OutSize: inflate.Out(len(data))}
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return l
		}
		if err != nil {
			tb.Fatal(err)
		}
		l.Entries = append(l.Entries, toEntry(h, c.n))
	}
}

func toEntry(h *tar.Header, off int64) layer.Entry {
	e := layer.Entry{
		Name: h.Name, Link: h.Linkname, Type: h.Typeflag, Mode: uint32(h.Mode & 0o7777),
		UID: uint32(h.Uid), GID: uint32(h.Gid), DevMajor: uint32(h.Devmajor), DevMinor: uint32(h.Devminor),
		ModTime: h.ModTime.Unix(), ModNsec: uint32(h.ModTime.Nanosecond()),
	}
	if h.Typeflag == tar.TypeReg {
		e.Size, e.Off = h.Size, inflate.Out(off)
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			e.Xattrs = append(e.Xattrs, layer.Xattr{Name: name, Value: v})
		}
	}
	slices.SortFunc(e.Xattrs, func(a, b layer.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return e
}

// attrs is what stat(2) and friends say of one path. Same is the first path,
// in bytewise order, with the same inode.
type attrs struct {
	Mode, UID, GID, Nlink uint32
	Rdev                  uint64
	Sec                   int64
	Nsec                  uint32
	Access                string // the access time, if it is another one than that of the modification
	Target, Data, Xattrs  string
	Same                  string
}

// now stands for a modification time that containerd leaves to the clock.
const now = -1

func xattrString(m map[string]string) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(m)) {
		fmt.Fprintf(&b, "%s=%q ", k, m[k])
	}
	return b.String()
}

// flatten lists a merged tree by path. tars are the layers' streams.
func flatten(tb testing.TB, root *tree.Node, tars [][]byte) map[string]attrs {
	tb.Helper()
	out := map[string]attrs{}
	first := map[*tree.Node]string{}
	var walk func(p string, n *tree.Node)
	walk = func(p string, n *tree.Node) {
		a := attrs{
			Mode: n.Mode, UID: n.UID, GID: n.GID, Nlink: n.Nlink, Rdev: n.Rdev,
			Sec: n.ModTime, Nsec: n.ModNsec, Target: n.Target,
		}
		m := map[string]string{}
		for _, x := range n.Xattrs {
			m[x.Name] = x.Value
		}
		if len(m) != len(n.Xattrs) || !slices.IsSortedFunc(n.Xattrs, func(a, b layer.Xattr) int { return strings.Compare(a.Name, b.Name) }) {
			tb.Errorf("%s: xattrs are not sorted and unique: %v", p, n.Xattrs)
		}
		a.Xattrs = xattrString(m)
		if n.Mode&unix.S_IFMT == unix.S_IFREG {
			data := make([]byte, n.Size)
			for _, x := range n.Extents() {
				copy(data[x.Pos:x.End()], tars[n.Layer][x.Off:])
			}
			a.Data = string(data)
		}
		if n.Mode&unix.S_IFMT == unix.S_IFLNK && n.Size != int64(len(n.Target)) {
			tb.Errorf("%s: size %d of a symlink to %q", p, n.Size, n.Target)
		}
		if _, ok := first[n]; !ok {
			first[n] = p
		}
		a.Same = first[n]
		out[p] = a
		if !slices.IsSortedFunc(n.Children, func(a, b tree.Dirent) int { return strings.Compare(a.Name, b.Name) }) {
			tb.Errorf("%s: children are not sorted", p)
		}
		for _, c := range n.Children {
			walk(filepath.Join(p, c.Name), c.Node)
		}
	}
	walk("/", root)
	return out
}

// scan lists a mounted tree by path. Modification times since start are now;
// access times since then come of unpacking, and are not told.
func scan(tb testing.TB, root string, start time.Time) map[string]attrs {
	tb.Helper()
	out := map[string]attrs{}
	type inode struct{ dev, ino uint64 } // overlayfs has a device for itself and one for each file system below
	first := map[inode]string{}
	var walk func(p string)
	walk = func(p string) {
		host := filepath.Join(root, p)
		var st unix.Stat_t
		if err := unix.Lstat(host, &st); errors.Is(err, unix.ENOENT) {
			return // a whiteout in a directory of one layer: listed, but not there
		} else if err != nil {
			tb.Fatal(err)
		}
		a := attrs{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Nlink: uint32(st.Nlink), Rdev: st.Rdev, Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)}
		if age := time.Unix(st.Mtim.Sec, st.Mtim.Nsec).Sub(start); age >= 0 && age < time.Hour {
			a.Sec, a.Nsec = now, 0
		}
		if t := time.Unix(st.Atim.Unix()); st.Atim != st.Mtim && t.Before(start) {
			a.Access = t.String()
		}
		a.Xattrs = xattrString(readXattrs(tb, host))
		in := inode{st.Dev, st.Ino}
		if _, ok := first[in]; !ok || st.Mode&unix.S_IFMT == unix.S_IFDIR {
			first[in] = p
		}
		a.Same = first[in]
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(host)
			if err != nil {
				tb.Fatal(err)
			}
			a.Data = string(b)
		case unix.S_IFLNK:
			s, err := os.Readlink(host)
			if err != nil {
				tb.Fatal(err)
			}
			a.Target = s
		case unix.S_IFDIR:
			f, err := os.Open(host)
			if err != nil {
				tb.Fatal(err)
			}
			names, err := f.Readdirnames(-1)
			f.Close()
			if err != nil {
				tb.Fatal(err)
			}
			sort.Strings(names)
			defer func() {
				for _, name := range names {
					walk(filepath.Join(p, name))
				}
			}()
		}
		out[p] = a
	}
	walk("/")
	return out
}

func readXattrs(tb testing.TB, path string) map[string]string {
	tb.Helper()
	n, err := unix.Llistxattr(path, nil)
	if n == 0 && err == nil {
		return nil
	}
	buf := make([]byte, max(n, 0))
	if n, err = unix.Llistxattr(path, buf); err != nil {
		tb.Fatalf("%s: %v", path, err)
	}
	m := map[string]string{}
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		val := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, val)
		if err != nil {
			tb.Fatalf("%s: %s: %v", path, name, err)
		}
		m[name] = string(val[:n])
	}
	return m
}

// peer unpacks layers side by side with containerd's own code, as its applier
// does for the overlayfs snapshotter.
type peer struct {
	dir    string
	uppers []string // the bottom one first
	tries  int
}

func newPeer(tb testing.TB, dir string) *peer {
	tb.Helper()
	p := &peer{dir: dir}
	if err := os.Mkdir(filepath.Join(dir, "empty"), 0o755); err != nil {
		tb.Fatal(err)
	}
	return p
}

// push unpacks one more layer. If it is refused, the stack stays as it was.
func (p *peer) push(tb testing.TB, data []byte) error {
	tb.Helper()
	p.tries++
	upper := filepath.Join(p.dir, fmt.Sprint(p.tries))
	if err := os.Mkdir(upper, 0o755); err != nil {
		tb.Fatal(err)
	}
	var opts []archive.ApplyOpt
	if len(p.uppers) > 0 {
		parents := slices.Clone(p.uppers)
		slices.Reverse(parents)
		opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(parents))
	}
	if _, err := archive.Apply(tb.Context(), upper, bytes.NewReader(data), opts...); err != nil {
		return err
	}
	p.uppers = append(p.uppers, upper)
	return nil
}

// scan mounts the stack and lists it.
func (p *peer) scan(tb testing.TB, start time.Time) map[string]attrs {
	tb.Helper()
	lower := slices.Clone(p.uppers)
	slices.Reverse(lower)
	return p.overlay(tb, lower, start)
}

// overlay lists what overlayfs shows of directories, the top one first.
func (p *peer) overlay(tb testing.TB, lower []string, start time.Time) map[string]attrs {
	tb.Helper()
	lower = append(lower, filepath.Join(p.dir, "empty"))
	mnt, err := os.MkdirTemp(p.dir, "mnt")
	if err != nil {
		tb.Fatal(err)
	}
	if err := unix.Mount("overlay", mnt, "overlay", unix.MS_RDONLY, "index=off,lowerdir="+strings.Join(lower, ":")); err != nil {
		tb.Fatalf("overlay of %d directories: %v", len(lower), err)
	}
	defer func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			tb.Error(err)
		}
	}()
	return scan(tb, mnt, start)
}

// modes are the ways to mount roots. This machine must know each.
var modes = []mounts.Mode{mounts.File, mounts.Loop, mounts.FUSE}

// scanRoots lists what containers see of a stack of layers in modes.
func (p *peer) scanRoots(tb testing.TB, modes []mounts.Mode, tars [][]byte, start time.Time) map[mounts.Mode]map[string]attrs {
	tb.Helper()
	var layers []*layer.Index
	r := mounts.Root{Dir: filepath.Join(p.dir, "root"), Indexes: func() ([]*layer.Index, error) { return layers, nil }}
	for i, data := range tars {
		file := filepath.Join(p.dir, fmt.Sprint("layer", i))
		if err := os.WriteFile(file, append(data, make([]byte, -len(data)&511)...), 0o600); err != nil {
			tb.Fatal(err)
		}
		layers = append(layers, indexTar(tb, data))
		r.Layers = append(r.Layers, mounts.Layer{Device: file, Stream: testutil.Stream{Reader: bytes.NewReader(data)}})
	}
	seen := map[mounts.Mode]map[string]attrs{}
	for _, m := range modes {
		if err := r.Mount(tb.Context(), m); err != nil {
			tb.Fatalf("mode %s, %d layers: %v", m, len(tars), err)
		}
		seen[m] = p.overlay(tb, []string{r.Path()}, start)
		if err := r.Unmount(); err != nil {
			tb.Error(err)
		}
	}
	return seen
}

// compareRoots is compare for all that scanRoots has seen.
func compareRoots(t *testing.T, want map[string]attrs, got map[mounts.Mode]map[string]attrs) {
	t.Helper()
	for m, paths := range got {
		before := t.Failed()
		compare(t, want, paths)
		if t.Failed() && !before {
			t.Errorf("that was mode %s", m)
		}
	}
}

// compare reports every difference between what containerd shows and what
// Merge says, and how many modification times were left to the clock.
func compare(tb testing.TB, want, got map[string]attrs) (clock int) {
	tb.Helper()
	for p, w := range want {
		g, ok := got[p]
		if !ok {
			tb.Errorf("%s: missing; containerd has %+v", p, w)
			continue
		}
		if w.Sec == now && w.Mode&unix.S_IFMT == unix.S_IFDIR {
			clock++
			w.Sec, w.Nsec, w.Access = g.Sec, g.Nsec, g.Access
		}
		if w != g {
			tb.Errorf("%s:\n\tcontainerd %+v\n\tMerge      %+v", p, w, g)
		}
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			tb.Errorf("%s: not there in containerd", p)
		}
	}
	return clock
}
