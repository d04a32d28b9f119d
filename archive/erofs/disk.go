package erofs

import "encoding/binary"

// The on-disk format, little-endian throughout. The trailing comments are the
// kernel's names in fs/erofs/erofs_fs.h; see also
// https://docs.kernel.org/filesystems/erofs.html#on-disk-details.

// Where things are.
const (
	superOffset = 1024
	blockBits   = 9
	blockSize   = 1 << blockBits // the unit of tar, so that any file in one starts on a block
	slotBits    = 5
	slotSize    = 1 << slotBits // inodes are addressed in slots: their nid
)

// Sizes of the structs, in bytes.
const (
	sizeSuperBlock    = 128
	sizeDeviceSlot    = 128
	sizeInodeCompact  = 32
	sizeInodeExtended = 64
	sizeChunkIndex    = 8
	sizeDirent        = 12
	sizeXattrHeader   = 12
	sizeXattrEntry    = 4
)

const (
	superMagic = 0xe0f5e1e2 // EROFS_SUPER_MAGIC_V1

	compatChecksum = 0x1 // EROFS_FEATURE_COMPAT_SB_CHKSUM
	compatMtime    = 0x2 // EROFS_FEATURE_COMPAT_MTIME: times are mtimes, not ctimes

	incompatChunked = 0x4 // EROFS_FEATURE_INCOMPAT_CHUNKED_FILE
	incompatDevices = 0x8 // EROFS_FEATURE_INCOMPAT_DEVICE_TABLE
)

// Inode formats: the version in bit 0, the data layout above it.
const (
	inodeCompactVersion  = 0
	inodeExtendedVersion = 1

	layoutPlain  = 0 << 1 // EROFS_INODE_FLAT_PLAIN: data in whole blocks
	layoutInline = 2 << 1 // EROFS_INODE_FLAT_INLINE: the last partial block follows the inode
	layoutChunk  = 4 << 1 // EROFS_INODE_CHUNK_BASED

	chunkIndexes = 0x20 // EROFS_CHUNK_FORMAT_INDEXES
	chunkBitsMax = 0x1f // EROFS_CHUNK_FORMAT_BLKBITS_MASK: chunk size in log2 of blocks
)

// noBlock as a chunk's address means a hole.
const noBlock = 0xffffffff // EROFS_NULL_ADDR

// File types in directory entries, as in EROFS_FT_*.
const (
	typeUnknown = iota
	typeReg
	typeDir
	typeChar
	typeBlock
	typeFifo
	typeSock
	typeSymlink
)

// Xattr name prefixes, as in EROFS_XATTR_INDEX_*.
const (
	xattrUser       = 1
	xattrACL        = 2
	xattrDefaultACL = 3
	xattrTrusted    = 4
	xattrSecurity   = 6
)

// superBlock is struct erofs_super_block.
type superBlock struct {
	Magic           uint32   // magic
	Checksum        uint32   // checksum
	FeatureCompat   uint32   // feature_compat
	BlockBits       uint8    // blkszbits
	ExtSlots        uint8    // sb_extslots
	RootNid         uint16   // root_nid
	Inodes          uint64   // inos
	Epoch           uint64   // build_time, since 6.15 epoch: the mtime of compact inodes
	EpochNsec       uint32   // build_time_nsec, since 6.15 fixed_nsec
	Blocks          uint32   // blocks
	MetaBlock       uint32   // meta_blkaddr
	XattrBlock      uint32   // xattr_blkaddr
	UUID            [16]byte // uuid
	VolumeName      [16]byte // volume_name
	FeatureIncompat uint32   // feature_incompat
	Compression     uint16   // available_compr_algs
	Devices         uint16   // extra_devices
	DeviceSlot      uint16   // devt_slotoff, in units of sizeDeviceSlot
	DirBlockBits    uint8    // dirblkbits
	XattrPrefixes   uint8    // xattr_prefix_count
	XattrPrefix     uint32   // xattr_prefix_start
	PackedNid       uint64   // packed_nid
	Reserved        [24]byte // xattr_filter_reserved, reserved2
}

func (s *superBlock) put(b []byte) {
	le := binary.LittleEndian
	le.PutUint32(b[0:], s.Magic)
	le.PutUint32(b[4:], s.Checksum)
	le.PutUint32(b[8:], s.FeatureCompat)
	b[12] = s.BlockBits
	b[13] = s.ExtSlots
	le.PutUint16(b[14:], s.RootNid)
	le.PutUint64(b[16:], s.Inodes)
	le.PutUint64(b[24:], s.Epoch)
	le.PutUint32(b[32:], s.EpochNsec)
	le.PutUint32(b[36:], s.Blocks)
	le.PutUint32(b[40:], s.MetaBlock)
	le.PutUint32(b[44:], s.XattrBlock)
	copy(b[48:64], s.UUID[:])
	copy(b[64:80], s.VolumeName[:])
	le.PutUint32(b[80:], s.FeatureIncompat)
	le.PutUint16(b[84:], s.Compression)
	le.PutUint16(b[86:], s.Devices)
	le.PutUint16(b[88:], s.DeviceSlot)
	b[90] = s.DirBlockBits
	b[91] = s.XattrPrefixes
	le.PutUint32(b[92:], s.XattrPrefix)
	le.PutUint64(b[96:], s.PackedNid)
	copy(b[104:128], s.Reserved[:])
}

// deviceSlot is struct erofs_deviceslot.
type deviceSlot struct {
	Tag         [64]byte // tag
	Blocks      uint32   // blocks
	MappedBlock uint32   // mapped_blkaddr
	Reserved    [56]byte // reserved
}

func (s *deviceSlot) put(b []byte) {
	copy(b[:64], s.Tag[:])
	binary.LittleEndian.PutUint32(b[64:], s.Blocks)
	binary.LittleEndian.PutUint32(b[68:], s.MappedBlock)
	copy(b[72:128], s.Reserved[:])
}

// inodeCompact is struct erofs_inode_compact.
type inodeCompact struct {
	Format     uint16 // i_format
	XattrCount uint16 // i_xattr_icount
	Mode       uint16 // i_mode
	Nlink      uint16 // i_nlink
	Size       uint32 // i_size
	Mtime      uint32 // i_reserved, since 6.15 i_mtime: seconds after the epoch
	Data       uint32 // i_u: i_raw_blkaddr, i_rdev or i_c
	Ino        uint32 // i_ino
	UID        uint16 // i_uid
	GID        uint16 // i_gid
	Reserved   uint32 // i_reserved2
}

func (i *inodeCompact) put(b []byte) {
	le := binary.LittleEndian
	le.PutUint16(b[0:], i.Format)
	le.PutUint16(b[2:], i.XattrCount)
	le.PutUint16(b[4:], i.Mode)
	le.PutUint16(b[6:], i.Nlink)
	le.PutUint32(b[8:], i.Size)
	le.PutUint32(b[12:], i.Mtime)
	le.PutUint32(b[16:], i.Data)
	le.PutUint32(b[20:], i.Ino)
	le.PutUint16(b[24:], i.UID)
	le.PutUint16(b[26:], i.GID)
	le.PutUint32(b[28:], i.Reserved)
}

// inodeExtended is struct erofs_inode_extended.
type inodeExtended struct {
	Format     uint16   // i_format
	XattrCount uint16   // i_xattr_icount
	Mode       uint16   // i_mode
	Reserved   uint16   // i_reserved
	Size       uint64   // i_size
	Data       uint32   // i_u: i_raw_blkaddr, i_rdev or i_c
	Ino        uint32   // i_ino
	UID        uint32   // i_uid
	GID        uint32   // i_gid
	Mtime      uint64   // i_mtime, two's complement
	MtimeNsec  uint32   // i_mtime_nsec
	Nlink      uint32   // i_nlink
	Reserved2  [16]byte // i_reserved2
}

func (i *inodeExtended) put(b []byte) {
	le := binary.LittleEndian
	le.PutUint16(b[0:], i.Format)
	le.PutUint16(b[2:], i.XattrCount)
	le.PutUint16(b[4:], i.Mode)
	le.PutUint16(b[6:], i.Reserved)
	le.PutUint64(b[8:], i.Size)
	le.PutUint32(b[16:], i.Data)
	le.PutUint32(b[20:], i.Ino)
	le.PutUint32(b[24:], i.UID)
	le.PutUint32(b[28:], i.GID)
	le.PutUint64(b[32:], i.Mtime)
	le.PutUint32(b[40:], i.MtimeNsec)
	le.PutUint32(b[44:], i.Nlink)
	copy(b[48:64], i.Reserved2[:])
}

// chunkIndex is struct erofs_inode_chunk_index.
type chunkIndex struct {
	BlockHigh uint16 // advise, since 6.15 startblk_hi
	Device    uint16 // device_id; 0 is the image itself
	Block     uint32 // blkaddr, since 6.15 startblk_lo
}

func (c *chunkIndex) put(b []byte) {
	binary.LittleEndian.PutUint16(b[0:], c.BlockHigh)
	binary.LittleEndian.PutUint16(b[2:], c.Device)
	binary.LittleEndian.PutUint32(b[4:], c.Block)
}

// dirent is struct erofs_dirent. A directory block is an array of them and
// then their names, without terminators, in the same order:
//
//	| dirent 0 | dirent 1 | ... | name 0 | name 1 | ... | zeros |
//
// The first NameOff divided by sizeDirent is the number of entries.
type dirent struct {
	Nid      uint64 // nid
	NameOff  uint16 // nameoff, from the start of the block
	Type     uint8  // file_type
	Reserved uint8  // reserved
}

func (d *dirent) put(b []byte) {
	binary.LittleEndian.PutUint64(b[0:], d.Nid)
	binary.LittleEndian.PutUint16(b[8:], d.NameOff)
	b[10] = d.Type
	b[11] = d.Reserved
}

// xattrHeader is struct erofs_xattr_ibody_header, which follows an inode that
// has xattrs.
type xattrHeader struct {
	NameFilter  uint32  // h_name_filter, unused without its feature bit
	SharedCount uint8   // h_shared_count
	Reserved    [7]byte // h_reserved2
}

func (h *xattrHeader) put(b []byte) {
	binary.LittleEndian.PutUint32(b[0:], h.NameFilter)
	b[4] = h.SharedCount
	copy(b[5:12], h.Reserved[:])
}

// xattrEntry is struct erofs_xattr_entry. The name without its prefix and the
// value follow; the next entry starts at a multiple of 4.
type xattrEntry struct {
	NameLen   uint8  // e_name_len
	NameIndex uint8  // e_name_index
	ValueSize uint16 // e_value_size
}

func (e *xattrEntry) put(b []byte) {
	b[0] = e.NameLen
	b[1] = e.NameIndex
	binary.LittleEndian.PutUint16(b[2:], e.ValueSize)
}
