// Package tree stacks layer indexes into one root file system.
//
// Merge shows what containerd's overlayfs snapshotter would show after
// unpacking the same layers one by one, down to its refusals. It works in the
// same two steps. First every layer is unpacked into an upper directory of its
// own, in memory: the bottom layer as containerd unpacks into a bind mount (a
// whiteout deletes), the others as it unpacks into an overlay's upper
// directory (a whiteout is a device node, an opaque directory carries a mark).
// Then the upper directories are stacked as overlayfs stacks them: a whiteout
// or a non-directory hides what is below it, directories merge, and a merged
// directory has the attributes of the topmost layer that holds it.
//
// Some consequences are surprising and deliberate: the root is always mode
// 0755 and owned by 0:0, a hard link cannot name a file of a lower layer, and
// a directory that is deleted and made again in one layer shows its old
// content. Two things have no fixed value in containerd and get one here. The
// modification time of a directory that no entry describes is that of the same
// directory in a lower layer or, failing that, of the entry that made it
// necessary. The root's is that of the last "./" entry of the topmost layer
// that has one, else 0.
//
// A sparse file keeps its holes, which containerd fills with zeros: both read
// the same.
//
// The limits of Linux apply (names of 255 bytes, paths and link targets of
// 4095), those of a particular file system (link counts, xattr space) do not.
// An xattr that the kernel refuses is refused here; one that containerd drops
// is dropped: trusted.*, unknown namespaces, user.* on special files.
//
// The package does not read tar or file contents and keeps no state.
package tree

import (
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Node is one inode of the merged root. Hard links are several Dirents with
// the same Node.
type Node struct {
	Mode     uint32 // S_IFMT type bits and 07777 permission bits, as in stat(2)
	UID, GID uint32
	ModTime  int64  // seconds since 1970
	ModNsec  uint32 // 0-999,999,999
	Nlink    uint32
	Rdev     uint64 // of a character or block device, as in makedev(3)
	Size     int64  // bytes of a regular file's content or of a symlink's target
	Target   string // of a symlink
	Xattrs   []layer.Xattr
	Layer    int            // regular files: index into the stack of layers
	Off      inflate.Out    // regular files: start of the content in that layer's uncompressed stream
	Sparse   []layer.Extent // regular files with holes: where the data is; nil if there are none
	Children []Dirent       // directories: sorted bytewise by name, without "." and ".."
}

// Extents returns the pieces of a regular file's content, in order. What they
// leave out of its Size reads as zeros.
func (n *Node) Extents() []layer.Extent {
	switch {
	case n.Sparse != nil:
		return n.Sparse
	case n.Size > 0:
		return []layer.Extent{{Len: n.Size, Off: n.Off}}
	default:
		return nil
	}
}

// Dirent names a node inside a directory.
type Dirent struct {
	Name string
	Node *Node
}
