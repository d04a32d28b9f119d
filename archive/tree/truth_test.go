package tree_test

import (
	"archive/tar"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
	mounts "github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// The list of what a root must get right. In each case the root is compared
// with containerd's own unpack through overlayfs: names, modes, owners, link
// counts, inode numbers, devices, times, targets, xattrs and contents, in
// memory and mounted in each of the modes; refusals too. want is there to see
// that the case is what its name says.
//
// Not here, because a tree does not show it: zstd and uncompressed layers
// (archive/layer, tests/e2e), holes that cannot be unpacked (archive/erofs,
// tests/e2e TestHugeHoles), old GNU sparse files (archive/layer refuses them;
// tests/e2e TestRefusedImages), an image named by digest and a tag that moves
// (tests/e2e TestByDigest, TestMovedTag), a million entries (tests/e2e
// TestMillionEntries).
type truth struct {
	name   string
	layers [][]file
	want   string
}

func sparse(name, version string, size int64, pieces ...testimage.Piece) file {
	return file{Sparse: &testimage.Sparse{
		Header:  tar.Header{Typeflag: tar.TypeReg, Name: "sparse", Mode: 0o644, ModTime: time.Unix(1e9, 0)},
		Version: version, Size: size, Pieces: pieces, Records: map[string]string{"path": name},
	}}
}

func gnu(f file) file { f.Format = tar.FormatGNU; return f }

// wrongInCLIP are the cases that upstream CLIP gets wrong, fails at or
// corrupts.
var wrongInCLIP = []truth{
	{"setuid, setgid, sticky", [][]file{{reg("su", "").mode(0o4755), reg("wall", "").mode(0o2755), dir("tmp").mode(0o1777), dir("all").mode(0o7777)}}, "all/ su= tmp/ wall="},
	{"xattrs: capability, user", [][]file{{reg("ping", "").xattr("security.capability", capability(2)), reg("u", "").xattr("user.a", "\x00\xff=\n"), dir("d").xattr("user.b", "")}}, "d/ ping= u="},
	{"char, block, fifo", [][]file{{entry(tar.TypeChar, "null", "", "").dev(1, 3), entry(tar.TypeBlock, "sda", "", "").dev(8, 0), entry(tar.TypeFifo, "pipe", "", "")}}, "null#1:3 pipe#0:0 sda#8:0"},
	{"missing parents", [][]file{{reg("mp/a/b/c.txt", "c")}}, "mp/ mp/a/ mp/a/b/ mp/a/b/c.txt=c"},
	{"directory, file, directory", [][]file{{reg("d2f2d/child", "1")}, {reg("d2f2d", "2")}, {dir("d2f2d")}}, "d2f2d/"},
	{"directory to file", [][]file{{reg("d/stale", "1")}, {reg("d", "2")}}, "d=2"},
	{"directory to symlink", [][]file{{reg("d/stale", "1"), dir("e")}, {sym("d", "e")}}, "d->e e/"},
	{"opaque marker after new children", [][]file{{reg("d/old", "1")}, {dir("d"), reg("d/new1", "2"), wh("d/.wh..wh..opq"), reg("d/new2", "3")}}, "d/ d/new1=2 d/new2=3"},
	{"whiteout after the file in its layer", [][]file{{reg("f2", "1")}, {reg("f2", "2"), wh(".wh.f2")}}, refusal},
	{"opaque marker at the root", [][]file{{reg("a", "1")}, {wh(".wh..wh..opq"), reg("b", "2")}}, "a=1 b=2"},
	{"hard link, its other name deleted above", [][]file{{reg("a", "1"), hard("b", "a")}, {wh(".wh.a")}}, "b=1"},
	{"hard link into an earlier layer", [][]file{{reg("a", "1")}, {hard("b", "a")}}, refusal},
	{"hard link to a symlink", [][]file{{sym("s", "t"), hard("l", "s"), reg("t", "1")}}, "l->t s==l t=1"},
	{"sparse 0.0", [][]file{{sparse("f", "0.0", 2048, testimage.Piece{Pos: 1024, Data: strings.Repeat("x", 512)})}}, "f=" + holes(1024, 512, 512)},
	{"sparse 0.1", [][]file{{sparse("f", "0.1", 2048, testimage.Piece{Pos: 1024, Data: strings.Repeat("x", 512)})}}, "f=" + holes(1024, 512, 512)},
	{"sparse 1.0", [][]file{{sparse("f", "1.0", 2048, testimage.Piece{Pos: 1024, Data: strings.Repeat("x", 512)})}}, "f=" + holes(1024, 512, 512)},
	{"times without PAX", [][]file{{gnu(reg("f", "1").time(time.Unix(1e9, 0)))}}, "f=1"},
	{"no / entry", [][]file{{reg("a", "1")}, {reg("b", "2")}}, "a=1 b=2"},
}

// holes is a hole, a piece of data and another hole.
func holes(before, data, after int) string {
	return strings.Repeat("\x00", before) + strings.Repeat("x", data) + strings.Repeat("\x00", after)
}

var named = []truth{
	{"xattrs of all namespaces", [][]file{{
		reg("f", "").xattr("user.a", "1").xattr("security.selinux", "system_u:object_r:x:s0\x00").xattr("trusted.a", "dropped").xattr("system.other", "dropped").xattr("nonsense", "dropped"),
		sym("s", "t").xattr("security.a", "1").xattr("user.a", "dropped"),
		entry(tar.TypeFifo, "p", "", "").xattr("security.a", "\xff\x00").xattr("user.a", "dropped"),
	}}, "f= p#0:0 s->t"},
	{"POSIX ACLs", [][]file{{
		dir("d").xattr("system.posix_acl_access", fullACL).xattr("system.posix_acl_default", fullACL),
		reg("d/inherits", ""), dir("d/sub"), reg("f", "").xattr("system.posix_acl_access", fullACL),
	}}, "d/ d/inherits= d/sub/ f="},
	{"ACLs through layers", [][]file{{dir("d").xattr("system.posix_acl_default", fullACL)}, {reg("d/x", ""), reg("d/sub/y", "")}}, "d/ d/sub/ d/sub/y= d/x="},
	{"capability with a root ID", [][]file{{reg("f", "").xattr("security.capability", capability(3)+"\xe8\x03\x00\x00")}}, "f="},
	{"big device numbers", [][]file{{entry(tar.TypeChar, "c", "", "").dev(4095, 1<<20-1), entry(tar.TypeBlock, "b", "", "").dev(259, 65536)}}, "b#259:65536 c#4095:1048575"},

	{"hard links of a file, a symlink, a fifo, a device", [][]file{{
		reg("f", "1"), hard("f1", "f"), hard("f2", "f1"), sym("s", "f"), hard("s1", "s"),
		entry(tar.TypeFifo, "p", "", ""), hard("p1", "p"), entry(tar.TypeChar, "c", "", "").dev(1, 5), hard("c1", "c"),
	}}, "c#1:5 c1==c f=1 f1==f f2==f p#0:0 p1==p s->f s1==s"},
	{"hard link to a file overwritten later in the layer", [][]file{{reg("a", "1"), hard("b", "a"), reg("a", "2"), hard("c", "a")}}, "a=2 b=1 c==a"},
	{"hard link to a file overwritten above", [][]file{{reg("a", "1"), hard("b", "a")}, {reg("a", "2")}}, "a=2 b=1"},
	{"hard link whited out, then made again", [][]file{{reg("a", "1"), hard("b", "a")}, {wh(".wh.a")}, {reg("a", "3"), hard("c", "a")}}, "a=3 b=1 c==a"},

	{"whiteout of what never was, at the root and below", [][]file{{reg("a", "1")}, {wh(".wh.no"), wh("dir/.wh.no")}}, "a=1 dir/"},
	{"whiteout, then what it hid", [][]file{{reg("a", "1"), reg("d/x", "1")}, {wh(".wh.a"), reg("a", "2"), wh(".wh.d"), dir("d"), reg("d/y", "2")}}, "a=2 d/ d/x=1 d/y=2"},
	{"opaque first, last and twice", [][]file{{reg("d/1", "1"), reg("e/1", "1")}, {wh("d/.wh..wh..opq"), reg("d/2", "2"), wh("d/.wh..wh..opq")}, {reg("e/2", "2"), wh("e/.wh..wh..opq")}}, "d/ d/2=2 e/ e/2=2"},
	{"opaque of what never was", [][]file{{reg("a", "1")}, {wh("no/.wh..wh..opq")}}, "a=1 no/"},
	{"opaque, then the subdirectory again", [][]file{{reg("d/s/1", "1")}, {wh("d/.wh..wh..opq"), dir("d/s"), reg("d/s/2", "2")}}, "d/ d/s/ d/s/2=2"},

	{"directory, file, symlink", [][]file{{reg("x/1", "1"), dir("y")}, {reg("x", "2")}, {sym("x", "y")}}, "x->y y/"},
	{"file, symlink, directory", [][]file{{reg("x", "1"), reg("y/1", "1")}, {sym("x", "y")}, {dir("x"), reg("x/3", "3")}}, "x/ x/3=3 y/ y/1=1"},
	{"symlink, directory, file", [][]file{{sym("x", "y"), reg("y/1", "1")}, {dir("x"), reg("x/2", "2")}, {reg("x", "3")}}, "x=3 y/ y/1=1"},
	{"symlink, whiteout, directory", [][]file{{sym("x", "y"), reg("y/1", "1")}, {wh(".wh.x")}, {reg("x/3", "3")}}, "x/ x/3=3 y/ y/1=1"},

	{"/lib -> usr/lib below, lib/x above", [][]file{{dir("usr/lib").mode(0o711), sym("lib", "usr/lib")}, {reg("lib/x", "2")}}, "lib/ lib/x=2 usr/ usr/lib/"},
	{"/lib -> usr/lib in the layer itself", [][]file{{reg("usr/lib/a", "1")}, {sym("lib", "usr/lib"), reg("lib/x", "2")}}, "lib->usr/lib usr/ usr/lib/ usr/lib/a=1 usr/lib/x=2"},
	{"whiteout through a symlinked directory", [][]file{{reg("usr/lib/a", "1"), sym("lib", "usr/lib")}, {sym("lib", "usr/lib"), wh("lib/.wh.a")}}, "lib->usr/lib usr/ usr/lib/"},
	{"missing parents through a symlink to nowhere", [][]file{{sym("s", "a/b"), reg("s/c/d", "1")}}, "a/ a/b/ a/b/c/ a/b/c/d=1 s->a/b"},

	{"./, absolute, trailing slash, duplicates", [][]file{{dir("./"), reg("./a", "1"), reg("/b", "2"), dir("/c/"), dir("c"), reg("c/x", "3"), reg("a", "4"), dir("//d//")}}, "a=4 b=2 c/ c/x=3 d/"},
	{"names that want to escape", [][]file{{reg("../../etc/shadow", "1"), reg("/../b", "2"), reg("c/../../d", "3"), sym("up", "../../.."), reg("up/e", "4")}}, "b=2 d=3 e=4 etc/ etc/shadow=1 up->../../.."},
	{"a hard link that wants to escape", [][]file{{hard("l", "../../../../../../etc/passwd")}}, refusal},
	{"a hard link that escapes through a symlink", [][]file{{sym("s", "/"), hard("l", "s/../../etc/passwd")}}, refusal},
	{"whiteouts that want to escape", [][]file{{reg("a", "1")}, {wh("../../.wh.a")}}, ""},
	{"names of 255 bytes", [][]file{{reg(strings.Repeat("n", 255), "1"), dir(strings.Repeat("d", 255)), sym(strings.Repeat("s", 255), strings.Repeat("t", 4095))}},
		strings.Repeat("d", 255) + "/ " + strings.Repeat("n", 255) + "=1 " + strings.Repeat("s", 255) + "->" + strings.Repeat("t", 4095)},
	{"a name of 256 bytes", [][]file{{reg(strings.Repeat("n", 256), "1")}}, refusal},
	{"a path of 3001 bytes", // what can be scanned; TestDeepPaths has the longest
		[][]file{{reg(strings.Repeat("n/", 1500)+"n", "1")}}, deepListing(1500)},
	{"a path beyond 4096 bytes", [][]file{{reg(strings.Repeat("n/", 2047)+"nn", "1")}}, refusal},
	{"a path beyond 4096 bytes in two layers", [][]file{{dir(strings.Repeat("n/", 1000))}, {reg(strings.Repeat("n/", 2060)+"f", "1")}}, refusal},
	{"bytes that are not UTF-8, newline, blank, control", [][]file{{reg("\xff\xfe", "1"), reg("new\nline", "2"), reg(" ", "3"), reg("\x01\x7f", "4"), gnu(reg("gnu\xff", "5"))}}, "\x01\x7f=4  =3 gnu\xff=5 new\nline=2 \xff\xfe=1"},
	{"names with a meaning to tar", [][]file{{reg("PaxHeaders.0/a", "1"), reg("././@LongLink", "2"), reg(".whx", "3"), reg(".wh", "4")}}, ".wh=4 .whx=3 @LongLink=2 PaxHeaders.0/ PaxHeaders.0/a=1"},
	{"GNU long names and targets", [][]file{{gnu(reg(strings.Repeat("long/", 60)+"f", "1")), gnu(sym("s", strings.Repeat("t", 300)))}}, longListing(60)},

	{"PAX times with nanoseconds, large owners", [][]file{{reg("a", "").time(time.Unix(1e9, 123456789)).owner(1<<32-2, 3e9), dir("d").time(time.Unix(1e9, 999999999)), sym("s", "t").time(time.Unix(5, 5))}}, "a= d/ s->t"},
	{"before 1970, after 2038, after 2262", [][]file{{reg("a", "").time(time.Unix(-1e9, 0)), reg("b", "").time(time.Unix(1<<32, 7)), reg("c", "").time(time.Unix(1<<34, 0)), gnu(reg("d", "").time(time.Unix(-5, 0)))}}, "a= b= c= d="},
	{"empty layers, empty files, nothing", [][]file{nil, nil, {reg("a", "")}, nil}, "a="},
	{"nothing at all", [][]file{nil, nil}, ""},
	{"a / entry in each layer", [][]file{{dir("/").mode(0o700).time(time.Unix(1, 1))}, {dir("./").mode(0o711).owner(7, 7).time(time.Unix(2, 2))}, {reg("a", "")}}, "a="},

	{"sparse: holes everywhere", [][]file{{
		sparse("all", "1.0", 100_000, testimage.Piece{Pos: 100_000}),
		sparse("end", "0.0", 8192+3, testimage.Piece{Pos: 8192, Data: "end"}),
		sparse("start", "0.1", 1<<20, testimage.Piece{Pos: 0, Data: strings.Repeat("s", 4096)}),
		hard("link", "start"),
	}, {sparse("all", "1.0", 0), hard("link2", "all")}}, sparseListing()},
}

// fullACL names a user and a group.
var fullACL = encodeACL(2, []ace{{1, 7, 1<<32 - 1}, {2, 6, 1000}, {4, 5, 1<<32 - 1}, {8, 4, 100}, {16, 7, 1<<32 - 1}, {32, 1, 1<<32 - 1}})

func deepListing(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%s/ ", strings.Repeat("n/", i)+"n")
	}
	return b.String() + strings.Repeat("n/", n) + "n=1"
}

func longListing(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%s/ ", strings.Repeat("long/", i)+"long")
	}
	return b.String() + strings.Repeat("long/", n) + "f=1 s->" + strings.Repeat("t", 300)
}

func sparseListing() string {
	return "all= end=" + strings.Repeat("\x00", 8192) + "end link=" + strings.Repeat("s", 4096) + strings.Repeat("\x00", 1<<20-4096) +
		" link2==all start==link"
}

func TestTruth(t *testing.T) {
	need.Root(t)
	for list, cases := range map[string][]truth{"wrong in CLIP": wrongInCLIP, "named": named} {
		for _, c := range cases {
			t.Run(list+"/"+c.name, func(t *testing.T) {
				root, tars, err := mergeTars(t, c.layers)
				if c.want == refusal {
					if !errors.Is(err, tree.ErrInvalid) {
						t.Errorf("got %v, want ErrInvalid", err)
					}
				} else if err != nil {
					t.Fatal(err)
				} else if got := listing(flatten(t, root, tars)); got != c.want {
					t.Errorf("got  %.2000q\nwant %.2000q", got, c.want)
				}
				checkPeer(t, root, tars, modes...)
			})
		}
	}
}

// TestHugeDirectory has more than 100,000 entries in one directory, in two
// layers, some of them removed.
func TestHugeDirectory(t *testing.T) {
	need.Root(t)
	lower, upper := make([]file, 0, 100_100), []file{}
	for i := range 100_100 {
		lower = append(lower, reg(fmt.Sprintf("many/%d", i), ""))
		if i%1000 == 0 {
			upper = append(upper, wh(fmt.Sprintf("many/.wh.%d", i)), reg(fmt.Sprintf("many/new-%d", i), "new"))
		}
	}
	root, tars, err := mergeTars(t, [][]file{lower, upper})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(root.Children[0].Node.Children); n != 100_100 {
		t.Errorf("%d entries", n)
	}
	checkPeer(t, root, tars, mounts.File)
}
