// Package erofs writes a merged tree as an EROFS metadata image.
//
// The image holds inodes, directories, symlink targets and xattrs, and no file
// contents: a regular file is one chunk that points into a device. A file with
// holes is cut into chunks of one size, the largest that lets each be a piece
// of data or of a hole; those of a hole point nowhere. There is one device per
// layer, and it holds the layer's uncompressed tar stream as it is. Both the image and the devices count in blocks of 512 bytes, the unit of
// tar, so a file's address is its offset in the tar. Mounting needs Linux 6.4
// or later, and every device: without any of them the kernel mounts the image
// and fails every read.
//
//	0       1024         1152             meta
//	| zeros | superblock | device slots.. | inodes and directory blocks |
//
// The root of the image holds one directory, RootDir, which is the root of the
// container. Inodes lie in the order of a depth-first walk: a directory's
// blocks, then the inodes of everything in it, then its first subdirectory.
// Each inode is followed by its xattrs and then by its chunk indexes, symlink
// target or the end of its directory, if that fits into the block.
//
// Inodes are written in the compact form if nothing is lost: it has no
// modification time of its own, so the superblock takes the one that saves
// most. The image's UUID is a hash of the rest. The same tree gives the same
// bytes.
//
// The package does not read images and does not mount them.
package erofs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// RootDir is the name of the directory, alone in the image's root, that holds
// the tree.
const RootDir = "fs"

// ErrUnsupported is wrapped when an image cannot hold a tree: something in it
// is larger than the format's fields, or no file system has it.
var ErrUnsupported = errors.New("not expressible in EROFS")

// Device is where the contents of one layer's files are. What is mounted as
// one must have whole blocks: Linux fails to read a file's end from a block
// that the device's end cuts short.
type Device struct {
	Tag  string      // up to 64 bytes that identify it, such as the diff ID in hex
	Size inflate.Out // of the uncompressed tar stream, in bytes
}

// maxDevices and maxDeviceSize are what the superblock and a chunk's address
// can say.
const (
	maxDevices    = 1<<16 - 1
	maxDeviceSize = noBlock << blockBits
)

// Write writes the image of root to w, in one piece. Device i is that of
// root's nodes with Layer i. What the tree shares, such as hard links, must be
// shared by pointer. Errors wrap ErrUnsupported and name the path, unless they
// are w's.
func Write(w io.Writer, root *tree.Node, devices []Device) error {
	if len(devices) > maxDevices {
		return fmt.Errorf("%w: %d devices", ErrUnsupported, len(devices))
	}
	tableEnd := superOffset + sizeSuperBlock + sizeDeviceSlot*len(devices)
	b := &builder{devices: devices, meta: blockAlign(tableEnd), links: map[*tree.Node]uint64{}}
	survey := measure(root)
	b.epoch = survey.epoch
	b.buf = make([]byte, b.meta, b.meta+survey.estimate)
	for i, d := range devices {
		if err := b.putDevice(i, d); err != nil {
			return fmt.Errorf("device %d: %w", i, err)
		}
	}
	top := &tree.Node{
		Mode: modeDir | 0o755, Nlink: 3, ModTime: b.epoch.sec, ModNsec: b.epoch.nsec,
		Children: []tree.Dirent{{Name: RootDir, Node: root}},
	}
	if err := b.write(top); err != nil {
		return err
	}
	// A reader may fetch the larger form of an inode before it knows which
	// one it is.
	b.extend(blockAlign(len(b.buf) + sizeInodeExtended - sizeInodeCompact))
	b.putSuper()
	_, err := w.Write(b.buf)
	return err
}

// blockAlign rounds up to a whole number of blocks.
func blockAlign(n int) int { return (n + blockSize - 1) &^ (blockSize - 1) }

func (b *builder) putDevice(i int, d Device) error {
	if len(d.Tag) > len(deviceSlot{}.Tag) {
		return fmt.Errorf("%w: tag %q of %d bytes", ErrUnsupported, d.Tag, len(d.Tag))
	}
	if d.Size < 0 || d.Size > maxDeviceSize {
		return fmt.Errorf("%w: %d bytes", ErrUnsupported, d.Size)
	}
	slot := deviceSlot{Blocks: uint32((d.Size + blockSize - 1) >> blockBits)}
	copy(slot.Tag[:], d.Tag)
	slot.put(b.buf[superOffset+sizeSuperBlock+i*sizeDeviceSlot:])
	return nil
}

func (b *builder) putSuper() {
	s := superBlock{
		Magic:           superMagic,
		FeatureCompat:   compatChecksum | compatMtime,
		BlockBits:       blockBits,
		Inodes:          uint64(b.inodes),
		Epoch:           uint64(b.epoch.sec),
		EpochNsec:       b.epoch.nsec,
		Blocks:          uint32(len(b.buf) >> blockBits),
		MetaBlock:       uint32(b.meta >> blockBits),
		FeatureIncompat: incompatChunked | incompatDevices,
		Devices:         uint16(len(b.devices)),
		DeviceSlot:      (superOffset + sizeSuperBlock) / sizeDeviceSlot,
	}
	// Overlayfs names files of lower layers by it. Without one, a hard link
	// that is made to such a file does not have the file's inode number.
	sum := sha256.Sum256(b.buf)
	copy(s.UUID[:], sum[:])
	s.put(b.buf[superOffset:])
	// The checksum is a CRC-32C without the final inversion, over the block
	// that the superblock starts, with the checksum itself as 0.
	block := b.buf[superOffset : superOffset+blockSize]
	s.Checksum = ^crc32.Checksum(block, crc32.MakeTable(crc32.Castagnoli))
	s.put(b.buf[superOffset:])
}

// instant is a modification time.
type instant struct {
	sec  int64
	nsec uint32
}

// survey is what a first walk over the tree finds.
type survey struct {
	epoch    instant // the time that most inodes share which can be compact
	estimate int     // size of the metadata, roughly, in bytes
}

// measure walks the tree once, each directory one time.
func measure(root *tree.Node) survey {
	times := map[instant]int{}
	estimate := 2 * blockSize
	seen := map[*tree.Node]struct{}{root: {}}
	todo := []*tree.Node{root}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		estimate += 2 * sizeInodeExtended
		if small(n) {
			times[instant{n.ModTime, n.ModNsec}]++
		}
		for _, c := range n.Children {
			estimate += sizeDirent + len(c.Name)
			if c.Node.Mode&modeType == modeDir {
				if _, ok := seen[c.Node]; ok {
					continue
				}
				seen[c.Node] = struct{}{}
			}
			todo = append(todo, c.Node)
		}
	}
	return survey{mostCommon(times), estimate}
}

// mostCommon picks the earliest of the most common times.
func mostCommon(times map[instant]int) (best instant) {
	most := 0
	for t, n := range times {
		earlier := t.sec < best.sec || t.sec == best.sec && t.nsec < best.nsec
		if n > most || n == most && earlier {
			best, most = t, n
		}
	}
	return best
}
