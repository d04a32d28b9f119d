package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sort"
	"strings"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// paxXattr is the prefix of PAX records that are extended attributes: star's,
// which GNU tar and containerd use.
const paxXattr = "SCHILY.xattr."

// What a root can hold at most, for its EROFS image: bytes of the stream, of a
// file, of an xattr value, and of all xattrs of a file, in units of 4 bytes
// with an entry header of 4.
const (
	maxStream     = 2<<40 - 512
	maxFile       = 1 << 40
	maxXattrValue = 1<<16 - 1
	maxXattrs     = 250 << 10
)

// maxLayerXattrs bounds the number of xattrs of a layer.
const maxLayerXattrs = DefaultMaxEntries

// readTar records the entries of the tar stream.
func (b *builder) readTar(r *chunkReader) error {
	defer r.drop()
	var t totals
	var entries entryList
	for {
		e, stored, err := nextEntry(r)
		if errors.Is(err, io.EOF) {
			b.idx.Entries = entries.all()
			b.idx.Imports = b.sources.encode(b.idx.Entries)
			return b.endTar(r)
		}
		if err != nil {
			return err
		}
		if e.Type != tar.TypeXGlobalHeader {
			if entries.n >= b.opts.MaxEntries {
				return fmt.Errorf("more than %d entries: %w", b.opts.MaxEntries, ErrUnsupported)
			}
			if err := t.add(&e); err != nil {
				return fmt.Errorf("entry %q: %w", e.Name, err)
			}
			entries.add(&e)
		}
		read, err := b.sources.read(r, &e, entries.n-1)
		if err == nil {
			err = skipContent(r, stored-read)
		}
		if err != nil {
			return fmt.Errorf("tar stream at offset %d: content of %q: %w", r.pos, e.Name, err)
		}
	}
}

// entryList collects entries in pieces: one slice that grows would be copied
// several times.
type entryList struct {
	pieces [][]Entry
	n      int
}

// entriesPiece is how many entries a piece has room for.
const entriesPiece = 512

func (l *entryList) add(e *Entry) {
	if l.n%entriesPiece == 0 {
		l.pieces = append(l.pieces, make([]Entry, 0, entriesPiece))
	}
	last := &l.pieces[len(l.pieces)-1]
	*last = append(*last, *e)
	l.n++
}

func (l *entryList) all() []Entry { return slices.Concat(l.pieces...) }

// nextEntry reads a header and returns its entry, and how many bytes of
// content follow in the stream. At the end of the archive it returns io.EOF.
func nextEntry(r *chunkReader) (Entry, int64, error) {
	block, err := r.block()
	if err != nil {
		return Entry{}, 0, err
	}
	if e, ok := ordinaryEntry(block, inflate.Out(r.pos+blockSize)); ok {
		r.next(blockSize)
		return e, e.Size, nil
	}
	r.keep()
	hdr, err := tar.NewReader(r).Next()
	head := r.kept()
	if errors.Is(err, io.EOF) {
		return Entry{}, 0, err
	}
	if err != nil {
		return Entry{}, 0, fmt.Errorf("tar stream at offset %d: %w", r.pos, err)
	}
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return Entry{Type: hdr.Typeflag}, 0, nil
	}
	e, stored, err := newEntry(hdr, inflate.Out(r.pos), head)
	if err != nil {
		return e, 0, fmt.Errorf("entry %q: %w", hdr.Name, err)
	}
	return e, stored, nil
}

// skipContent goes to the next header. As in archive/tar, content must be
// whole, and what fills up its last block need not.
func skipContent(r *chunkReader, stored int64) error {
	end := r.pos + stored
	if pos, err := r.Seek(stored, io.SeekCurrent); err != nil {
		return err
	} else if pos < end {
		return io.ErrUnexpectedEOF
	}
	_, err := r.Seek(blockAlign(end)-end, io.SeekCurrent)
	return err
}

// totals counts what all entries of a layer have together.
type totals struct{ chunks, xattrs int64 }

// add counts an entry, or says what there is too much of.
func (t *totals) add(e *Entry) error {
	if e.Type == TypeSparse {
		_, n := Chunks(e.Size, e.Extents)
		t.chunks += n
	}
	t.xattrs += int64(len(e.Xattrs))
	if t.chunks > maxChunks {
		return fmt.Errorf("sparse files of the layer take %d pieces, %d at most: %w", t.chunks, maxChunks, ErrUnsupported)
	}
	if t.xattrs > maxLayerXattrs {
		return fmt.Errorf("%d extended attributes in the layer, %d at most: %w", t.xattrs, maxLayerXattrs, ErrUnsupported)
	}
	return nil
}

// endTar reads what follows the end marker: it belongs to the diff ID.
func (b *builder) endTar(r *chunkReader) error {
	if err := r.drain(); err != nil {
		return err
	}
	if r.pos > maxStream {
		return fmt.Errorf("tar stream of %d bytes: %w", r.pos, ErrUnsupported)
	}
	return nil
}

// blockAlign rounds up to a whole number of tar blocks.
func blockAlign(n int64) int64 { return (n + blockSize - 1) &^ (blockSize - 1) }

// newEntry converts a tar header whose content starts at off, and says how
// many bytes of content are stored there. head is the header as it is in the
// stream, with the PAX headers before it and the sparse map behind it.
func newEntry(hdr *tar.Header, off inflate.Out, head []byte) (e Entry, stored int64, err error) {
	if e, err = plainEntry(hdr, off); err != nil {
		return e, 0, err
	}
	version := sparseVersion(hdr)
	if version == notSparse {
		if e.Size > maxFile {
			err = fmt.Errorf("file of %d bytes: %w", e.Size, ErrUnsupported)
		}
		return e, e.Size, err
	}
	e.Type = TypeSparse
	e.Extents, stored, err = readExtents(hdr, version, off, head)
	if err != nil {
		return e, 0, err
	}
	if e.Size == 0 || len(e.Extents) == 1 && e.Extents[0].Len == e.Size {
		e.Type, e.Extents = TypeReg, nil // it has no holes
		return e, stored, nil
	}
	return e, stored, checkExtents(&e)
}

// plainEntry converts a tar header whose content starts at off.
func plainEntry(hdr *tar.Header, off inflate.Out) (Entry, error) {
	e := Entry{
		Name:    hdr.Name,
		Type:    hdr.Typeflag,
		Mode:    uint32(hdr.Mode & 0o7777),
		ModTime: hdr.ModTime.Unix(),
		ModNsec: uint32(hdr.ModTime.Nanosecond()),
	}
	switch hdr.Typeflag {
	case tar.TypeReg:
		e.Size, e.Off = hdr.Size, off
	case tar.TypeLink, tar.TypeSymlink:
		e.Link = hdr.Linkname
	case tar.TypeChar, tar.TypeBlock:
		if outside(hdr.Devmajor, math.MaxUint32) || outside(hdr.Devminor, math.MaxUint32) {
			return e, fmt.Errorf("device number %d:%d: %w", hdr.Devmajor, hdr.Devminor, ErrUnsupported)
		}
		e.DevMajor, e.DevMinor = uint32(hdr.Devmajor), uint32(hdr.Devminor)
	case tar.TypeDir, tar.TypeFifo:
	default:
		return e, fmt.Errorf("tar entry type %q: %w", hdr.Typeflag, ErrUnsupported)
	}
	// The largest uint32 means "leave as it is" to chown(2).
	if outside(int64(hdr.Uid), math.MaxUint32-1) || outside(int64(hdr.Gid), math.MaxUint32-1) {
		return e, fmt.Errorf("owner %d:%d: %w", hdr.Uid, hdr.Gid, ErrUnsupported)
	}
	e.UID, e.GID = uint32(hdr.Uid), uint32(hdr.Gid)
	for key, value := range hdr.PAXRecords {
		if name, ok := strings.CutPrefix(key, paxXattr); ok {
			e.Xattrs = append(e.Xattrs, Xattr{Name: name, Value: value})
		}
	}
	sort.Slice(e.Xattrs, func(i, j int) bool { return e.Xattrs[i].Name < e.Xattrs[j].Name })
	return e, checkXattrs(e.Xattrs)
}

func checkXattrs(xattrs []Xattr) error {
	size := 0
	for _, x := range xattrs {
		if len(x.Value) > maxXattrValue {
			return fmt.Errorf("extended attribute %q of %d bytes: %w", x.Name, len(x.Value), ErrUnsupported)
		}
		size += (4 + len(x.Name) + len(x.Value) + 3) &^ 3
	}
	if size > maxXattrs {
		return fmt.Errorf("%d bytes of extended attributes: %w", size, ErrUnsupported)
	}
	return nil
}

func outside(v, most int64) bool { return v < 0 || v > most }
