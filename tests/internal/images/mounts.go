package images

import (
	"archive/tar"
	"fmt"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Names of the images in the layout that Mounts makes.
const (
	OwnersName = "example.com/mounts/owners:1" // every owner is one that a user namespace may have
	LayersName = "example.com/mounts/layers:1" // as many layers as an image may have
)

// ManyLayers is how many layers LayersName has. More do not fit into an overlay of containerd's.
const ManyLayers = 127

// Mounts makes the images with which mounts are tested, in dir.
func Mounts(dir string) (*Layout, error) {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return nil, err
	}
	l, err := NewLayout(dir)
	if err != nil {
		return nil, err
	}
	m := maker{layout: l}
	base := m.layer(l.AddLayer, func(t *tarball) { writeBusybox(t, string(program)) })
	config := ocispec.ImageConfig{Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}, WorkingDir: "/"}
	m.image(OwnersName, config, base, m.layer(l.AddLayer, writeOwners))
	layers := []Layer{base}
	for i := 1; i < ManyLayers; i++ {
		layers = append(layers, m.layer(l.AddLayer, func(t *tarball) { writeOneOfMany(t, i) }))
	}
	m.image(LayersName, config, layers...)
	if m.err != nil {
		return nil, m.err
	}
	return l, l.Finish()
}

// writeBusybox writes what a shell needs.
func writeBusybox(t *tarball, program string) {
	for _, d := range []string{"bin", "etc", "layers", "proc", "sys", "dev"} {
		t.dir(d, 0o755)
	}
	t.dir("tmp", 0o1777)
	t.file("bin/busybox", 0o755, program)
	for _, applet := range []string{"sh", "cat", "ls", "echo", "find", "stat", "sort", "chown", "mkdir", "mount", "umount", "chroot", "id", "wc"} {
		t.symlink("bin/"+applet, "busybox")
	}
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: "bin/reader", Mode: 0o755, PAXRecords: map[string]string{
		// CAP_DAC_READ_SEARCH, effective and permitted, revision 2: who runs it reads everything.
		paxXattr + "security.capability": "\x01\x00\x00\x02\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	}}, program)
	t.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:100:user:/:/bin/sh\n")
}

// writeOwners writes every type of file with owners of their own.
func writeOwners(t *tarball) {
	put := func(kind byte, name string, mode int64, h tar.Header, body string) {
		h.Typeflag, h.Name, h.Mode, h.Uid, h.Gid = kind, "owners/"+name, mode, len(name), 60000+len(name)
		t.put(h, body)
	}
	t.dir("owners", 0o755)
	put(tar.TypeReg, "file", 0o640, tar.Header{}, "a file\n")
	put(tar.TypeReg, "setuid", 0o6755, tar.Header{}, "runs as its owner\n")
	put(tar.TypeDir, "shared-directory/", 0o3775, tar.Header{}, "")
	put(tar.TypeReg, "shared-directory/inside", 0o600, tar.Header{}, "inside\n")
	put(tar.TypeSymlink, "link", 0o777, tar.Header{Linkname: "file"}, "")
	put(tar.TypeFifo, "a-fifo", 0o622, tar.Header{}, "")
	put(tar.TypeChar, "character", 0o666, tar.Header{Devmajor: 1, Devminor: 3}, "")
	put(tar.TypeLink, "another-name", 0o640, tar.Header{Linkname: "owners/file"}, "")
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: "owners/last", Mode: 0o644, Uid: 65535, Gid: 65535}, "the last owner\n")
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: "owners/root", Mode: 0o644}, "of root\n")
}

// writeOneOfMany adds a file, changes one, and removes one that the layer before added.
func writeOneOfMany(t *tarball, i int) {
	t.file(fmt.Sprintf("layers/%d", i), 0o644, fmt.Sprintf("of layer %d\n", i))
	t.file("layers/last", 0o644, fmt.Sprintf("last changed by layer %d\n", i))
	if i%3 == 0 {
		t.whiteout("layers/", fmt.Sprint(i-1))
	}
}
