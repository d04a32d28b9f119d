package tree_test

import (
	"archive/tar"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
	mounts "github.com/beam-cloud/containerd-clip/snapshotter/root"
)

func entry(kind byte, name, link, data string) file {
	return file{Header: tar.Header{Typeflag: kind, Name: name, Linkname: link, Mode: 0o755, ModTime: time.Unix(1e9, 0)}, Data: data}
}

func dir(name string) file           { return entry(tar.TypeDir, name, "", "") }
func reg(name, data string) file     { return entry(tar.TypeReg, name, "", data) }
func sym(name, target string) file   { return entry(tar.TypeSymlink, name, target, "") }
func hard(name, target string) file  { return entry(tar.TypeLink, name, target, "") }
func wh(name string) file            { return reg(name, "") }
func (f file) mode(m int64) file     { f.Mode = m; return f }
func (f file) time(t time.Time) file { f.ModTime = t; return f }

func (f file) owner(uid, gid int) file {
	f.Uid, f.Gid = uid, gid
	return f
}

func (f file) dev(major, minor int64) file {
	f.Devmajor, f.Devminor = major, minor
	return f
}

func (f file) xattr(name, value string) file {
	f.PAXRecords = maps.Clone(f.PAXRecords)
	if f.PAXRecords == nil {
		f.PAXRecords = map[string]string{}
	}
	f.PAXRecords["SCHILY.xattr."+name] = value
	return f
}

// mergeTars merges tar streams made of the layers' entries.
func mergeTars(tb testing.TB, layers [][]file) (*tree.Node, [][]byte, error) {
	tb.Helper()
	var tars [][]byte
	var indexes []*layer.Index
	for _, files := range layers {
		data := makeTar(tb, files)
		tars = append(tars, data)
		indexes = append(indexes, indexTar(tb, data))
	}
	root, err := tree.Merge(indexes)
	return root, tars, err
}

// checkPeer compares with containerd, in memory and mounted in modes.
func checkPeer(t *testing.T, root *tree.Node, tars [][]byte, modes ...mounts.Mode) {
	t.Helper()
	need.Root(t)
	start := time.Now().Add(-time.Second)
	dir, err := os.MkdirTemp("", "peer") // t.TempDir has the test's name, which may confuse mount options
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	p := newPeer(t, dir)
	for i, data := range tars {
		err := p.push(t, data)
		if i == len(tars)-1 && (err != nil) != (root == nil) {
			t.Fatalf("containerd: %v, Merge refused: %v", err, root == nil)
		}
		if i < len(tars)-1 && err != nil {
			t.Fatalf("containerd refuses layer %d: %v", i, err)
		}
	}
	if root != nil {
		want := p.scan(t, start)
		compare(t, want, flatten(t, root, tars))
		compareRoots(t, want, p.scanRoots(t, modes, tars, start))
	}
}

// listing names everything in a tree, in one line.
func listing(paths map[string]attrs) string {
	var b strings.Builder
	for _, p := range slices.Sorted(maps.Keys(paths)) {
		if p == "/" {
			continue
		}
		a := paths[p]
		switch {
		case a.Same != p:
			fmt.Fprintf(&b, "%s==%s ", p[1:], a.Same[1:])
		case a.Mode&unix.S_IFMT == unix.S_IFDIR:
			fmt.Fprintf(&b, "%s/ ", p[1:])
		case a.Mode&unix.S_IFMT == unix.S_IFREG:
			fmt.Fprintf(&b, "%s=%s ", p[1:], a.Data)
		case a.Mode&unix.S_IFMT == unix.S_IFLNK:
			fmt.Fprintf(&b, "%s->%s ", p[1:], a.Target)
		default:
			fmt.Fprintf(&b, "%s#%d:%d ", p[1:], unix.Major(a.Rdev), unix.Minor(a.Rdev))
		}
	}
	return strings.TrimSpace(b.String())
}

// refusal as a case's result means ErrInvalid, in the last layer.
const refusal = "refused"

var cases = []struct {
	name   string
	layers [][]file
	want   string
}{
	{"whiteout", [][]file{{reg("a", "1"), reg("b", "2")}, {wh(".wh.a")}}, "b=2"},
	{"whiteout of a directory", [][]file{{reg("d/x/y", "1"), reg("dx", "2")}, {wh(".wh.d")}}, "dx=2"},
	{"whiteout of nothing makes parents", [][]file{{reg("a", "1")}, {wh("x/y/.wh.z")}}, "a=1 x/ x/y/"},
	{"whiteout, then the file", [][]file{{reg("a", "1")}, {wh(".wh.a"), reg("a", "2")}}, "a=2"},
	{"the file, then whiteout", [][]file{{reg("a", "1")}, {reg("a", "2"), wh(".wh.a")}}, refusal},
	{"whiteout twice", [][]file{{reg("a", "1")}, {wh(".wh.a"), wh(".wh.a")}}, refusal},
	{"whiteout, then the directory", [][]file{{reg("d/old", "1")}, {wh(".wh.d"), dir("d"), reg("d/new", "2")}}, "d/ d/new=2 d/old=1"},
	{"whiteout, then a file in the directory", [][]file{{reg("d/old", "1")}, {wh(".wh.d"), reg("d/new", "2")}}, refusal},
	{"whiteout above, file above that", [][]file{{reg("d/old", "1")}, {wh(".wh.d")}, {reg("d/new", "2")}}, "d/ d/new=2"},
	{"whiteout of an explicit directory's child", [][]file{{dir("d"), reg("d/a", "1"), reg("d/b", "2")}, {dir("d"), wh("d/.wh.a")}}, "d/ d/b=2"},
	{"whiteout that is a directory entry", [][]file{{reg("a", "1")}, {dir(".wh.a/")}}, ""},
	{"whiteout of a whiteout's name", [][]file{{reg("a", "1")}, {wh(".wh..wh.a")}}, "a=1"},
	{"whiteout without a name", [][]file{nil, {wh("d/.wh.")}}, refusal},
	{"whiteout of .", [][]file{nil, {wh("d/.wh..")}}, refusal},
	{"whiteout of ..", [][]file{nil, {wh("d/.wh...")}}, refusal},
	{"whiteout below a file", [][]file{nil, {reg("a", "1"), wh("a/.wh.b")}}, refusal},
	{"whiteout of a 255-byte name", [][]file{{reg(strings.Repeat("n", 255), "1")}, {wh(".wh." + strings.Repeat("n", 255))}}, ""},

	{"bottom whiteout deletes", [][]file{{reg("a", "1"), reg("b", "2"), wh(".wh.a"), wh(".wh.none")}}, "b=2"},
	{"bottom whiteout of an explicit directory", [][]file{{dir("d"), wh(".wh.d")}}, refusal},
	{"bottom whiteout, then the directory again", [][]file{{dir("d"), reg("d/a", "1"), wh(".wh.d"), dir("d")}}, "d/"},
	{"bottom whiteout of an implied directory", [][]file{{reg("d/a", "1"), wh(".wh.d")}}, ""},
	{"bottom opaque keeps what entries wrote", [][]file{{dir("d"), reg("d/a", "1"), wh("d/.wh..wh..opq"), reg("d/b", "2")}}, "d/ d/a=1 d/b=2"},
	{"bottom opaque drops implied directories", [][]file{{reg("d/a/b", "1"), reg("d/c", "2"), wh("d/.wh..wh..opq")}}, "d/ d/c=2"},
	{"bottom opaque acts once", [][]file{{wh("d/.wh..wh..opq"), reg("d/a/b", "1"), wh("d/.wh..wh..opq")}}, "d/ d/a/ d/a/b=1"},

	{"opaque first", [][]file{{reg("d/old", "1")}, {dir("d"), wh("d/.wh..wh..opq"), reg("d/new", "2")}}, "d/ d/new=2"},
	{"opaque last", [][]file{{reg("d/old", "1")}, {dir("d"), reg("d/new", "2"), wh("d/.wh..wh..opq")}}, "d/ d/new=2"},
	{"opaque without the directory", [][]file{{reg("d/old", "1")}, {wh("d/.wh..wh..opq")}}, "d/"},
	{"opaque in the middle", [][]file{{reg("d/1", "1")}, {wh("d/.wh..wh..opq"), reg("d/2", "2")}, {reg("d/3", "3")}}, "d/ d/2=2 d/3=3"},
	{"opaque at the root is ignored", [][]file{{reg("a", "1")}, {wh(".wh..wh..opq"), reg("b", "2")}}, "a=1 b=2"},
	{"opaque above a nested directory", [][]file{{reg("d/e/f", "1")}, {wh("d/.wh..wh..opq"), dir("d/e")}}, "d/ d/e/"},

	{"directory, file, directory", [][]file{{reg("d/old", "1")}, {reg("d", "2")}, {reg("d/new", "3")}}, "d/ d/new=3"},
	{"directory to symlink", [][]file{{reg("d/old", "1"), reg("e/x", "2")}, {sym("d", "e")}}, "d->e e/ e/x=2"},
	{"symlink to directory", [][]file{{sym("d", "e"), reg("e/x", "1")}, {dir("d")}}, "d/ e/ e/x=1"},
	{"directory to file in one layer", [][]file{{reg("d/x", "1"), reg("d", "2")}}, "d=2"},
	{"explicit subdirectory below a file", [][]file{{dir("d/e"), reg("d", "2")}}, refusal},
	{"file below a file", [][]file{{reg("d", "1"), reg("d/x", "2")}}, refusal},
	{"duplicates", [][]file{{reg("a", "1"), reg("a", "2"), dir("d"), reg("d/x", "3"), dir("d")}}, "a=2 d/ d/x=3"},

	{"symlinked directory in one layer", [][]file{{dir("usr/lib"), sym("lib", "usr/lib"), reg("lib/x", "1")}}, "lib->usr/lib usr/ usr/lib/ usr/lib/x=1"},
	{"symlinked directory in a lower layer", [][]file{{reg("usr/lib/a", "1"), sym("lib", "usr/lib")}, {reg("lib/x", "2")}}, "lib/ lib/x=2 usr/ usr/lib/ usr/lib/a=1"},
	{"symlink to the root and up", [][]file{{sym("r", "/"), sym("u", "../../d"), reg("r/a", "1"), reg("u/b", "2")}}, "a=1 d/ d/b=2 r->/ u->../../d"},
	{"symlink to nowhere as a directory", [][]file{{sym("s", "t/u"), reg("s/x", "1")}}, "s->t/u t/ t/u/ t/u/x=1"},
	{"symlink loop as a directory", [][]file{{sym("a", "b"), sym("b", "a"), reg("a/x", "1")}}, refusal},
	{"symlink that is replaced", [][]file{{sym("a", "b"), dir("a")}}, "a/"},
	{"relative symlink behind two others", [][]file{{dir("d/e"), sym("b", "d/e"), sym("d/e/x", "../z"), sym("a", "b"), dir("a/x/y")}}, "a->b b->d/e d/ d/e/ d/e/x->../z z/ z/y/"},

	{"hard link", [][]file{{reg("b", "1"), hard("a", "b")}}, "a=1 b==a"},
	{"hard link to a symlink", [][]file{{sym("b", "c"), hard("a", "b")}}, "a->c b==a"},
	{"hard link through symlinks", [][]file{{reg("d/f", "1"), sym("s", "d"), hard("h", "s/f")}}, "d/ d/f=1 h==d/f s->d"},
	{"hard link spelled oddly", [][]file{{reg("d/f", "1"), hard("h", "/./d//../d/f")}}, "d/ d/f=1 h==d/f"},
	{"hard link to a lower layer", [][]file{{reg("b", "1")}, {hard("a", "b")}}, refusal},
	{"hard link forward", [][]file{{hard("a", "b"), reg("b", "1")}}, refusal},
	{"hard link to a directory", [][]file{{dir("b"), hard("a", "b")}}, refusal},
	{"hard link to the root", [][]file{{hard("a", "..")}}, refusal},
	{"hard link to itself", [][]file{{reg("a", "1"), hard("a", "a")}}, refusal},
	{"hard link whose target is replaced", [][]file{{reg("b", "1"), hard("a", "b"), reg("b", "2")}}, "a=1 b=2"},
	{"hard link whose target is hidden", [][]file{{reg("b", "1"), hard("a", "b")}, {wh(".wh.b")}}, "a=1"},
	{"hard link to a whiteout", [][]file{{reg("a", "1"), reg("b", "2")}, {wh(".wh.b"), hard("a", "b")}}, ""},

	{"spellings", [][]file{{reg("./a", "1"), reg("/b", "2"), reg("c//d", "3"), reg("e/./f", "4"), reg("../../g", "5"), reg("h/../i", "6"), dir("j/")}}, "a=1 b=2 c/ c/d=3 e/ e/f=4 g=5 i=6 j/"},
	{"the root itself", [][]file{{dir("./"), dir("/"), dir(".."), dir("a/.."), reg("a", "1")}}, "a=1"},
	{"name of 255 bytes", [][]file{{reg(strings.Repeat("n", 255), "1")}}, strings.Repeat("n", 255) + "=1"},
	{"name of 256 bytes", [][]file{{reg(strings.Repeat("n", 256), "1")}}, refusal},
	{"directory name of 256 bytes", [][]file{{reg("a/"+strings.Repeat("n", 256)+"/b", "1")}}, refusal},
	{"path of 4096 bytes", [][]file{{reg(strings.Repeat("n/", 2047)+"nn", "1")}}, refusal},
	{"names that are not UTF-8", [][]file{{reg("a\xff", "1"), reg("a\xfe", "2")}}, "a\xfe=2 a\xff=1"},

	{"devices", [][]file{{entry(tar.TypeChar, "c", "", "").dev(1, 3), entry(tar.TypeBlock, "b", "", "").dev(8, 256), entry(tar.TypeFifo, "f", "", "").dev(5, 5)}}, "b#8:256 c#1:3 f#0:0"},
	{"device 0:0 is a whiteout", [][]file{{reg("a", "1"), reg("d/x", "2")}, {entry(tar.TypeChar, "a", "", ""), entry(tar.TypeChar, "d", "", "")}}, ""},
	{"device 0:0 in the bottom layer", [][]file{{entry(tar.TypeChar, "a", "", ""), entry(tar.TypeBlock, "b", "", "")}}, "b#0:0"},
	{"device numbers are cut off", [][]file{{reg("a", "1")}, {entry(tar.TypeChar, "a", "", "").dev(4096, 1<<20), entry(tar.TypeChar, "b", "", "").dev(4097, 1<<20+2)}}, "b#1:2"},

	{"parent is a lower file", [][]file{{reg("a", "1")}, {reg("a/b", "2")}}, "a/ a/b=2"},
	{"grandparent is a lower file", [][]file{{reg("a", "1")}, {reg("a/b/c", "2")}}, refusal},
	{"grandparent is a lower whiteout", [][]file{{reg("a/b/c", "1")}, {wh(".wh.a")}, {reg("a/b/c", "2")}}, refusal},
	{"empty layers", [][]file{nil, {reg("a", "1")}, nil}, "a=1"},

	{"xattr without a name", [][]file{{reg("a", "1").xattr("user.", "v")}}, refusal},
	{"xattr name too long", [][]file{{reg("a", "1").xattr("user."+strings.Repeat("n", 251), "v")}}, refusal},
	{"capability of a wrong size", [][]file{{reg("a", "1").xattr("security.capability", "v")}}, refusal},
	{"default ACL of a file", [][]file{{reg("a", "1").xattr("system.posix_acl_default", encodeACL(2, []ace{{1, 7, 0}, {4, 7, 0}, {32, 7, 0}}))}}, refusal},
}

func TestMerge(t *testing.T) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			root, tars, err := mergeTars(t, c.layers)
			switch {
			case c.want == refusal:
				if !errors.Is(err, tree.ErrInvalid) || root != nil {
					t.Errorf("got %v, want ErrInvalid", err)
				}
				if want := fmt.Sprintf("layer %d:", len(c.layers)-1); err != nil && !strings.HasPrefix(err.Error(), want) {
					t.Errorf("got %v, want %s", err, want)
				}
			case err != nil:
				t.Fatal(err)
			default:
				if got := listing(flatten(t, root, tars)); got != c.want {
					t.Errorf("got  %s\nwant %s", got, c.want)
				}
			}
			checkPeer(t, root, tars, modes...)
		})
	}
}

// TestAttributes checks attributes that come about in less obvious ways.
func TestAttributes(t *testing.T) {
	old, young := time.Unix(1000, 1), time.Unix(2000, 2)
	caps := capability(2)
	for _, c := range []struct {
		name   string
		layers [][]file
		path   string
		want   attrs // Same and, for the root, Nlink are filled in
	}{
		{"the root's attributes are not the tar's", [][]file{{dir("./").mode(0o700).owner(5, 6).time(old)}, nil},
			"/", attrs{Mode: unix.S_IFDIR | 0o755, Nlink: 1, Sec: 1000, Nsec: 1}},
		{"the topmost directory counts", [][]file{{dir("d").mode(0o700).owner(5, 6).xattr("user.a", "1")}, {dir("d").mode(0o1777).time(old)}},
			"/d", attrs{Mode: unix.S_IFDIR | 0o1777, Nlink: 1, Sec: 1000, Nsec: 1}},
		{"a later entry adds to a directory", [][]file{{dir("d").xattr("user.a", "1"), dir("d").mode(0o2750).time(old).xattr("user.b", "2")}},
			"/d", attrs{Mode: unix.S_IFDIR | 0o2750, Nlink: 2, Sec: 1000, Nsec: 1, Xattrs: `user.a="1" user.b="2" `}},
		{"an implied directory is that of a lower layer", [][]file{{dir("d").mode(0o1770).owner(5, 6).time(old).xattr("user.a", "1")}, {reg("d/x", "1").time(young)}},
			"/d", attrs{Mode: unix.S_IFDIR | 0o1770, UID: 5, GID: 6, Nlink: 1, Sec: 1000, Nsec: 1, Xattrs: `user.a="1" `}},
		{"even through a symlink there", [][]file{{dir("usr/lib").mode(0o711).time(old), sym("lib", "usr/lib")}, {reg("lib/x", "1").time(young)}},
			"/lib", attrs{Mode: unix.S_IFDIR | 0o711, Nlink: 2, Sec: 1000, Nsec: 1}},
		{"an implied directory of no lower layer", [][]file{{reg("d/x", "1").owner(5, 6).time(young)}},
			"/d", attrs{Mode: unix.S_IFDIR | 0o755, Nlink: 2, Sec: 2000, Nsec: 2}},
		{"setgid hands down the group", [][]file{{dir("d").mode(0o2755).owner(5, 6), reg("d/e/x", "1").time(old)}},
			"/d/e", attrs{Mode: unix.S_IFDIR | 0o755, GID: 6, Nlink: 2, Sec: 1000, Nsec: 1}},
		{"owner -1 leaves it", [][]file{{dir("d").mode(0o2755).owner(5, 6), reg("d/x", "1").owner(1<<32-1, 1<<32-1).time(old)}},
			"/d/x", attrs{Mode: unix.S_IFREG | 0o755, GID: 6, Nlink: 1, Sec: 1000, Nsec: 1, Data: "1"}},
		{"a hard link's attributes are the file's", [][]file{{reg("a", "1").mode(0o4755).xattr("user.a", "1"), hard("b", "a").mode(0o640).owner(5, 6).time(old)}},
			"/a", attrs{Mode: unix.S_IFREG | 0o640, UID: 5, GID: 6, Nlink: 2, Sec: 1000, Nsec: 1, Data: "1", Xattrs: `user.a="1" `}},
		{"a hard link revokes capabilities", [][]file{{reg("a", "1").xattr("security.capability", caps), hard("b", "a").time(old)}},
			"/a", attrs{Mode: unix.S_IFREG | 0o755, Nlink: 2, Sec: 1000, Nsec: 1, Data: "1"}},
		{"unless it repeats them", [][]file{{reg("a", "1"), hard("b", "a").time(old).xattr("security.capability", caps)}},
			"/a", attrs{Mode: unix.S_IFREG | 0o755, Nlink: 2, Sec: 1000, Nsec: 1, Data: "1", Xattrs: fmt.Sprintf("security.capability=%q ", caps)}},
		{"a hidden hard link still counts", [][]file{{reg("a", "1").time(old), hard("b", "a").time(old)}, {wh(".wh.b")}},
			"/a", attrs{Mode: unix.S_IFREG | 0o755, Nlink: 2, Sec: 1000, Nsec: 1, Data: "1"}},
		{"a replaced one does not", [][]file{{reg("a", "1"), hard("b", "a").time(old), reg("b", "2")}},
			"/a", attrs{Mode: unix.S_IFREG | 0o755, Nlink: 1, Sec: 1000, Nsec: 1, Data: "1"}},
		{"a symlink has no mode", [][]file{{sym("s", "t").mode(0o600).owner(5, 6).time(old).xattr("user.a", "1").xattr("security.a", "2")}},
			"/s", attrs{Mode: unix.S_IFLNK | 0o777, UID: 5, GID: 6, Nlink: 1, Sec: 1000, Nsec: 1, Target: "t", Xattrs: `security.a="2" `}},
		{"a file that replaces a directory has its time", [][]file{{dir("d").time(old), reg("d", "1").time(young)}},
			"/d", attrs{Mode: unix.S_IFREG | 0o755, Nlink: 1, Sec: 1000, Nsec: 1, Data: "1"}},
		{"times before 1970 are 0", [][]file{{reg("a", "1").time(time.Unix(-1, 999_999_999))}},
			"/a", attrs{Mode: unix.S_IFREG | 0o755, Nlink: 1, Data: "1"}},
		{"the last time", [][]file{{reg("a", "1").time(time.Unix(0, 1<<63-1))}},
			"/a", attrs{Mode: unix.S_IFREG | 0o755, Nlink: 1, Sec: 9223372036, Nsec: 854775807, Data: "1"}},
		{"times after it are 0", [][]file{{reg("a", "1").time(time.Unix(0, 1<<63-1).Add(1))}},
			"/a", attrs{Mode: unix.S_IFREG | 0o755, Nlink: 1, Data: "1"}},
		{"xattrs that do not stick", [][]file{{reg("a", "1").time(old).xattr("trusted.overlay.opaque", "y").xattr("foo", "").xattr("system.other", "").xattr("user.overlay.opaque", "y")}},
			"/a", attrs{Mode: unix.S_IFREG | 0o755, Nlink: 1, Sec: 1000, Nsec: 1, Data: "1", Xattrs: `user.overlay.opaque="y" `}},
		{"an ACL follows the mode", [][]file{{reg("a", "1").mode(0o640).time(old).xattr("system.posix_acl_access", encodeACL(2, []ace{{1, 7, 9}, {2, 7, 8}, {4, 7, 0}, {16, 7, 0}, {32, 7, 0}}))}},
			"/a", attrs{Mode: unix.S_IFREG | 0o640, Nlink: 1, Sec: 1000, Nsec: 1, Data: "1", Xattrs: fmt.Sprintf("system.posix_acl_access=%q ",
				encodeACL(2, []ace{{1, 6, 1<<32 - 1}, {2, 7, 8}, {4, 7, 1<<32 - 1}, {16, 4, 1<<32 - 1}, {32, 0, 1<<32 - 1}}))}},
		{"an ACL that is only a mode", [][]file{{reg("a", "1").mode(0o640).time(old).xattr("system.posix_acl_access", encodeACL(2, []ace{{1, 7, 0}, {4, 7, 0}, {32, 7, 0}}))}},
			"/a", attrs{Mode: unix.S_IFREG | 0o640, Nlink: 1, Sec: 1000, Nsec: 1, Data: "1"}},
		{"a default ACL is handed down", [][]file{{dir("d").xattr("system.posix_acl_default", encodeACL(2, []ace{{1, 7, 0}, {2, 7, 8}, {4, 7, 0}, {16, 7, 0}, {32, 7, 0}})), reg("d/x", "1").mode(0o600).time(old)}},
			"/d/x", attrs{Mode: unix.S_IFREG | 0o600, Nlink: 1, Sec: 1000, Nsec: 1, Data: "1", Xattrs: fmt.Sprintf("system.posix_acl_access=%q ",
				encodeACL(2, []ace{{1, 6, 1<<32 - 1}, {2, 7, 8}, {4, 7, 1<<32 - 1}, {16, 0, 1<<32 - 1}, {32, 0, 1<<32 - 1}}))}},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, tars, err := mergeTars(t, c.layers)
			if err != nil {
				t.Fatal(err)
			}
			got := flatten(t, root, tars)[c.path]
			c.want.Same = c.path
			if got != c.want {
				t.Errorf("got  %+v\nwant %+v", got, c.want)
			}
			checkPeer(t, root, tars, modes...)
		})
	}
}

// TestNotATar checks entries that archive/tar does not write.
func TestNotATar(t *testing.T) {
	for name, e := range map[string]layer.Entry{
		"type":             {Name: "a", Type: 'V'},
		"zero in name":     {Name: "a\x00b", Type: layer.TypeReg},
		"zero in target":   {Name: "a", Type: layer.TypeSymlink, Link: "b\x00"},
		"zero in link":     {Name: "a", Type: layer.TypeLink, Link: "b\x00/c"},
		"no target":        {Name: "a", Type: layer.TypeSymlink},
		"long target":      {Name: "a", Type: layer.TypeSymlink, Link: strings.Repeat("t", 4096)},
		"zero in xattr":    {Name: "a", Type: layer.TypeReg, Xattrs: []layer.Xattr{{Name: "user.\x00"}}},
		"large xattr":      {Name: "a", Type: layer.TypeReg, Xattrs: []layer.Xattr{{Name: "user.a", Value: strings.Repeat("v", 65537)}}},
		"xattr of no name": {Name: "a", Type: layer.TypeReg, Xattrs: []layer.Xattr{{}}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := tree.Merge([]*layer.Index{{Entries: []layer.Entry{e}}}); !errors.Is(err, tree.ErrInvalid) {
				t.Errorf("got %v, want ErrInvalid", err)
			}
		})
	}
}

func TestEmptyStack(t *testing.T) {
	root, err := tree.Merge(nil)
	if err != nil || root.Mode != unix.S_IFDIR|0o755 || len(root.Children) != 0 {
		t.Errorf("got %+v, %v", root, err)
	}
}

// TestSideBySide merges random layers one after the other and side by side.
func TestSideBySide(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	merged, refused := 0, 0
	for seed := range uint64(400) {
		g := &generator{r: rand.New(rand.NewPCG(seed, 2))}
		var layers []*layer.Index
		for range 2 + g.r.IntN(5) {
			next := append(layers[:len(layers):len(layers)], indexTar(t, makeTar(t, g.layer())))
			if _, err := tree.Merge(next); err != nil && !g.chance(20) {
				continue // few stacks would be fine otherwise
			}
			layers = next
		}
		runtime.GOMAXPROCS(1)
		want, wantErr := tree.Merge(layers)
		runtime.GOMAXPROCS(8)
		for range 5 {
			got, err := tree.Merge(layers)
			if fmt.Sprint(err) != fmt.Sprint(wantErr) || !reflect.DeepEqual(got, want) {
				t.Fatalf("seed %d: got %v, want %v, or another tree", seed, err, wantErr)
			}
		}
		if wantErr != nil {
			refused++
		} else {
			merged++
		}
	}
	if merged < 50 || refused < 50 {
		t.Errorf("%d merged and %d refused stacks are too few", merged, refused)
	}
}
