// Package tree stacks layer indexes into one root file system.
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
	Layer    int         // regular files: index into the stack of layers
	Off      inflate.Out // regular files: start of the content in that layer's uncompressed stream
	Children []Dirent    // directories: sorted bytewise by name, without "." and ".."
}

// Dirent names a node inside a directory.
type Dirent struct {
	Name string
	Node *Node
}
