package erofs

import (
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strings"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// Type bits of a mode, as in stat(2).
const (
	modeType    = 0o170000
	modeFifo    = 0o010000
	modeChar    = 0o020000
	modeDir     = 0o040000
	modeBlock   = 0o060000
	modeReg     = 0o100000
	modeSymlink = 0o120000
)

// maxChunks bounds a file's chunks, to 128 MiB of addresses.
const maxChunks = 16 << 20

// maxName and maxTarget are what Linux can look up and follow, in bytes.
const (
	maxName   = 255
	maxTarget = 4095
)

// builder holds an image that is being written.
type builder struct {
	devices []Device
	meta    int // offset in buf that nids count from
	epoch   instant
	buf     []byte
	inodes  int
	links   map[*tree.Node]uint64 // nids of the nodes that can have several names
}

// directory is one whose inode is written and whose content is not.
type directory struct {
	node   *tree.Node
	up     *directory // nil for the top
	name   string
	nid    uint64
	blocks int // full blocks; the rest, if any, is the tail
	data   int // offset of i_u in buf, to be set to the first block
	tail   int // offset in buf; 0 if everything is in blocks
}

// path is for errors. The top and RootDir are not part of it.
func (d *directory) path(name string) string {
	elems := []string{name}
	for ; d != nil && d.up != nil && d.up.up != nil; d = d.up {
		elems = append(elems, d.name)
	}
	slices.Reverse(elems)
	return "/" + strings.Join(elems, "/")
}

// write lays out the tree. A directory's content is written after the inodes
// of everything in it have a place, so memory holds one entry for each
// directory that is still to be visited, and depth costs no stack.
func (b *builder) write(top *tree.Node) error {
	first, err := b.place(nil, tree.Dirent{Node: top})
	if err != nil {
		return err
	}
	todo := []*directory{first.dir}
	var kids []placed
	for len(todo) > 0 {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		blocks := b.reserveBlocks(d.blocks)
		kids = kids[:0]
		for i, c := range d.node.Children {
			if i > 0 && d.node.Children[i-1].Name >= c.Name {
				return fmt.Errorf("%s: %w: names out of order", d.path(c.Name), ErrUnsupported)
			}
			k, err := b.place(d, c)
			if err != nil {
				return fmt.Errorf("%s: %w", d.path(c.Name), err)
			}
			kids = append(kids, k)
		}
		b.putDirectory(d, blocks, kids)
		for _, k := range slices.Backward(kids) {
			if k.dir != nil {
				todo = append(todo, k.dir)
			}
		}
	}
	return nil
}

// placed is a directory entry whose inode has a place.
type placed struct {
	name string
	nid  uint64
	kind uint8
	dir  *directory // nil unless it is one
}

// place writes the inode of an entry of the directory in, unless it is written
// already.
func (b *builder) place(in *directory, c tree.Dirent) (placed, error) {
	n := c.Node
	if in != nil {
		if err := checkName(c.Name); err != nil {
			return placed{}, err
		}
	}
	kind := fileType(n.Mode)
	if kind == typeUnknown || n.Mode > math.MaxUint16 {
		return placed{}, fmt.Errorf("%w: mode %o", ErrUnsupported, n.Mode)
	}
	shared := kind == typeDir || n.Nlink > 1
	if nid, ok := b.links[n]; shared && ok {
		if kind == typeDir {
			return placed{}, fmt.Errorf("%w: directory with two names", ErrUnsupported)
		}
		return placed{name: c.Name, nid: nid, kind: kind}, nil
	}
	pos, dir, err := b.putInode(n, kind)
	if err != nil {
		return placed{}, err
	}
	nid := uint64(pos-b.meta) >> slotBits
	if shared {
		b.links[n] = nid
	}
	if dir != nil {
		dir.up, dir.name, dir.nid = in, c.Name, nid
	}
	return placed{c.Name, nid, kind, dir}, nil
}

func checkName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > maxName || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%w: a name of %d bytes like this", ErrUnsupported, len(name))
	}
	return nil
}

func fileType(mode uint32) uint8 {
	switch mode & modeType {
	case modeReg:
		return typeReg
	case modeDir:
		return typeDir
	case modeChar:
		return typeChar
	case modeBlock:
		return typeBlock
	case modeFifo:
		return typeFifo
	case modeSymlink:
		return typeSymlink
	default:
		return typeUnknown
	}
}

// content is what an inode needs room for behind its xattrs, or says in i_u.
type content struct {
	size   int64
	layout uint16
	data   uint32       // i_u
	chunks []chunkIndex // layoutChunk
	blocks int          // directories: full blocks
	tail   int          // bytes that should follow the inode, or have blocks of their own
	joined bool         // the tail must be in the same block as the inode
}

// contentOf says how a node's data is stored.
func (b *builder) contentOf(n *tree.Node, kind uint8) (content, error) {
	switch kind {
	case typeReg:
		return b.fileContent(n)
	case typeDir:
		size := directorySize(n.Children)
		c := content{size: int64(size), blocks: size >> blockBits, tail: size & (blockSize - 1)}
		return c, nil
	case typeSymlink:
		if len(n.Target) == 0 || len(n.Target) > maxTarget || strings.IndexByte(n.Target, 0) >= 0 {
			return content{}, fmt.Errorf("%w: symlink target of %d bytes", ErrUnsupported, len(n.Target))
		}
		return content{size: int64(len(n.Target)), tail: len(n.Target), joined: true}, nil
	case typeChar, typeBlock:
		dev, err := encodeRdev(n.Rdev)
		return content{data: dev}, err
	default:
		return content{}, nil
	}
}

// fileContent is one chunk, however large the file is, unless it has holes.
// Then chunks are as large as lets each be a piece of data or of a hole.
func (b *builder) fileContent(n *tree.Node) (content, error) {
	extents := n.Extents()
	chunk, count := layer.Chunks(n.Size, extents)
	if n.Size < 0 || count > maxChunks || n.Sparse == nil && count > 1 {
		return content{}, fmt.Errorf("%w: file of %d bytes", ErrUnsupported, n.Size)
	}
	if count == 0 {
		return content{}, nil
	}
	if chunk < blockSize {
		return content{}, fmt.Errorf("%w: holes in a file that are not in blocks of %d", ErrUnsupported, blockSize)
	}
	c := content{
		size:   n.Size,
		layout: layoutChunk,
		data:   chunkIndexes | uint32(bits.TrailingZeros64(uint64(chunk))-blockBits),
		chunks: make([]chunkIndex, 0, count),
	}
	for _, x := range extents {
		if err := b.checkExtent(n, x); err != nil {
			return content{}, err
		}
		c.chunks = appendHole(c.chunks, x.Pos/chunk)
		for pos := x.Pos; pos < x.End(); pos += chunk {
			block := (int64(x.Off) + pos - x.Pos) >> blockBits
			c.chunks = append(c.chunks, chunkIndex{Device: uint16(n.Layer + 1), Block: uint32(block)})
		}
	}
	c.chunks = appendHole(c.chunks, count)
	return c, nil
}

// appendHole appends chunks without data until there are n.
func appendHole(chunks []chunkIndex, n int64) []chunkIndex {
	for int64(len(chunks)) < n {
		chunks = append(chunks, chunkIndex{Block: noBlock})
	}
	return chunks
}

// checkExtent makes sure that a piece of a file is in a device and starts on a
// block. Chunks sees to it that pieces start on blocks of the file.
func (b *builder) checkExtent(n *tree.Node, x layer.Extent) error {
	if n.Layer < 0 || n.Layer >= len(b.devices) {
		return fmt.Errorf("%w: layer %d of %d", ErrUnsupported, n.Layer, len(b.devices))
	}
	if d := int64(b.devices[n.Layer].Size); x.Off < 0 || int64(x.Off) > d || x.Len > d-int64(x.Off) {
		return fmt.Errorf("%w: %d bytes at %d of a device of %d", ErrUnsupported, x.Len, x.Off, d)
	}
	if x.Off%blockSize != 0 || x.Pos%blockSize != 0 {
		return fmt.Errorf("%w: content at %d, which is no multiple of %d", ErrUnsupported, x.Off|inflate.Out(x.Pos), blockSize)
	}
	return nil
}

// encodeRdev packs a device number into 32 bits as the kernel's
// new_encode_dev does, which for small numbers is what makedev(3) does.
func encodeRdev(rdev uint64) (uint32, error) {
	if rdev > math.MaxUint32 {
		return 0, fmt.Errorf("%w: device number %#x", ErrUnsupported, rdev)
	}
	return uint32(rdev), nil
}

// small reports whether a compact inode can hold everything but the
// modification time.
func small(n *tree.Node) bool {
	return n.UID <= math.MaxUint16 && n.GID <= math.MaxUint16 && n.Nlink <= math.MaxUint16 && n.Size <= math.MaxUint32
}

// putInode writes a node's inode with everything that follows it, and returns
// its offset. What a directory holds is left for later.
func (b *builder) putInode(n *tree.Node, kind uint8) (int, *directory, error) {
	c, err := b.contentOf(n, kind)
	if err != nil {
		return 0, nil, err
	}
	xattrs, err := xattrSize(n.Xattrs)
	if err != nil {
		return 0, nil, err
	}
	if n.ModNsec >= 1e9 {
		return 0, nil, fmt.Errorf("%w: %d nanoseconds", ErrUnsupported, n.ModNsec)
	}
	compact := small(n) && c.size <= math.MaxUint32 && b.epoch == instant{n.ModTime, n.ModNsec}
	head := sizeInodeExtended + xattrs
	if compact {
		head = sizeInodeCompact + xattrs
	}
	pos, ok := fit(len(b.buf), head, c.tail, c.joined)
	end := pos + head
	switch {
	case c.layout == layoutChunk:
		end = (end+sizeChunkIndex-1)&^(sizeChunkIndex-1) + len(c.chunks)*sizeChunkIndex
	case c.tail > 0 && ok:
		c.layout = layoutInline
		end += c.tail
	}
	b.extend(end)

	dataAt := b.putHead(pos, n, &c, xattrCount(xattrs), compact)
	putXattrs(b.buf[pos+head-xattrs:pos+head], n.Xattrs)
	for i := range c.chunks {
		c.chunks[i].put(b.buf[end-(len(c.chunks)-i)*sizeChunkIndex:])
	}
	if kind == typeSymlink {
		b.putTarget(n.Target, pos+head, dataAt, ok)
	}
	if kind != typeDir {
		return pos, nil, nil
	}
	d := &directory{node: n, blocks: c.blocks, data: dataAt}
	if c.layout == layoutInline {
		d.tail = pos + head
	} else if c.tail > 0 {
		d.blocks++
	}
	return pos, d, nil
}

// putHead writes the inode proper at pos and returns where its i_u is.
func (b *builder) putHead(pos int, n *tree.Node, c *content, icount uint16, compact bool) int {
	b.inodes++
	if compact {
		i := inodeCompact{
			Format: inodeCompactVersion | c.layout, XattrCount: icount, Mode: uint16(n.Mode), Nlink: uint16(n.Nlink),
			Size: uint32(c.size), Data: c.data, Ino: uint32(b.inodes), UID: uint16(n.UID), GID: uint16(n.GID),
		}
		i.put(b.buf[pos:])
		return pos + 16
	}
	i := inodeExtended{
		Format: inodeExtendedVersion | c.layout, XattrCount: icount, Mode: uint16(n.Mode),
		Size: uint64(c.size), Data: c.data, Ino: uint32(b.inodes), UID: n.UID, GID: n.GID,
		Mtime: uint64(n.ModTime), MtimeNsec: n.ModNsec, Nlink: n.Nlink,
	}
	i.put(b.buf[pos:])
	return pos + 16
}

// putTarget writes a symlink's target behind its inode or, failing that, into
// blocks.
func (b *builder) putTarget(target string, tail, dataAt int, inline bool) {
	if inline {
		copy(b.buf[tail:], target)
		return
	}
	start := b.reserveBlocks((len(target) + blockSize - 1) >> blockBits)
	copy(b.buf[start:], target)
	b.setBlock(dataAt, start)
}

// fit finds the next place at or after pos for an inode of head bytes and a
// tail that must not cross a block; if joined, neither may the inode. If there
// is none, the tail needs blocks of its own.
func fit(pos, head, tail int, joined bool) (int, bool) {
	pos = (pos + slotSize - 1) &^ (slotSize - 1)
	if tail == 0 {
		return pos, true
	}
	for p := pos; p < pos+blockSize; p += slotSize {
		start := p + head
		if joined {
			start = p
		}
		if start>>blockBits == (p+head+tail-1)>>blockBits {
			return p, true
		}
	}
	return pos, false
}
