package erofs

import (
	"encoding/binary"
	"iter"

	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// Indexes that inOrder gives to the entries that are not children.
const (
	entrySelf   = -1
	entryParent = -2
)

// inOrder yields the names of a directory in the order of the disk, which is
// bytewise with "." and ".." among them, and the index of each child.
func inOrder(children []tree.Dirent) iter.Seq2[int, string] {
	return func(yield func(int, string) bool) {
		i := 0
		until := func(dot string, index int) bool {
			for ; i < len(children) && children[i].Name < dot; i++ {
				if !yield(i, children[i].Name) {
					return false
				}
			}
			return yield(index, dot)
		}
		if !until(".", entrySelf) || !until("..", entryParent) {
			return
		}
		for ; i < len(children); i++ {
			if !yield(i, children[i].Name) {
				return
			}
		}
	}
}

// directorySize is how large the directory of these children is: whole blocks
// and the used part of the last one. No entry crosses a block.
func directorySize(children []tree.Dirent) int {
	full, used := 0, 0
	for _, name := range inOrder(children) {
		n := sizeDirent + len(name)
		if used+n > blockSize {
			full, used = full+1, 0
		}
		used += n
	}
	return full<<blockBits + used
}

// putDirectory writes the content of d, whose full blocks start at offset
// start and whose children are kids.
func (b *builder) putDirectory(d *directory, start int, kids []placed) {
	if d.blocks > 0 {
		b.setBlock(d.data, start)
	}
	parent := d.nid
	if d.up != nil {
		parent = d.up.nid
	}
	var group []placed // the entries of one block
	used, block := 0, 0
	flush := func() {
		at := d.tail
		if block < d.blocks {
			at = start + block<<blockBits
		}
		b.putEntries(at, group)
		group, used, block = group[:0], 0, block+1
	}
	for i, name := range inOrder(d.node.Children) {
		if used+sizeDirent+len(name) > blockSize {
			flush()
		}
		used += sizeDirent + len(name)
		switch i {
		case entrySelf:
			group = append(group, placed{name: name, nid: d.nid, kind: typeDir})
		case entryParent:
			group = append(group, placed{name: name, nid: parent, kind: typeDir})
		default:
			group = append(group, kids[i])
		}
	}
	flush()
}

// putEntries writes one block of a directory at an offset.
func (b *builder) putEntries(at int, group []placed) {
	names := len(group) * sizeDirent
	for i, e := range group {
		d := dirent{Nid: e.nid, NameOff: uint16(names), Type: e.kind}
		d.put(b.buf[at+i*sizeDirent:])
		names += copy(b.buf[at+names:], e.name)
	}
}

// reserveBlocks appends n blocks and returns their offset, or 0 for none.
func (b *builder) reserveBlocks(n int) int {
	if n == 0 {
		return 0
	}
	start := blockAlign(len(b.buf))
	b.extend(start + n<<blockBits)
	return start
}

// extend appends zeros up to an offset.
func (b *builder) extend(end int) {
	b.buf = append(b.buf, make([]byte, end-len(b.buf))...)
}

// setBlock points an i_u at the block that starts at an offset.
func (b *builder) setBlock(dataAt, start int) {
	binary.LittleEndian.PutUint32(b.buf[dataAt:], uint32(start>>blockBits))
}
