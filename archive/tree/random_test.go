package tree_test

import (
	"archive/tar"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
)

// TestRandomStacks merges random layers and unpacks them with containerd's
// code onto a real overlayfs: both must refuse the same layers and show the
// same tree, in memory and mounted in each of the modes. CLIP_TEST_STACKS is how
// many stacks, CLIP_TEST_SEED repeats one.
func TestRandomStacks(t *testing.T) {
	need.Root(t)
	count := envInt(t, "CLIP_TEST_STACKS", 300)
	seed := envInt(t, "CLIP_TEST_SEED", int(time.Now().UnixNano()&0xffffffff))
	t.Logf("CLIP_TEST_SEED=%d", seed)
	var seen stats
	for i := range count {
		s := seed + i
		ok := t.Run(strconv.Itoa(s), func(t *testing.T) { randomStack(t, uint64(s), &seen) })
		if !ok {
			t.Fatalf("stop at the first difference; repeat with CLIP_TEST_SEED=%d CLIP_TEST_STACKS=1", s)
		}
	}
	t.Logf("%+v", seen)
	if count >= 100 && (seen.Refused == 0 || seen.Clock == 0 || seen.Links == 0 || seen.Special == 0 || seen.ACLs == 0 || seen.Sparse == 0) {
		t.Errorf("the random layers miss something: %+v", seen)
	}
}

// stats shows that the interesting cases occurred.
type stats struct{ Layers, Refused, Paths, Clock, Links, Special, ACLs, Sparse int }

func envInt(tb testing.TB, name string, def int) int {
	tb.Helper()
	v := os.Getenv(name)
	if v == "" {
		return def
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		tb.Fatalf("%s: %v", name, err)
	}
	return n
}

func randomStack(t *testing.T, seed uint64, seen *stats) {
	start := time.Now().Add(-time.Second)
	dir, err := os.MkdirTemp("", "stack")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	g := &generator{r: rand.New(rand.NewPCG(seed, 1))}
	p := newPeer(t, dir)
	var (
		tars    [][]byte
		layers  []*layer.Index
		entries []string
		root    *tree.Node
	)
	defer func() {
		if t.Failed() {
			t.Log(strings.Join(entries, "\n"))
		}
	}()
	for want, tries := 1+g.r.IntN(4), 0; len(tars) < want && tries < 12; tries++ {
		files := g.layer()
		data := makeTar(t, files)
		next := append(layers[:len(layers):len(layers)], indexTar(t, data))
		refused := p.push(t, data)
		merged, err := tree.Merge(next)
		entries = append(entries, describeFiles(files, refused))
		// A symlink to below itself grows at each turn. Merge may end before containerd's limit of links, and leaves it to
		// containerd to refuse the layer.
		if (refused != nil) != (err != nil) || err != nil && !errors.Is(err, tree.ErrInvalid) && !errors.Is(err, tree.ErrUnsupported) {
			t.Fatalf("containerd: %v\nMerge: %v", refused, err)
		}
		seen.Layers++
		if err != nil {
			seen.Refused++
			continue
		}
		layers, tars, root = next, append(tars, data), merged
	}
	if root == nil {
		return
	}
	got := flatten(t, root, tars)
	want := p.scan(t, start)
	seen.Clock += compare(t, want, got)
	compareRoots(t, want, p.scanRoots(t, modes, tars, start))
	seen.Sparse += countSparse(root)
	seen.Paths += len(got)
	for path, a := range got {
		if a.Same != path {
			seen.Links++
		}
		if a.Rdev != 0 {
			seen.Special++
		}
		if strings.Contains(a.Xattrs, "posix_acl") {
			seen.ACLs++
		}
	}
}

func countSparse(n *tree.Node) (count int) {
	if n.Sparse != nil {
		count++
	}
	for _, c := range n.Children {
		count += countSparse(c.Node)
	}
	return count
}

func describeFiles(files []file, refused error) string {
	var b strings.Builder
	fmt.Fprintf(&b, "layer, refused: %v", refused)
	for _, f := range files {
		if f.Sparse != nil {
			fmt.Fprintf(&b, "\n  sparse %s, %d bytes, %d pieces:", f.Sparse.Version, f.Sparse.Size, len(f.Sparse.Pieces))
		}
		fmt.Fprintf(&b, "\n  %c %q -> %q %o %d:%d dev %d:%d %v %q", f.Typeflag, f.Name, f.Linkname, f.Mode,
			f.Uid, f.Gid, f.Devmajor, f.Devminor, f.ModTime.UTC(), f.PAXRecords)
	}
	return b.String()
}

// generator makes layers that touch the same few paths again and again.
type generator struct {
	r     *rand.Rand
	names []string // used in the current layer
}

func (g *generator) chance(percent int) bool { return g.r.IntN(100) < percent }

func (g *generator) pick(from ...string) string { return from[g.r.IntN(len(from))] }

func (g *generator) layer() []file {
	g.names = nil
	files := make([]file, g.r.IntN(12))
	for i := range files {
		files[i] = g.file()
	}
	if slices.ContainsFunc(files, func(f file) bool { return f.Sparse != nil }) {
		for i := range files {
			files[i].Uid = min(files[i].Uid, 2) // listTar knows no holes
		}
	}
	return files
}

// sparse makes a regular file one with holes.
func (g *generator) sparse(f *file) {
	s := &testimage.Sparse{Header: f.Header, Version: g.pick("0.0", "0.1", "1.0"), Records: map[string]string{
		"mtime": fmt.Sprintf("%d.%09d", f.ModTime.Unix(), f.ModTime.Nanosecond()),
		"path":  f.Name,
	}}
	for key, value := range f.PAXRecords {
		s.Records[key] = value
	}
	s.Header.Name, s.Header.ModTime, s.Header.PAXRecords = "sparse", time.Unix(0, 0), nil
	for range g.r.IntN(5) {
		s.Size += 512 * g.pick2(0, 0, 1, 8, 31)
		p := testimage.Piece{Pos: s.Size, Data: strings.Repeat(g.pick("x", "y"), 512*g.r.IntN(9))}
		s.Size += int64(len(p.Data))
		s.Pieces = append(s.Pieces, p)
	}
	switch g.r.IntN(3) {
	case 0:
		p := testimage.Piece{Pos: s.Size, Data: strings.Repeat("z", g.r.IntN(512))}
		s.Size += int64(len(p.Data))
		s.Pieces = append(s.Pieces, p)
	case 1:
		s.Size += int64(g.r.IntN(5000))
		s.Pieces = append(s.Pieces, testimage.Piece{Pos: s.Size})
	}
	f.Sparse = s
}

// path is mostly new, sometimes one that the layer has used.
func (g *generator) path() string {
	if len(g.names) > 0 && g.chance(10) {
		return g.pick(g.names...)
	}
	elems := make([]string, 1+g.r.IntN(3))
	for i := range elems {
		elems[i] = g.pick("a", "b", "c", "d", "e", "f", "g", "lib", "usr")
		if g.chance(1) {
			elems[i] = g.pick("\xff\xfe", "new\nline", "sp ace", strings.Repeat("n", 255), strings.Repeat("n", 256), strings.Repeat("é", 127), "...", "-")
		}
	}
	return strings.Join(elems, "/")
}

// spell writes a path in one of the ways that tars do.
func (g *generator) spell(p string) string {
	switch g.r.IntN(30) {
	case 0:
		return "./" + p
	case 1:
		return "/" + p
	case 2:
		return strings.ReplaceAll(p, "/", "//")
	case 3:
		return "../../" + p
	case 4:
		return "x/../" + p
	case 5:
		return strings.ReplaceAll(p, "/", "/./")
	case 6:
		return p + "/"
	case 7:
		return g.pick("./", "/", ".", "..", "a/..")
	default:
		return p
	}
}

func (g *generator) file() file {
	p := g.path()
	f := file{Header: tar.Header{
		Name:    g.spell(p),
		Mode:    int64(g.pick2(0o644, 0o755, int64(g.r.IntN(0o10000)))),
		Uid:     g.r.IntN(3),
		Gid:     g.r.IntN(3),
		ModTime: g.time(),
	}}
	if g.chance(2) {
		f.Uid = 1<<32 - 1
	}
	switch k := g.r.IntN(100); {
	case k < 28:
		f.Typeflag = tar.TypeDir
	case k < 55:
		f.Typeflag = tar.TypeReg
		f.Data = strings.Repeat("x", g.r.IntN(3)) + strconv.Itoa(g.r.IntN(1000))
	case k < 66:
		f.Typeflag = tar.TypeSymlink
		f.Linkname = g.target()
	case k < 76:
		f.Typeflag = tar.TypeLink
		f.Linkname = g.spell(g.path())
		if len(g.names) > 0 && g.chance(80) {
			f.Linkname = g.pick(g.names...)
		}
	case k < 84:
		g.special(&f)
	case k < 95:
		f.Typeflag = tar.TypeReg
		f.Name = filepath.Join(filepath.Dir(p), ".wh."+filepath.Base(p))
	default:
		f.Typeflag = g.kind()
		f.Name = g.spell(filepath.Join(filepath.Dir(p), ".wh..wh..opq"))
		if g.chance(10) {
			f.Name = g.pick(".wh.", "a/.wh..", "a/.wh...", ".wh..wh.plnk", ".wh.x/y")
		}
	}
	if f.Typeflag != tar.TypeDir { // archive/tar writes the slash for directories only
		f.Name = strings.TrimRight(f.Name, "/")
	}
	g.xattrs(&f)
	if f.Typeflag == tar.TypeReg && g.chance(12) && f.ModTime.Unix() >= 0 {
		f.Uid = min(f.Uid, 2)
		g.sparse(&f)
	}
	g.names = append(g.names, p)
	return f
}

func (g *generator) pick2(from ...int64) int64 { return from[g.r.IntN(len(from))] }

func (g *generator) kind() byte { return "05"[g.r.IntN(2)] }

func (g *generator) special(f *file) {
	f.Typeflag = "346"[g.r.IntN(3)]
	if f.Typeflag != tar.TypeFifo {
		f.Devmajor = g.pick2(0, 1, 8, 4095, 4096)
		f.Devminor = g.pick2(0, 3, 255, 256, 1<<20-1, 1<<20)
	}
}

// target is a symlink's: relative, absolute, upwards, or nowhere.
func (g *generator) target() string {
	p := g.path()
	switch g.r.IntN(6) {
	case 0:
		return "/" + p
	case 1:
		return "../" + p
	case 2:
		return g.pick(".", "..", "/", "nowhere", "a/", "./b", strings.Repeat("t", 300))
	default:
		return p
	}
}

func (g *generator) time() time.Time {
	switch g.r.IntN(12) {
	case 0:
		return time.Unix(-int64(g.r.IntN(1e9)), 5)
	case 1:
		return time.Unix(1<<34, 0) // 2514, after what containerd sets
	case 2:
		return time.Unix(1<<33, 7) // 2242
	default:
		return time.Unix(int64(g.r.IntN(1.5e9)), int64(g.r.IntN(1e9)))
	}
}

func (g *generator) xattrs(f *file) {
	for g.chance(20) {
		if f.PAXRecords == nil {
			f.PAXRecords = map[string]string{}
		}
		name, value := g.xattr()
		if name == "system.posix_acl_default" && f.Typeflag != tar.TypeDir && g.chance(95) {
			continue
		}
		f.PAXRecords["SCHILY.xattr."+name] = value
	}
}

func (g *generator) xattr() (name, value string) {
	value = strconv.Itoa(g.r.IntN(100))
	switch g.r.IntN(20) {
	case 0, 1, 2, 3, 4, 5:
		return "user." + g.pick("a", "b", "overlay.opaque"), value
	case 6, 7, 8:
		return "security.capability", capability(2)
	case 9:
		return "trusted." + g.pick("a", "overlay.opaque", "overlay.whiteout"), "y"
	case 10:
		return "security." + g.pick("a", "b"), value
	case 11:
		return g.pick("foo.bar", "foo.bar", "system.other", "nodot", "user.", "security.capability"), value
	case 12, 13, 14, 15:
		if g.chance(10) {
			return "system.posix_acl_access", g.badACL()
		}
		return "system.posix_acl_access", g.acl()
	default:
		return "system.posix_acl_default", g.acl()
	}
}

func capability(rev byte) string {
	b := make([]byte, 20)
	b[0], b[3], b[4] = 1, rev, 0x20
	return string(b)
}

type ace struct {
	tag, perm uint16
	id        uint32
}

func encodeACL(version uint32, aces []ace) string {
	b := binary.LittleEndian.AppendUint32(nil, version)
	for _, e := range aces {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b)
}

func (g *generator) perm() uint16 { return uint16(g.r.IntN(8)) }

// acl is one that the kernel accepts.
func (g *generator) acl() string {
	aces := []ace{{1, g.perm(), 1<<32 - 1}}
	named := false
	for g.chance(40) {
		aces, named = append(aces, ace{2, g.perm(), uint32(len(aces))}), true
	}
	aces = append(aces, ace{4, g.perm(), uint32(g.r.IntN(2))})
	for g.chance(30) {
		aces, named = append(aces, ace{8, g.perm(), uint32(len(aces))}), true
	}
	if named || g.chance(30) {
		aces = append(aces, ace{16, g.perm(), 1<<32 - 1})
	}
	return encodeACL(2, append(aces, ace{32, g.perm(), 1<<32 - 1}))
}

// badACL has entries at random, and is sometimes good by chance.
func (g *generator) badACL() string {
	if g.chance(30) {
		return g.pick("abc", "", encodeACL(1, nil), encodeACL(2, nil), encodeACL(2, nil)+"1234")
	}
	aces := make([]ace, g.r.IntN(6))
	for i := range aces {
		aces[i] = ace{1 << g.r.IntN(6), uint16(g.r.IntN(9)), uint32(g.r.IntN(4)) - 1}
	}
	return encodeACL(2, aces)
}
