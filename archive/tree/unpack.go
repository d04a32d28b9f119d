package tree

import (
	"errors"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Names with a meaning of their own, from the OCI image specification.
const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
)

// keepID as an owner leaves it as it is: chown(2) takes -1 so.
const keepID = math.MaxUint32

// The latest modification time that containerd sets: its nanoseconds since
// 1970 fit 63 bits.
const (
	maxSec  = math.MaxInt64 / int64(1e9)
	maxNsec = math.MaxInt64 % int64(1e9)
)

// inode is a Node under construction.
type inode struct {
	Node
	kids   *kids // directories only; nil once merged
	opaque bool
}

func (in *inode) format() uint32 { return in.Mode & unix.S_IFMT }
func (in *inode) dir() bool      { return in.format() == unix.S_IFDIR }
func (in *inode) symlink() bool  { return in.format() == unix.S_IFLNK }

// whiteout reports what overlayfs takes for one: a character device 0:0, be it
// made from a whiteout entry or from an entry that says just that.
func (in *inode) whiteout() bool { return in.format() == unix.S_IFCHR && in.Rdev == 0 }

// upper is the directory that one layer is unpacked into.
type upper struct {
	finder
	index     int
	below     []*upper      // the layers below, the bottom one first
	lowers    []lower       // the same, the nearest first; made when they are needed
	rootTimed bool          // an entry said when the root was modified
	done      chan struct{} // closed when the layer is unpacked, or is not going to be
	err       error         // why it is not; read only after done

	last    resolved // the directory of the previous entry
	removed bool     // something was removed: earlier resolutions may be void

	// Bottom layer only: what an opaque marker needs to know.
	unpacked []placed            // every entry written, in order
	indexed  map[string]struct{} // paths of a first part of unpacked
	opaqued  map[string]struct{} // directories whose marker was seen
}

// placed is where an entry went: a directory's path and a name in it.
type placed struct{ dir, base string }

func newUpper(index int, below []*upper, work *budget) *upper {
	root := &inode{kids: new(kids)}
	root.Mode = unix.S_IFDIR | 0o755
	root.Nlink = 2
	return &upper{finder: finder{root, work}, index: index, below: below, done: make(chan struct{})}
}

// unpack applies a layer's entries in order to its new upper directory.
func (u *upper) unpack(l *layer.Index) error {
	defer close(u.done)
	u.err = u.applyAll(l.Entries)
	u.unpacked, u.indexed, u.opaqued, u.lowers = nil, nil, nil, nil
	return u.err
}

func (u *upper) applyAll(entries []layer.Entry) error {
	for i := range entries {
		if err := u.apply(&entries[i]); err != nil {
			return refused(i, &entries[i], err)
		}
	}
	if !u.removed {
		return nil
	}
	for i := range entries {
		if err := u.retime(&entries[i]); err != nil {
			return refused(i, &entries[i], err)
		}
	}
	return nil
}

func refused(i int, e *layer.Entry, err error) error {
	if !errors.Is(err, ErrUnsupported) {
		err = fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return fmt.Errorf("entry %d (%q): %w", i, e.Name, err)
}

// apply does with one entry what containerd's archive.Apply does.
func (u *upper) apply(e *layer.Entry) error {
	parent, base := u.split(e.Name)
	if strings.IndexByte(base, 0) >= 0 || strings.IndexByte(parent, 0) >= 0 {
		return unix.EINVAL
	}
	at, err := u.resolveCached(parent)
	if err != nil {
		return err
	}
	if isRoot(base) {
		// The entry is the root: containerd ignores it.
		u.root.ModTime, u.root.ModNsec = bounded(e)
		u.rootTimed = true
		return nil
	}
	if at.in, err = u.mkparent(at, e); err != nil {
		return fmt.Errorf("parent directory %q: %w", at.path, err)
	}
	u.last.at = at
	if strings.HasPrefix(base, whiteoutPrefix) {
		return u.applyWhiteout(at, base)
	}
	if len(base) > maxName || len(at.path)+1+len(base) > maxPath {
		return unix.ENAMETOOLONG
	}
	in := at.in.kids.get(base)
	if in != nil && !(in.dir() && e.Type == layer.TypeDir) {
		u.remove(at.in, base)
		in = nil
	}
	if in == nil {
		if in, err = u.create(at.in, e); err != nil {
			return err
		}
		at.in.kids.set(base, in)
	}
	if len(u.below) == 0 {
		u.unpacked = append(u.unpacked, placed{at.path, base})
	}
	return describe(in, e)
}

// split cleans an entry's name and splits it, quickly if the entry is in the
// directory of the one before it.
func (u *upper) split(name string) (parent, base string) {
	parent, base = path.Split(name)
	if parent != u.last.name || isRoot(base) {
		parent, base = path.Split(cleanPath(name))
	}
	return parent, base
}

// describe gives an inode the attributes of an entry.
func describe(in *inode, e *layer.Entry) error {
	in.chown(e.UID, e.GID)
	for _, x := range e.Xattrs {
		if err := in.setXattr(x); err != nil {
			return fmt.Errorf("xattr %q: %w", x.Name, err)
		}
	}
	if !in.symlink() {
		in.chmod(e.Mode)
	}
	in.ModTime, in.ModNsec = bounded(e)
	return nil
}

// retime sets a directory's modification time after everything is unpacked,
// as containerd does: that of whatever the entry's name leads to by then.
func (u *upper) retime(e *layer.Entry) error {
	name := cleanPath(e.Name)
	base := path.Base(name)
	if e.Type != layer.TypeDir || isRoot(base) || strings.HasPrefix(base, whiteoutPrefix) {
		return nil
	}
	at, err := u.resolve(name)
	if err != nil {
		return err
	}
	if at.in == nil {
		return unix.ENOENT
	}
	at.in.ModTime, at.in.ModNsec = bounded(e)
	u.rootTimed = u.rootTimed || at.in == u.root
	return nil
}

// isRoot reports whether a clean path whose last element is base is the root.
func isRoot(base string) bool {
	return base == "" || base == "/" || base == "." || base == ".."
}

// applyWhiteout handles an entry named .wh.*, whatever its type.
func (u *upper) applyWhiteout(at place, base string) error {
	if base == opaqueMarker {
		if len(u.below) == 0 {
			return u.clear(at)
		}
		at.in.opaque = true
		return nil
	}
	name := base[len(whiteoutPrefix):]
	if name == "" || name == "." || name == ".." {
		return errors.New("whiteout without a name")
	}
	if len(name) > maxName || len(at.path)+1+len(name) > maxPath {
		return unix.ENAMETOOLONG
	}
	if len(u.below) == 0 {
		u.remove(at.in, name)
		return nil
	}
	if at.in.kids.get(name) != nil {
		return unix.EEXIST
	}
	in := &inode{}
	in.Mode = unix.S_IFCHR
	in.Nlink = 1
	at.in.kids.set(name, in)
	return nil
}

// clear is an opaque marker in the bottom layer: it removes everything in a
// directory that no entry of the layer has written.
func (u *upper) clear(at place) error {
	if _, ok := u.opaqued[at.path]; ok {
		return nil
	}
	if u.opaqued == nil {
		u.opaqued = map[string]struct{}{}
		u.indexed = map[string]struct{}{}
	}
	u.opaqued[at.path] = struct{}{}
	for _, p := range u.unpacked {
		u.indexed[childPath(p.dir, p.base)] = struct{}{}
	}
	u.unpacked = u.unpacked[:0]

	todo := []place{at}
	for len(todo) > 0 {
		dir := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if err := u.work.spend(dir.in.kids.steps()); err != nil {
			return err
		}
		for name, in := range dir.in.kids.all() {
			p := childPath(dir.path, name)
			if _, ok := u.indexed[p]; !ok {
				u.remove(dir.in, name)
			} else if in.dir() {
				todo = append(todo, place{p, in})
			}
		}
	}
	return nil
}

// remove unlinks a name and everything below it. A missing name is no error.
func (u *upper) remove(dir *inode, name string) {
	in := dir.kids.get(name)
	if in == nil {
		return
	}
	dir.kids.set(name, nil)
	u.removed, u.last = true, resolved{}
	todo := []*inode{in}
	for len(todo) > 0 {
		in := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		in.Nlink--
		for _, kid := range in.kids.all() {
			todo = append(todo, kid)
		}
	}
}

// create makes the inode of an entry, or finds it for a hard link.
func (u *upper) create(parent *inode, e *layer.Entry) (*inode, error) {
	if e.Type == layer.TypeLink {
		return u.link(e)
	}
	in := &inode{}
	switch e.Type {
	case layer.TypeReg:
		in.Mode = unix.S_IFREG
		in.Size, in.Off, in.Layer = e.Size, e.Off, u.index
	case layer.TypeSparse:
		in.Mode = unix.S_IFREG
		in.Size, in.Off, in.Layer = e.Size, e.Off, u.index
		in.Sparse = append([]layer.Extent{}, e.Extents...)
	case layer.TypeDir:
		in.Mode = unix.S_IFDIR
		in.kids = new(kids)
	case layer.TypeSymlink:
		if err := checkTarget(e.Link); err != nil {
			return nil, fmt.Errorf("target %q: %w", e.Link, err)
		}
		in.Mode = unix.S_IFLNK | 0o777
		in.Target, in.Size = e.Link, int64(len(e.Link))
	case layer.TypeChar:
		in.Mode, in.Rdev = unix.S_IFCHR, rdev(e)
	case layer.TypeBlock:
		in.Mode, in.Rdev = unix.S_IFBLK, rdev(e)
	case layer.TypeFifo:
		in.Mode = unix.S_IFIFO
	default:
		return nil, fmt.Errorf("entry type %q", e.Type)
	}
	in.Nlink = 1
	in.inherit(parent)
	return in, nil
}

// link finds the inode that a hard link names. Only the layer itself is
// searched: that is all containerd has in the directory it unpacks into.
func (u *upper) link(e *layer.Entry) (*inode, error) {
	if strings.IndexByte(e.Link, 0) >= 0 {
		return nil, fmt.Errorf("hard link to %q: %w", e.Link, unix.EINVAL)
	}
	dir, base := path.Split(e.Link)
	at, err := u.resolve(dir)
	if err == nil {
		at.in, err = u.lstat(path.Join(at.path, base))
	}
	if err == nil && at.in.dir() {
		err = unix.EPERM
	}
	if err != nil {
		return nil, fmt.Errorf("hard link to %q: %w", e.Link, err)
	}
	at.in.Nlink++
	return at.in, nil
}

// mkparent makes the missing directories up to at, which e needs, and returns
// the last one.
func (u *upper) mkparent(at place, e *layer.Entry) (*inode, error) {
	if at.in != nil {
		if !at.in.dir() {
			return nil, unix.ENOTDIR
		}
		return at.in, nil
	}
	cur := u.root
	for i := 0; i < len(at.path); {
		start := i + 1
		if i = strings.IndexByte(at.path[start:], '/'); i < 0 {
			i = len(at.path)
		} else {
			i += start
		}
		name := at.path[start:i]
		if in := cur.kids.get(name); in != nil {
			cur = in // a directory: resolving the path has seen to that
			continue
		}
		if len(name) > maxName || i > maxPath {
			return nil, unix.ENAMETOOLONG
		}
		in := &inode{kids: new(kids)}
		in.Mode = unix.S_IFDIR
		in.Nlink = 1
		in.inherit(cur)
		in.chmod(0o755)
		in.ModTime, in.ModNsec = bounded(e)
		if err := u.copyUp(at.path[:i], in); err != nil {
			return nil, err
		}
		cur.kids.set(name, in)
		cur = in
	}
	return cur, nil
}

// copyUp gives a directory that no entry has described the attributes of the
// nearest directory of that path in a lower layer. Each layer is searched on
// its own, following its own symlinks only.
func (u *upper) copyUp(p string, to *inode) error {
	if u.lowers == nil {
		for _, b := range slices.Backward(u.below) {
			u.lowers = append(u.lowers, lower{finder: b.finder, of: b})
		}
	}
	for i := range u.lowers {
		parent := &u.lowers[i]
		if <-parent.of.done; parent.of.err != nil {
			return parent.of.err
		}
		at, err := parent.resolveNext(p)
		if err != nil {
			return fmt.Errorf("in layer %d: %w", parent.of.index, err)
		}
		if at.in == nil {
			continue
		}
		if !at.in.dir() {
			return nil
		}
		to.UID, to.GID = at.in.UID, at.in.GID
		to.chmod(at.in.Mode)
		to.ModTime, to.ModNsec = at.in.ModTime, at.in.ModNsec
		for _, x := range at.in.Xattrs {
			if err := to.setXattr(x); err != nil {
				return fmt.Errorf("xattr %q: %w", x.Name, err)
			}
		}
		return nil
	}
	return nil
}

// chown changes the owner as lchown(2) does.
func (in *inode) chown(uid, gid uint32) {
	if uid != keepID {
		in.UID = uid
	}
	if gid != keepID {
		in.GID = gid
	}
	if !in.dir() {
		in.dropXattr(xattrCapability) // the kernel revokes capabilities of a file that changes hands
	}
}

// inherit gives a new inode what the kernel hands down from its directory.
func (in *inode) inherit(parent *inode) {
	if parent.Mode&unix.S_ISGID != 0 {
		in.GID = parent.GID
	}
	if !in.symlink() {
		in.inheritACL(parent)
	}
}

// bounded is an entry's modification time as containerd sets it: 0 unless it
// lies between 1970 and 2262.
func bounded(e *layer.Entry) (sec int64, nsec uint32) {
	if e.ModTime < 0 || e.ModTime > maxSec || e.ModTime == maxSec && int64(e.ModNsec) > maxNsec {
		return 0, 0
	}
	return e.ModTime, e.ModNsec
}

// rdev is an entry's device number as mknod(2) sees it: 12 bits of major and
// 20 bits of minor number.
func rdev(e *layer.Entry) uint64 {
	return unix.Mkdev(e.DevMajor&0xfff, e.DevMinor&0xfffff)
}

// checkTarget refuses what symlink(2) refuses.
func checkTarget(target string) error {
	switch {
	case target == "":
		return unix.ENOENT
	case len(target) > maxPath:
		return unix.ENAMETOOLONG
	case strings.IndexByte(target, 0) >= 0:
		return unix.EINVAL
	default:
		return nil
	}
}
