package erofs

import (
	"fmt"
	"math"
	"strings"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// xattrPrefixes are the name prefixes that have an index.
var xattrPrefixes = [...]struct {
	prefix string
	index  uint8
}{
	{"user.", xattrUser},
	{"security.", xattrSecurity},
	{"trusted.", xattrTrusted},
	{"system.posix_acl_access", xattrACL},
	{"system.posix_acl_default", xattrDefaultACL},
}

// splitXattr cuts a name after its prefix. The ACLs' prefixes are whole names.
func splitXattr(name string) (index uint8, rest string, err error) {
	for _, p := range xattrPrefixes {
		rest, ok := strings.CutPrefix(name, p.prefix)
		if isACL := p.index == xattrACL || p.index == xattrDefaultACL; ok && (rest == "") == isACL {
			return p.index, rest, nil
		}
	}
	return 0, "", fmt.Errorf("%w: xattr %q has an unknown prefix", ErrUnsupported, name)
}

// xattrSize is the size of all xattrs of an inode, with their header.
func xattrSize(xattrs []layer.Xattr) (int, error) {
	if len(xattrs) == 0 {
		return 0, nil
	}
	size := sizeXattrHeader
	for _, x := range xattrs {
		_, rest, err := splitXattr(x.Name)
		switch {
		case err != nil:
			return 0, err
		case len(rest) > math.MaxUint8 || strings.IndexByte(rest, 0) >= 0:
			return 0, fmt.Errorf("%w: xattr name %q", ErrUnsupported, x.Name)
		case len(x.Value) > math.MaxUint16:
			return 0, fmt.Errorf("%w: xattr %q of %d bytes", ErrUnsupported, x.Name, len(x.Value))
		}
		size += align4(sizeXattrEntry + len(rest) + len(x.Value))
	}
	if count := (size-sizeXattrHeader)/sizeXattrEntry + 1; count > math.MaxUint16 {
		return 0, fmt.Errorf("%w: %d bytes of xattrs", ErrUnsupported, size)
	}
	return size, nil
}

// xattrCount turns a size that xattrSize has accepted into i_xattr_icount.
func xattrCount(size int) uint16 {
	if size == 0 {
		return 0
	}
	return uint16((size-sizeXattrHeader)/sizeXattrEntry + 1)
}

// putXattrs writes xattrs that xattrSize has accepted.
func putXattrs(b []byte, xattrs []layer.Xattr) {
	if len(xattrs) == 0 {
		return
	}
	header := xattrHeader{}
	header.put(b)
	b = b[sizeXattrHeader:]
	for _, x := range xattrs {
		index, rest, _ := splitXattr(x.Name)
		e := xattrEntry{NameLen: uint8(len(rest)), NameIndex: index, ValueSize: uint16(len(x.Value))}
		e.put(b)
		n := sizeXattrEntry
		n += copy(b[n:], rest)
		n += copy(b[n:], x.Value)
		b = b[align4(n):]
	}
}

func align4(n int) int { return (n + 3) &^ 3 }
