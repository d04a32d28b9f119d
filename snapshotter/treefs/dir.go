package treefs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A directory's entries are ".", "..", and its children in their order. An
// entry's offset, to which a reader can seek, is the number of those before it.

// dirent returns entry i of a directory and its node. There is none if the
// name is empty.
func (s *server) dirent(dir inode, i uint64) (string, inode) {
	switch {
	case i == 0:
		return ".", dir
	case i == 1:
		return "..", s.inodes[dir.parent]
	case i-2 < uint64(len(dir.Children)):
		return dir.Children[i-2].Name, s.inodes[dir.children[i-2]]
	default:
		return "", inode{}
	}
}

func (s *server) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return s.readDir(in, func(e fuse.DirEntry, _ inode) bool { return out.AddDirEntry(e) })
}

func (s *server) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return s.readDir(in, func(e fuse.DirEntry, n inode) bool {
		entry := out.AddDirLookupEntry(e)
		if entry == nil {
			return false
		}
		if e.Off > 2 { // the kernel wants no attributes of "." and ".."
			n.entry(entry)
		}
		return true
	})
}

// readDir adds entries from the offset on until the reply is full.
func (s *server) readDir(in *fuse.ReadIn, add func(fuse.DirEntry, inode) bool) fuse.Status {
	dir, status := s.inode(in.NodeId)
	if status != fuse.OK {
		return status
	}
	if dir.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fuse.ENOTDIR
	}
	for i := in.Offset; ; i++ {
		name, n := s.dirent(dir, i)
		if name == "" || !add(fuse.DirEntry{Name: name, Ino: n.number, Mode: n.Mode, Off: i + 1}, n) {
			return fuse.OK
		}
	}
}
