package images

import (
	"archive/tar"
	"io"
	"strings"
)

// tarball writes a layer entry by entry. The first error is kept and returned by close.
type tarball struct {
	tw  *tar.Writer
	err error
}

func newTarball(w io.Writer) *tarball { return &tarball{tw: tar.NewWriter(w)} }

// put writes an entry as it is, with Epoch unless it has a time.
func (t *tarball) put(h tar.Header, body string) {
	if t.err != nil {
		return
	}
	h.Format, h.Size = tar.FormatPAX, int64(len(body))
	if h.ModTime.IsZero() {
		h.ModTime = Epoch
	}
	if t.err = t.tw.WriteHeader(&h); t.err == nil {
		_, t.err = io.Copy(t.tw, strings.NewReader(body))
	}
}

func (t *tarball) dir(name string, mode int64) {
	t.put(tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}, "")
}

func (t *tarball) file(name string, mode int64, body string) {
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, body)
}

func (t *tarball) symlink(name, target string) {
	t.put(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, "")
}

func (t *tarball) link(name, target string) {
	t.put(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, "")
}

func (t *tarball) whiteout(dir, name string) {
	t.file(dir+whiteoutPrefix+name, 0, "")
}

func (t *tarball) close() error {
	if t.err != nil {
		return t.err
	}
	return t.tw.Close()
}
