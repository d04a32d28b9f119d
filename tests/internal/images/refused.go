package images

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// RefusedImage is an image that containerd refuses to unpack.
type RefusedImage struct {
	Name string
	Why  string // part of what containerd says
}

// refused lists what containerd refuses, by the last part of the image's name: a layer on top of the root of the small
// images.
var refused = []struct {
	name, why string
	write     func(io.Writer) error
}{
	{"old-sparse", "unhandled tar header type 83", WriteOldSparse},
	{"short-sparse", "sparse file references non-existent data", func(w io.Writer) error {
		return replaced(w, sparse{"short", "1.0", 8192, []piece{{0, strings.Repeat("x", 1024)}}}, "1\n0\n1024\n", "1\n0\n2048\n")
	}},
	{"long-sparse", "sparse file contains unreferenced data", func(w io.Writer) error {
		return replaced(w, sparse{"long", "1.0", 8192, []piece{{0, strings.Repeat("x", 1024)}}}, "1\n0\n1024\n", "1\n0\n0512\n")
	}},
	{"lower-link", "no such file or directory", entries(func(t *tarball) { t.link("link", "etc/passwd") })},
	{"forward-link", "no such file or directory", entries(func(t *tarball) { t.link("link", "later"); t.file("later", 0o644, "") })},
	{"directory-link", "operation not permitted", entries(func(t *tarball) { t.dir("dir", 0o755); t.link("link", "dir") })},
	{"below-file", "not a directory", entries(func(t *tarball) { t.file("file", 0o644, ""); t.file("file/below", 0o644, "") })},
	{"late-whiteout", "file exists", entries(func(t *tarball) { t.file("file", 0o644, ""); t.whiteout("", "file") })},
	{"nameless-whiteout", "", entries(func(t *tarball) { t.whiteout("", "") })},
	{"long-name", "file name too long", entries(func(t *tarball) { t.file(strings.Repeat("n", 256), 0o644, "") })},
	{"long-path", "file name too long", entries(func(t *tarball) { t.file(strings.Repeat("n/", 2047)+"nn", 0o644, "") })},
	{"link-loop", "too many", entries(func(t *tarball) { t.symlink("a", "b"); t.symlink("b", "a"); t.file("a/x", 0o644, "") })},
	{"bad-capability", "invalid argument", entries(func(t *tarball) {
		t.put(tar.Header{Typeflag: tar.TypeReg, Name: "file", PAXRecords: map[string]string{paxXattr + "security.capability": "no"}}, "")
	})},
	{"bad-header", "invalid tar header", func(w io.Writer) error {
		return sparseLayer(w, sparse{"overlap", "1.0", 4096, []piece{{0, strings.Repeat("x", 1024)}, {512, "y"}}})
	}},
}

// Refused makes images in dir that containerd refuses to unpack, each on the base of the small images.
func Refused(dir string) (*Layout, []RefusedImage, error) {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return nil, nil, err
	}
	l, err := NewLayout(dir)
	if err != nil {
		return nil, nil, err
	}
	m := maker{layout: l}
	base := m.layer(l.AddLayer, func(t *tarball) { writeRoot(t, string(program)) })
	var list []RefusedImage
	for _, r := range refused {
		image := RefusedImage{Name: "example.com/refused/" + r.name + ":1", Why: r.why}
		m.image(image.Name, ocispec.ImageConfig{Env: []string{"PATH=/bin"}}, base, m.raw(l.AddLayer, r.write))
		list = append(list, image)
	}
	if m.err != nil {
		return nil, nil, m.err
	}
	return l, list, l.Finish()
}

func entries(fill func(*tarball)) func(io.Writer) error {
	return func(w io.Writer) error {
		t := newTarball(w)
		fill(t)
		return t.close()
	}
}

// WriteOldSparse is what GNU tar's --sparse --format=gnu writes, as far as containerd gets.
func WriteOldSparse(w io.Writer) error {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "old", Mode: 0o644, ModTime: Epoch.Truncate(1e9), Format: tar.FormatGNU}); err != nil {
		return err
	}
	if err := tw.Close(); err != nil {
		return err
	}
	// Map of one empty piece, and the real size.
	copy(b.Bytes()[386:], "00000000000\x0000000000000\x00")
	copy(b.Bytes()[483:], "00000000000\x00")
	retype(b.Bytes()[:512], tar.TypeGNUSparse)
	_, err := w.Write(b.Bytes())
	return err
}

// replaced writes a layer of one sparse file with another map of the same length.
func replaced(w io.Writer, f sparse, from, to string) error {
	var b bytes.Buffer
	if err := sparseLayer(&b, f); err != nil {
		return err
	}
	_, err := w.Write(bytes.Replace(b.Bytes(), []byte(from), []byte(to), 1))
	return err
}
