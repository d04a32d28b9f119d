package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"math"
	"sort"
	"strings"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// PAX record prefixes: extended attributes (star's, which GNU tar and
// containerd use), and sparse maps (GNU tar).
const (
	paxXattr     = "SCHILY.xattr."
	paxGNUSparse = "GNU.sparse."
)

// readTar records the entries of the tar stream.
func (b *builder) readTar(r *chunkReader) error {
	defer r.drop()
	tr := tar.NewReader(r)
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return r.drain() // what follows the end marker belongs to the diff ID
		}
		if err != nil {
			return fmt.Errorf("tar stream at offset %d: %w", r.pos, err)
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if len(b.idx.Entries) >= b.opts.MaxEntries {
			return fmt.Errorf("more than %d entries: %w", b.opts.MaxEntries, ErrUnsupported)
		}
		e, err := newEntry(hdr, inflate.Out(r.pos))
		if err != nil {
			return fmt.Errorf("entry %q: %w", hdr.Name, err)
		}
		b.idx.Entries = append(b.idx.Entries, e)
	}
}

// newEntry converts a tar header whose content starts at off.
func newEntry(hdr *tar.Header, off inflate.Out) (Entry, error) {
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
		if strings.HasPrefix(key, paxGNUSparse) {
			return e, fmt.Errorf("sparse file: %w", ErrUnsupported)
		}
		if name, ok := strings.CutPrefix(key, paxXattr); ok {
			e.Xattrs = append(e.Xattrs, Xattr{Name: name, Value: value})
		}
	}
	sort.Slice(e.Xattrs, func(i, j int) bool { return e.Xattrs[i].Name < e.Xattrs[j].Name })
	return e, nil
}

func outside(v, most int64) bool { return v < 0 || v > most }
