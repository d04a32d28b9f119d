package tree

import (
	"errors"
	"path"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Linux limits, in bytes without the terminating zero. When containerd uses a
// layer's path, a directory of the host stands before it: an image with a path
// between that limit and this one is refused unpacked, on some hosts, and works
// lazily.
const (
	maxName = 255
	maxPath = 4095
)

// maxLinks and maxNestedLinks are how many symlinks may be followed: by
// containerd while it resolves one path, and by the kernel in one lookup.
const (
	maxLinks       = 255
	maxNestedLinks = 40
)

// baseSteps and stepsPerEntry bound the path components looked at while
// resolving paths the long way, which hostile layers can make quadratic, and
// the bytes of paths joined for that: as many as bytesPerStep cost as much as a
// component. Real images use almost none.
const (
	baseSteps     = 1 << 22
	stepsPerEntry = 1 << 8
	bytesPerStep  = 8
)

// budget counts down the steps that are left for all layers together.
type budget struct{ left atomic.Int64 }

func newBudget(steps int) *budget {
	b := new(budget)
	b.left.Store(int64(steps))
	return b
}

func (b *budget) spend(n int) error {
	if b.left.Add(-int64(n)) < 0 {
		return ErrUnsupported
	}
	return nil
}

// finder resolves paths in one layer.
type finder struct {
	root *inode
	work *budget
}

// place is a resolved path: absolute inside the layer, clean, free of
// symlinks, and what is there. in is nil if nothing is.
type place struct {
	path string
	in   *inode
}

// resolved remembers the place that a directory name led to.
type resolved struct {
	name string
	at   place
}

// cleanPath is path.Clean, quicker for the names that tars have.
func cleanPath(name string) string {
	s := strings.TrimPrefix(name, "./")
	if s == "" || s[0] == '.' || s[0] == '/' {
		return path.Clean(name)
	}
	for rest := s; ; {
		i := strings.IndexByte(rest, '/') + 1
		if i == 0 || i == len(rest) {
			return strings.TrimSuffix(s, "/")
		}
		if rest = rest[i:]; rest[0] == '.' || rest[0] == '/' {
			return path.Clean(name)
		}
	}
}

// childPath joins a place's path and a name in it.
func childPath(dir, name string) string {
	if dir == "/" {
		return "/" + name
	}
	return dir + "/" + name
}

// resolveCached is resolve, quick for entries that follow each other in one
// directory.
func (u *upper) resolveCached(name string) (place, error) {
	if u.last.at.in != nil && u.last.name == name {
		return u.last.at, nil
	}
	at, err := u.resolve(name)
	u.last = resolved{name, at}
	return at, err
}

// lower is a layer below one that is being unpacked, as that one sees it.
type lower struct {
	finder
	of    *upper
	below place // where resolveNext looked last
}

// resolveNext is resolve for a clean path. It is quick if the path's parent was
// asked for before it.
func (l *lower) resolveNext(p string) (at place, err error) {
	dir, base := path.Split(p)
	if below := l.below; below.path != "" && len(base) <= maxName && below.path+"/" == dir {
		switch {
		case below.in == nil:
			at = place{path: p}
		case below.in.dir():
			at = place{p, below.in.kids.get(base)}
		}
	}
	if at.path == "" || at.in != nil && at.in.symlink() {
		if at, err = l.resolve(p); err != nil {
			return place{}, err
		}
	}
	l.below = place{}
	if at.path == p {
		l.below = at
	}
	return at, nil
}

// resolve follows a path from the layer's root, all symlinks included, as
// containerd does: ".." stops at the root, and what does not exist is no
// symlink. A non-directory may only come last.
func (f *finder) resolve(name string) (place, error) {
	at, plain, err := f.resolvePlain(name)
	if plain || err != nil {
		return at, err
	}
	p, err := f.followAll(name)
	if err != nil {
		return place{}, err
	}
	in, err := f.lstat(p)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return place{}, err
	}
	return place{p, in}, nil
}

// resolvePlain resolves a path in one go. It gives up, with plain false, when
// it meets a symlink or "..".
func (f *finder) resolvePlain(name string) (at place, plain bool, err error) {
	var clean strings.Builder
	clean.Grow(len(name) + 1)
	in := f.root
	for rest := name; rest != ""; {
		var elem string
		elem, rest, _ = strings.Cut(rest, "/")
		switch {
		case elem == "" || elem == ".":
			continue
		case elem == "..":
			return place{}, false, nil
		case in != nil && !in.dir():
			return place{}, false, unix.ENOTDIR
		case in != nil && len(elem) > maxName:
			return place{}, false, unix.ENAMETOOLONG
		}
		if in != nil {
			if in = in.kids.get(elem); in != nil && in.symlink() {
				return place{}, false, nil
			}
		}
		clean.WriteByte('/')
		clean.WriteString(elem)
	}
	p := clean.String()
	if p == "" {
		p = "/"
	}
	if len(p) > maxPath {
		return place{}, false, unix.ENAMETOOLONG
	}
	return place{p, in}, true, nil
}

// followAll replaces symlinks in a path, one pass over it after the other,
// until a pass finds none. The result depends on doing exactly that: a pass
// joins a relative target to the part already walked by text, even if that
// part ends in a symlink again.
func (f *finder) followAll(name string) (string, error) {
	links := 0
	for {
		before := links
		next, err := f.followOnce(name, &links)
		if err != nil {
			return "", err
		}
		if links == before {
			if clean := path.Join("/", next); clean == next {
				return clean, nil
			}
			next = path.Join("/", next)
		}
		name = next
	}
}

// followOnce replaces every element of a path that is a symlink by its target.
func (f *finder) followOnce(name string, links *int) (string, error) {
	cur := ""
	if strings.HasPrefix(name, "/") {
		cur = "/"
	}
	for rest := name; rest != ""; {
		var elem string
		elem, rest, _ = strings.Cut(rest, "/")
		if elem == "" {
			continue
		}
		if *links > maxLinks {
			return "", unix.ELOOP
		}
		if err := f.work.spend(1 + len(cur)/bytesPerStep); err != nil {
			return "", err
		}
		p := path.Join("/", cur, elem)
		in, err := f.lstat(p)
		switch {
		case err != nil && !errors.Is(err, unix.ENOENT):
			return "", err
		case err != nil || !in.symlink():
			cur = p
		case path.IsAbs(in.Target) || cur == "":
			*links++
			cur = in.Target
		default:
			*links++
			cur = path.Join(cur, in.Target)
		}
	}
	return cur, nil
}

// lstat finds an inode as the kernel does: symlinks on the way are followed,
// the last element is not. The kernel would follow an absolute target, or
// enough "..", out of the layer into the host; nothing is found there.
func (f *finder) lstat(p string) (*inode, error) {
	if len(p) > maxPath {
		return nil, unix.ENAMETOOLONG
	}
	dirs := []*inode{f.root} // from the root to the current directory
	links := 0
	for rest := strings.Trim(p, "/"); rest != ""; {
		if err := f.work.spend(1); err != nil {
			return nil, err
		}
		var elem string
		elem, rest, _ = strings.Cut(rest, "/")
		if elem == "" || elem == "." {
			continue
		}
		if elem == ".." {
			if dirs = dirs[:len(dirs)-1]; len(dirs) == 0 {
				return nil, unix.ENOENT
			}
			continue
		}
		if len(elem) > maxName {
			return nil, unix.ENAMETOOLONG
		}
		in := dirs[len(dirs)-1].kids.get(elem)
		switch {
		case in == nil:
			return nil, unix.ENOENT
		case rest == "":
			return in, nil
		case in.symlink():
			if links++; links > maxNestedLinks {
				return nil, unix.ELOOP
			}
			if path.IsAbs(in.Target) {
				return nil, unix.ENOENT
			}
			rest = in.Target + "/" + rest
		case !in.dir():
			return nil, unix.ENOTDIR
		default:
			dirs = append(dirs, in)
		}
	}
	return dirs[len(dirs)-1], nil
}
