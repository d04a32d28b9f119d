package archive

import (
	"iter"

	"github.com/beam-cloud/clip/pkg/common"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/internal/detgob"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// clipNodes turns a tree into upstream's flat list of nodes.
type clipNodes struct {
	img    *Image
	path   []byte                // of the current node
	node   common.ClipNode       // the current one, without its path
	remote common.RemoteRef      // its data
	inode  uint64                // the last one given away
	linked map[*tree.Node]uint64 // inodes of files with several names
	paths  int
}

// walk lists root and everything below it, without recursion: an image may
// nest directories deeper than a stack should grow. Each node is valid until
// the next one.
func (c *clipNodes) walk(root *tree.Node) iter.Seq[func([]byte) []byte] {
	type level struct {
		prefix int           // what of the path is the directory's, with the slash
		left   []tree.Dirent // of its children
	}
	return func(yield func(func([]byte) []byte) bool) {
		c.path = append(c.path[:0], '/')
		if c.set(root) && !yield(c.append) {
			return
		}
		for dirs := []level{{1, root.Children}}; len(dirs) > 0; {
			dir := &dirs[len(dirs)-1]
			if len(dir.left) == 0 {
				dirs = dirs[:len(dirs)-1]
				continue
			}
			child := dir.left[0]
			dir.left = dir.left[1:]
			c.path = append(c.path[:dir.prefix], child.Name...)
			if c.set(child.Node) && !yield(c.append) {
				return
			}
			if len(child.Node.Children) > 0 {
				c.path = append(c.path, '/')
				dirs = append(dirs, level{len(c.path), child.Node.Children})
			}
		}
	}
}

// number returns the inode number of n. The root comes first and is inode 1,
// as FUSE wants it.
func (c *clipNodes) number(n *tree.Node) uint64 {
	several := n.Nlink > 1 && n.Mode&unix.S_IFMT != unix.S_IFDIR
	if several {
		if ino := c.linked[n]; ino != 0 {
			return ino
		}
	}
	c.inode++
	if several {
		c.linked[n] = c.inode
	}
	return c.inode
}

// set makes n the current node, if CLIP has words for it: it has none for
// devices, FIFOs and holes. A name that is missing does less harm than content
// that is wrong.
func (c *clipNodes) set(n *tree.Node) bool {
	c.paths++
	if n.Sparse != nil {
		return false
	}
	c.node = common.ClipNode{}
	a := &c.node.Attr
	a.Ino, a.Mode, a.Nlink = c.number(n), n.Mode, n.Nlink
	a.Uid, a.Gid = n.UID, n.GID
	sec := uint64(max(n.ModTime, 0)) // CLIP's times are unsigned
	a.Mtime, a.Ctime, a.Atime = sec, sec, sec
	a.Mtimensec, a.Ctimensec, a.Atimensec = n.ModNsec, n.ModNsec, n.ModNsec
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		c.node.NodeType = common.DirNode
	case unix.S_IFLNK:
		c.node.NodeType, c.node.Target = common.SymLinkNode, n.Target
		a.Size = uint64(len(n.Target))
	case unix.S_IFREG:
		c.node.NodeType = common.FileNode
		a.Size, a.Blocks = uint64(n.Size), (uint64(n.Size)+511)/512
		c.remote = common.RemoteRef{
			LayerDigest: string(c.img.Layers[n.Layer].Index.Digest),
			UOffset:     int64(n.Off),
			ULength:     n.Size,
		}
		c.node.Remote = &c.remote
	default:
		return false
	}
	return true
}

// Numbers of the fields of upstream's types, and of go-fuse's in them.
const (
	nodeType, nodePath, nodeAttr, nodeTarget, nodeRemote = 0, 1, 2, 3, 7
	remoteDigest, remoteOffset, remoteLength             = 0, 1, 2
	attrIno, attrSize, attrBlocks                        = 0, 1, 2
	attrAtime, attrMtime, attrCtime                      = 3, 4, 5
	attrAtimensec, attrMtimensec, attrCtimensec          = 6, 7, 8
	attrMode, attrNlink, attrOwner                       = 9, 10, 11
	ownerUID, ownerGID                                   = 0, 1
)

// append appends the current node: what set fills in, and no more.
func (c *clipNodes) append(b []byte) []byte {
	node := detgob.NewFields(b)
	detgob.String(&node, nodeType, string(c.node.NodeType))
	detgob.String(&node, nodePath, c.path)
	a := &c.node.Attr
	attr := node.Struct(nodeAttr)
	attr.Uint(attrIno, a.Ino)
	attr.Uint(attrSize, a.Size)
	attr.Uint(attrBlocks, a.Blocks)
	attr.Uint(attrAtime, a.Atime)
	attr.Uint(attrMtime, a.Mtime)
	attr.Uint(attrCtime, a.Ctime)
	attr.Uint(attrAtimensec, uint64(a.Atimensec))
	attr.Uint(attrMtimensec, uint64(a.Mtimensec))
	attr.Uint(attrCtimensec, uint64(a.Ctimensec))
	attr.Uint(attrMode, uint64(a.Mode))
	attr.Uint(attrNlink, uint64(a.Nlink))
	owner := attr.Struct(attrOwner)
	owner.Uint(ownerUID, uint64(a.Uid))
	owner.Uint(ownerGID, uint64(a.Gid))
	attr.EndStruct(owner)
	node.EndStruct(attr)
	detgob.String(&node, nodeTarget, c.node.Target)
	if r := c.node.Remote; r != nil {
		remote := node.Struct(nodeRemote)
		detgob.String(&remote, remoteDigest, r.LayerDigest)
		remote.Int(remoteOffset, r.UOffset)
		remote.Int(remoteLength, r.ULength)
		node.EndStruct(remote)
	}
	return node.End()
}
