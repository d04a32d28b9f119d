package archive

import (
	"errors"
	"fmt"
	"io"
	"math"
	"path"

	"github.com/beam-cloud/clip/pkg/common"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
	"github.com/tidwall/btree"
	"golang.org/x/sys/unix"
)

// Bounds on the part that upstream CLIP reads, checked before it is decoded.
// The decoder makes about 250 bytes of a node; the shortest that means anything takes 16.
const (
	maxClipStorage  = 8 << 20
	maxClipElements = 1 << 20 // of the lists and maps of the storage info; a layer of 1 TB has half as many checkpoints
	maxClipIndex    = 1 << 30
	maxClipNodes    = 8 << 20
	minClipNode     = 16
)

// Upstream is the part of a .clip file that upstream CLIP reads, in upstream's
// own types. Every archive has it: CLIP's own archives of images (v2), those
// that hold their data or have it in S3 (v1), and those of this package. It is
// as untrusted as the file: sizes and offsets are checked, what it says is not.
type Upstream struct {
	s       *sections
	closer  io.Closer // nil if there is nothing to close
	header  common.ClipArchiveHeader
	storage common.ClipStorageInfo
}

// openUpstream reads the header and the storage info in the first size bytes
// of r. If r is an io.Closer, Close closes it. Errors wrap ErrNotArchive,
// ErrVersion or ErrCorrupt.
func openUpstream(r io.ReaderAt, size int64) (*Upstream, error) {
	s := &sections{r: r, size: size}
	if err := checkMagic(s); err != nil {
		return nil, err
	}
	h, err := readClipHeader(s)
	if err != nil {
		return nil, err
	}
	u := &Upstream{s: s, header: common.ClipArchiveHeader(*h)}
	u.closer, _ = r.(io.Closer)
	if v := u.header.ClipFileFormatVersion; v > common.ClipFileFormatVersion {
		return nil, fmt.Errorf("CLIP format version %d: %w", v, ErrVersion)
	}
	if u.header.StorageInfoLength == 0 {
		return u, nil
	}
	b, err := u.part(u.header.StorageInfoPos, u.header.StorageInfoLength, maxClipStorage)
	if err != nil {
		return nil, fmt.Errorf("storage info: %w", err)
	}
	if u.storage, err = decodeStorage(b); err != nil {
		return nil, fmt.Errorf("%w: storage info: %w", ErrCorrupt, err)
	}
	return u, nil
}

// OpenUpstreamFile is openUpstream for the file at path. The caller closes it.
func OpenUpstreamFile(path string) (*Upstream, error) { return openPath(path, openUpstream) }

// Close closes what the archive was opened from.
func (u *Upstream) Close() error {
	if u.closer == nil {
		return nil
	}
	return u.closer.Close()
}

// part reads a part that the header declares.
func (u *Upstream) part(off, n int64, most uint64) ([]byte, error) {
	if uint64(n) > most {
		return nil, fmt.Errorf("%w: %d bytes, more than %d", ErrCorrupt, n, most)
	}
	return u.s.at(uint64(off), uint64(n))
}

func decodeStorage(b []byte) (common.ClipStorageInfo, error) {
	var w common.StorageInfoWrapper
	if err := decodeGob(b, 0, &w); err != nil {
		return nil, err
	}
	switch common.StorageMode(w.Type) {
	case common.StorageModeOCI:
		var info common.OCIStorageInfo
		err := decodeGob(w.Data, maxClipElements, &info)
		return info, err
	case common.StorageModeS3:
		var info common.S3StorageInfo
		err := decodeGob(w.Data, 0, &info)
		return info, err
	}
	return nil, fmt.Errorf("unknown type %q", w.Type)
}

// Storage says where the data is: a common.OCIStorageInfo, a
// common.S3StorageInfo, or nil if it is in the archive itself.
func (u *Upstream) Storage() common.ClipStorageInfo { return u.storage }

// UpstreamImage is what CLIP's archive of an image says of it.
type UpstreamImage struct {
	Ref      string        // the storage reference, spelled out
	Manifest digest.Digest // empty in archives of earlier versions of CLIP
	Layers   []string      // digests, lowest first
}

// Image returns what an archive of an image says of it. ok is false for others.
func (u *Upstream) Image() (img UpstreamImage, ok bool) {
	info, ok := u.storage.(common.OCIStorageInfo)
	if !ok {
		return img, false
	}
	separator := ":"
	if digest.Digest(info.Reference).Validate() == nil {
		separator = "@"
	}
	img.Ref, img.Layers = info.RegistryURL+"/"+info.Repository+separator+info.Reference, info.Layers
	if info.ImageMetadata != nil && digest.Digest(info.ImageMetadata.Digest).Validate() == nil {
		img.Manifest = digest.Digest(info.ImageMetadata.Digest)
	}
	return img, true
}

// SameRef says whether two references name the same image, as CLIP spells them out.
func SameRef(a, b string) bool {
	x, errX := name.ParseReference(a)
	y, errY := name.ParseReference(b)
	return errX == nil && errY == nil && x.Name() == y.Name()
}

// Metadata returns all that CLIP knows of the archive, in the form that CLIP's
// own storage code takes.
func (u *Upstream) Metadata() (*common.ClipArchiveMetadata, error) {
	b, err := u.index()
	if err != nil {
		return nil, err
	}
	var nodes []*common.ClipNode
	if err := decodeGob(b, min(maxClipNodes, uint64(len(b))/minClipNode), &nodes); err != nil {
		return nil, fmt.Errorf("%w: file index: %w", ErrCorrupt, err)
	}
	index := btree.New(func(a, b any) bool { return a.(*common.ClipNode).Path < b.(*common.ClipNode).Path })
	for _, n := range nodes {
		if err := u.check(n); err != nil {
			return nil, fmt.Errorf("%w: file index: %w", ErrCorrupt, err)
		}
		index.Set(n)
	}
	m := &common.ClipArchiveMetadata{Header: u.header, Index: index, StorageInfo: u.storage}
	if m.Get("/") == nil {
		return nil, fmt.Errorf("%w: file index: it has no root", ErrCorrupt)
	}
	return m, nil
}

func (u *Upstream) index() ([]byte, error) {
	b, err := u.part(u.header.IndexPos, u.header.IndexLength, maxClipIndex)
	if err != nil {
		return nil, fmt.Errorf("file index: %w", err)
	}
	return b, nil
}

// IndexDigest names the archive's list of files, with all that it says of them.
func (u *Upstream) IndexDigest() (digest.Digest, error) {
	b, err := u.index()
	if err != nil {
		return "", err
	}
	return digest.FromBytes(b), nil
}

// check makes sure that n can be served by CLIP's code without surprises.
func (u *Upstream) check(n *common.ClipNode) error {
	if n == nil || len(n.Path) > 4096 || n.Path == "" || n.Path[0] != '/' || path.Clean(n.Path) != n.Path {
		return errors.New("a path is not absolute and clean")
	}
	switch n.Attr.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
	default:
		return fmt.Errorf("%q has mode %o", n.Path, n.Attr.Mode)
	}
	off, length, limit := n.DataPos, n.DataLen, int64(math.MaxInt64)
	if n.Remote != nil {
		off, length = n.Remote.UOffset, n.Remote.ULength
	} else if u.storage == nil {
		limit = u.s.size
	}
	if off < 0 || length < 0 || off > limit || length > limit-off {
		return fmt.Errorf("the data of %q is %d bytes at %d", n.Path, length, off)
	}
	return nil
}
