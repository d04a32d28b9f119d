package images

import (
	"archive/tar"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Names of the images in the layout that Small makes.
const (
	SmallName    = "example.com/small/busybox:1"       // one of everything
	SiblingName  = "example.com/small/sibling:1"       // the lower layers of SmallName, another top
	BaseName     = "example.com/small/base:1"          // the lower layers alone
	PauseName    = "example.com/small/pause:1"         // sleeps: a pod's sandbox
	PlatformName = "example.com/small/multiplatform:1" // an index: amd64 and arm64
	GzipName     = "example.com/small/gzip:1"          // the same; all layers are gzip
	DockerName   = "example.com/small/docker:1"        // Docker's media types
	ZstdName     = "example.com/small/zstd:1"          // layers are zstd
	WindowName   = "example.com/small/window:1"        // a layer in the middle is zstd with a window too large for us
	SparseName   = "example.com/small/sparse:1"        // a layer in the middle has sparse files
	OddName      = "example.com/small/odd:1"           // and one whose data does not start on a block
	HugeName     = "example.com/small/huge:1"          // and ones with holes of a TiB
)

// busybox is Debian's busybox-static: one file that needs no library.
const busybox = "/bin/busybox"

// Small makes the small images in dir. They hold one of everything that a layer can say.
func Small(dir string) (*Layout, error) {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return nil, err
	}
	l, err := NewLayout(dir)
	if err != nil {
		return nil, err
	}
	m := maker{layout: l}
	base := []Layer{
		m.layer(l.AddLayer, func(t *tarball) { writeRoot(t, string(program)) }),
		m.layer(l.AddPlainLayer, writeChanges),
		m.layer(l.AddLayer, writeOpaque),
	}
	top := m.layer(l.AddLayer, writeTop)
	empty := m.layer(l.AddLayer, func(*tarball) {})
	sibling := m.layer(l.AddLayer, func(t *tarball) { t.file("sibling", 0o644, "another top\n") })
	foreign := m.layer(l.AddLayer, func(t *tarball) { t.file("foreign", 0o644, "not for this machine\n") })

	config := ocispec.ImageConfig{Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}, WorkingDir: "/"}
	m.image(SmallName, config, append(base[:3:3], top, empty)...)
	m.image(SiblingName, config, append(base[:3:3], sibling)...)
	m.image(BaseName, config, base...)
	m.image(PauseName, ocispec.ImageConfig{Env: config.Env, Entrypoint: []string{"sleep", "1000000"}}, base[0])
	zstd := m.layer(l.AddZstdLayer, func(t *tarball) { writeRoot(t, string(program)) })
	m.image(ZstdName, config, zstd, m.layer(l.AddZstdLayer, writeChanges), top)
	// A small layer would declare a window of its own size.
	m.image(WindowName, config, base[0], m.layer(l.addLongZstdLayer, func(t *tarball) { t.file("large", 0o644, strings.Repeat("large\n", 1<<20)) }), top)
	m.image(SparseName, config, base[0], m.raw(l.AddLayer, WriteSparse), top)
	m.image(OddName, config, base[0], m.raw(l.AddLayer, writeOddSparse), top)
	m.image(HugeName, config, base[0], m.raw(l.AddLayer, writeHugeHole), top)
	if m.err == nil {
		_, m.err = l.addDockerImage(DockerName, config, base[0], base[2], top)
	}
	if m.err == nil {
		_, m.err = l.addIndex(PlatformName, config, base, map[string]Layer{"amd64": top, "arm64": foreign})
	}
	if m.err == nil {
		_, m.err = l.addIndex(GzipName, config, base[:1], map[string]Layer{"amd64": top, "arm64": foreign})
	}
	if m.err != nil {
		return nil, m.err
	}
	return l, l.Finish()
}

// maker adds to a layout until the first error.
type maker struct {
	layout *Layout
	err    error
}

// adder is one of Layout's methods that add a layer.
type adder func(func(io.Writer) error) (Layer, error)

func (m *maker) layer(add adder, fill func(*tarball)) Layer {
	return m.raw(add, func(w io.Writer) error {
		t := newTarball(w)
		fill(t)
		return t.close()
	})
}

func (m *maker) raw(add adder, write func(io.Writer) error) (layer Layer) {
	if m.err == nil {
		layer, m.err = add(write)
	}
	return layer
}

func (m *maker) image(name string, config ocispec.ImageConfig, layers ...Layer) {
	if m.err == nil {
		_, m.err = m.layout.AddImage(name, config, layers...)
	}
}

// writeRoot is the bottom layer: every type of file, and whatever metadata a file can have.
func writeRoot(t *tarball, program string) {
	// containerd leaves the root itself as it made it.
	t.put(tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o700, Uid: 5}, "")
	for _, d := range []string{"bin", "etc", "usr", "usr/lib", "data", "gone", "gone/deep", "opaque", "opaque/sub", "swap", "grown", "proc", "sys", "dev"} {
		t.dir(d, 0o755)
	}
	t.dir("tmp", 0o1777)
	t.file("bin/busybox", 0o755, program)
	for _, applet := range []string{"sh", "cat", "ls", "echo", "find", "stat", "md5sum", "sleep", "touch", "id", "head", "dd"} {
		t.symlink("bin/"+applet, "busybox")
	}
	t.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n")
	writeModes(t)
	writeNames(t)
	writeSizes(t)
	for _, f := range []string{"gone/file", "gone/deep/file", "opaque/hidden", "opaque/sub/hidden", "swap/inside", "kind", "again", "single"} {
		t.file(f, 0o644, "bottom "+f+"\n")
	}
	// Nothing says that these directories exist.
	t.file("implied/dir/file", 0o640, "its directories are implied\n")
	// A path that goes through a link of the same layer.
	t.symlink("lib", "usr/lib")
	t.file("lib/through", 0o644, "written through a link\n")
	t.symlink("dangling", "/nowhere/at/all")
	t.symlink("absolute", "/etc/passwd")
}

func writeModes(t *tarball) {
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: "data/setuid", Mode: 0o4755, Uid: 1000, Gid: 100}, "setuid\n")
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: "data/setgid", Mode: 0o2711, Uid: 1, Gid: 2}, "setgid\n")
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: "data/secret", Mode: 0, Uid: 4000000000, Gid: 3000000000}, "no mode, large owner\n")
	t.put(tar.Header{Typeflag: tar.TypeDir, Name: "data/shared/", Mode: 0o2775, Gid: 50}, "")
	t.put(tar.Header{Typeflag: tar.TypeChar, Name: "data/null", Mode: 0o666, Devmajor: 1, Devminor: 3}, "")
	t.put(tar.Header{Typeflag: tar.TypeBlock, Name: "data/disk", Mode: 0o660, Devmajor: 259, Devminor: 300}, "")
	t.put(tar.Header{Typeflag: tar.TypeFifo, Name: "data/fifo", Mode: 0o622}, "")
	t.put(tar.Header{Typeflag: tar.TypeSymlink, Name: "data/link", Linkname: "setuid", Uid: 7, Gid: 8, Mode: 0o777}, "")
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: "data/attributes", Mode: 0o755, PAXRecords: map[string]string{
		// CAP_NET_BIND_SERVICE, effective and permitted, revision 2.
		paxXattr + "security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		paxXattr + "user.comment":        "of a user",
		paxXattr + "user.empty":          "",
		paxXattr + "user.long":           strings.Repeat("x", 1000),
		paxXattr + "trusted.comment":     "of the system",
	}}, "extended attributes\n")
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: "data/acl", Mode: 0o674, PAXRecords: map[string]string{
		// user::rw-, user:1000:r--, group::r--, mask::rwx, other::r--
		paxXattr + "system.posix_acl_access": "\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" +
			"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x07\x00\xff\xff\xff\xff" + "\x20\x00\x04\x00\xff\xff\xff\xff",
	}}, "access control list\n")
	t.file("data/a", 0o644, "three names\n")
	t.link("data/b", "data/a")
	t.link("data/c", "data/a")
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: "data/old", Mode: 0o644, ModTime: time.Date(1901, 12, 13, 21, 0, 0, 0, time.UTC)}, "older than Unix\n")
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: "data/future", Mode: 0o644, ModTime: time.Date(2200, 1, 1, 0, 0, 0, 1, time.UTC)}, "of 2200\n")
}

func writeNames(t *tarball) {
	t.dir("names", 0o755)
	for _, name := range []string{strings.Repeat("n", 255), "sp ace", "new\nline", "ünï", "raw\xff\xfebytes", "-rf", "back\\slash", ".hidden", "UPPER", "upper"} {
		t.file("names/"+name, 0o644, name)
	}
	deep := "names" + strings.Repeat("/"+strings.Repeat("d", 100), 12)
	t.dir(deep, 0o755)
	t.file(deep+"/file", 0o644, "far down\n")
	t.symlink("names/long", strings.Repeat("../names/", 100)+"upper")
	t.dir("many", 0o755)
	for i := range 3000 {
		t.file("many/"+strings.Repeat("f", i%200)+string(rune('a'+i%26))+strings.Repeat("x", i/200), 0o644, strings.Repeat("y", i))
	}
}

// writeSizes has sizes around the block and span sizes that anybody uses, with content that does and that does not
// compress.
func writeSizes(t *tarball) {
	t.dir("sizes", 0o755)
	random := rand.NewChaCha8([32]byte{'c', 'l', 'i', 'p'})
	noise := make([]byte, 3<<20+1)
	_, _ = random.Read(noise) // it never fails
	for _, s := range []struct {
		name string
		size int
	}{{"0", 0}, {"1", 1}, {"511", 511}, {"512", 512}, {"513", 513}, {"4095", 4095}, {"4096", 4096}, {"4097", 4097}, {"65536", 65536}, {"1M", 1 << 20}, {"3M+1", 3<<20 + 1}} {
		t.file("sizes/noise-"+s.name, 0o644, string(noise[:s.size]))
		t.file("sizes/zeros-"+s.name, 0o644, strings.Repeat("\x00", s.size))
		t.file("sizes/text-"+s.name, 0o644, strings.Repeat("a line of text, ", s.size/16+1)[:s.size])
	}
}

// writeChanges removes and replaces. It is not compressed.
func writeChanges(t *tarball) {
	t.whiteout("", "gone")
	t.whiteout("", "single")
	t.whiteout("", "never-was")
	t.whiteout("data/", "c")
	t.whiteout("", "again")
	t.file("again", 0o600, "removed and made again in one layer\n")
	t.file("swap", 0o644, "was a directory\n")
	t.dir("kind", 0o750)
	t.file("kind/inside", 0o644, "was a file\n")
	t.dir("etc", 0o711)
	t.file("etc/passwd", 0o600, "root:x:0:0:changed:/root:/bin/sh\n")
	t.file("grown/new", 0o644, "in a directory that this layer does not list\n")
	t.put(tar.Header{Typeflag: tar.TypeDir, Name: "data/shared/", Mode: 0o2755, Gid: 51, PAXRecords: map[string]string{paxXattr + "user.dir": "y"}}, "")
}

// writeOpaque hides what a directory held, before and after the marker.
func writeOpaque(t *tarball) {
	t.dir("opaque", 0o755)
	t.file("opaque/before", 0o644, "before the marker\n")
	t.file("opaque/"+opaqueMarker, 0, "")
	t.file("opaque/after", 0o644, "after the marker\n")
	t.dir("opaque/sub", 0o700)
	t.file("opaque/sub/new", 0o644, "in a directory that was hidden\n")
}

func writeTop(t *tarball) {
	t.dir("app", 0o755)
	t.file("app/run.sh", 0o755, "#!/bin/sh\necho hello from $(cat /app/name)\n")
	t.file("app/name", 0o644, "clip\n")
	t.link("app/alias", "app/name")
	t.put(tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755}, "")
}
