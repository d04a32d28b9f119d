// Package rootdiff compares two root filesystems: everything that a process in them can see.
package rootdiff

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Entry is what can be seen of one name.
type Entry struct {
	Mode     uint32 // type and permissions as stat(2) has them
	UID, GID uint32
	Size     int64 // 0 for directories, whose size is the filesystem's own business
	Rdev     uint64
	Mtime    unix.Timespec
	Nlink    uint64 // 0 for directories, which overlayfs counts in a way of its own
	Peers    string // the names that share the inode, for a file with several
	Target   string
	Xattrs   map[string]string
	SHA256   [sha256.Size]byte
}

// Tree maps the names in a root, "." first, to what is there.
type Tree map[string]Entry

// Read walks a root and reads every file in it.
func Read(root string) (Tree, error) {
	r := reader{root: root, entries: map[string]*Entry{}, peers: map[uint64][]string{}}
	r.hashes.SetLimit(runtime.GOMAXPROCS(0))
	err := filepath.WalkDir(root, r.visit)
	if err := errors.Join(err, r.hashes.Wait()); err != nil {
		return nil, err
	}
	tree := Tree{}
	for name, e := range r.entries {
		tree[name] = *e
	}
	for _, names := range r.peers {
		for _, name := range names {
			e := tree[name]
			e.Peers = strings.Join(names, " ")
			tree[name] = e
		}
	}
	return tree, nil
}

type reader struct {
	root    string
	entries map[string]*Entry
	peers   map[uint64][]string // inode -> names, in walking order
	hashes  errgroup.Group
}

func (r *reader) visit(path string, _ fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	name, err := filepath.Rel(r.root, path)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	e := &Entry{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Size: st.Size, Rdev: st.Rdev, Mtime: st.Mtim, Nlink: uint64(st.Nlink)}
	r.entries[name] = e
	if e.Xattrs, err = xattrs(path); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&syscall.S_IFMT == syscall.S_IFDIR {
		e.Size, e.Nlink = 0, 0
	} else if st.Nlink > 1 {
		r.peers[st.Ino] = append(r.peers[st.Ino], name)
	}
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFLNK:
		e.Target, err = os.Readlink(path)
	case syscall.S_IFREG:
		r.hashes.Go(func() (err error) {
			e.SHA256, err = hash(path)
			return err
		})
	}
	return err
}

func hash(path string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, err
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

func xattrs(path string) (map[string]string, error) {
	names, err := sysx.LListxattr(path)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil // a filesystem without any
	}
	if err != nil {
		return nil, fmt.Errorf("listing extended attributes: %w", err)
	}
	found := map[string]string{}
	for _, name := range names {
		value, err := sysx.LGetxattr(path, name)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", name, err)
		}
		found[name] = string(value)
	}
	return found, nil
}

// Diff says every difference, one per line, sorted by name. A directory that no layer describes has the time at which
// it was unpacked: the modification time of a directory that want dates after start is not compared.
func Diff(want, got Tree, start time.Time) []string {
	names := maps.Clone(want)
	maps.Copy(names, got)
	var diffs []string
	for _, name := range slices.Sorted(maps.Keys(names)) {
		w, inWant := want[name]
		g, inGot := got[name]
		switch {
		case !inGot:
			diffs = append(diffs, fmt.Sprintf("%q is missing", name))
		case !inWant:
			diffs = append(diffs, fmt.Sprintf("%q is there and should not be", name))
		default:
			if w.Mode&unix.S_IFMT == unix.S_IFDIR && time.Unix(w.Mtime.Unix()).After(start) {
				g.Mtime = w.Mtime
			}
			diffs = append(diffs, w.diff(name, g)...)
		}
	}
	return diffs
}

func (e Entry) diff(name string, got Entry) (diffs []string) {
	compare := func(what string, want, got any) {
		if want != got {
			diffs = append(diffs, fmt.Sprintf("%q: %s is %v, not %v", name, what, got, want))
		}
	}
	compare("mode", fmt.Sprintf("%o", e.Mode), fmt.Sprintf("%o", got.Mode))
	compare("owner", fmt.Sprint(e.UID, ":", e.GID), fmt.Sprint(got.UID, ":", got.GID))
	compare("size", e.Size, got.Size)
	compare("device", e.Rdev, got.Rdev)
	compare("mtime", e.Mtime, got.Mtime)
	compare("link count", e.Nlink, got.Nlink)
	compare("names of the inode", e.Peers, got.Peers)
	compare("link target", e.Target, got.Target)
	compare("extended attributes", fmt.Sprintf("%q", e.Xattrs), fmt.Sprintf("%q", got.Xattrs))
	compare("content", fmt.Sprintf("%x", e.SHA256), fmt.Sprintf("%x", got.SHA256))
	return diffs
}
