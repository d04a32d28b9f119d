package images

import (
	"archive/tar"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/continuity/sysx"
)

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
	paxXattr       = "SCHILY.xattr."
	overlayXattr   = "trusted.overlay."
)

// writeUpper writes an overlay's upper directory as a layer: device 0:0 becomes a whiteout, an opaque directory gets
// its marker. A directory that never was an upper one is written as it is.
func writeUpper(w io.Writer, dir string) error {
	u := &upper{tw: tar.NewWriter(w), dir: dir, links: map[uint64]string{}}
	if err := filepath.WalkDir(dir, u.visit); err != nil {
		return err
	}
	return u.tw.Close()
}

type upper struct {
	tw    *tar.Writer
	dir   string
	links map[uint64]string // inode -> the first name of a file that has several
}

func (u *upper) visit(path string, d fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	name, err := filepath.Rel(u.dir, path)
	if err != nil || name == "." {
		return err
	}
	info, err := d.Info()
	if err != nil {
		return err
	}
	stat := info.Sys().(*syscall.Stat_t)
	switch {
	case info.Mode()&fs.ModeSocket != 0:
		return nil // a layer cannot say it
	case info.Mode()&fs.ModeCharDevice != 0 && stat.Rdev == 0:
		return u.marker(filepath.Join(filepath.Dir(name), whiteoutPrefix+filepath.Base(name)))
	}
	if err := u.entry(path, name, info, stat); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if !info.IsDir() {
		return nil
	}
	if opaque, err := sysx.LGetxattr(path, overlayXattr+"opaque"); err != nil || string(opaque) != "y" {
		return nil // the attribute is absent
	}
	return u.marker(filepath.Join(name, opaqueMarker))
}

func (u *upper) marker(name string) error {
	return u.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name})
}

func (u *upper) entry(path, name string, info fs.FileInfo, stat *syscall.Stat_t) error {
	var target string
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name, h.Format = name, tar.FormatPAX
	if info.IsDir() {
		h.Name += "/"
	}
	h.Uname, h.Gname = "", "" // they would be this machine's
	// As containerd, BuildKit and docker write times: most headers need no PAX records then.
	h.ModTime, h.AccessTime, h.ChangeTime = h.ModTime.Truncate(time.Second), time.Time{}, time.Time{}
	if first, ok := u.links[stat.Ino]; ok && !info.IsDir() {
		h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		return u.tw.WriteHeader(h)
	}
	if stat.Nlink > 1 && !info.IsDir() {
		u.links[stat.Ino] = name
	}
	if h.PAXRecords, err = paxXattrs(path); err != nil {
		return err
	}
	if err := u.tw.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(u.tw, f)
	return err
}

// paxXattrs reads extended attributes as PAX records; those of overlayfs are not part of the file.
func paxXattrs(path string) (map[string]string, error) {
	names, err := sysx.LListxattr(path)
	if err != nil {
		return nil, err
	}
	records := map[string]string{}
	for _, name := range names {
		if strings.HasPrefix(name, overlayXattr) {
			continue
		}
		value, err := sysx.LGetxattr(path, name)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", name, err)
		}
		records[paxXattr+name] = string(value)
	}
	return records, nil
}
