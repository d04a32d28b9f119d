package tree

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Extended attributes that the kernel interprets.
const (
	xattrCapability = "security.capability"
	xattrACL        = "system.posix_acl_access"
	xattrDefaultACL = "system.posix_acl_default"
)

// Linux limits, in bytes.
const (
	maxXattrName  = 255
	maxXattrValue = 64 << 10
)

// setXattr does what containerd does with an entry's attribute. What it
// ignores is ignored; an error means that it fails.
func (in *inode) setXattr(x layer.Xattr) error {
	err := checkXattr(in, x)
	if err == nil && (x.Name == xattrACL || x.Name == xattrDefaultACL) {
		return in.setACL(x)
	}
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err == nil {
		in.putXattr(x)
	}
	return err
}

// checkXattr says what lsetxattr(2) would, on a file system with user,
// security and ACL attributes. ENOTSUP also stands for what containerd ignores
// by itself.
func checkXattr(in *inode, x layer.Xattr) error {
	switch {
	case strings.HasPrefix(x.Name, "trusted."):
		return unix.ENOTSUP
	case strings.IndexByte(x.Name, 0) >= 0:
		return unix.EINVAL
	case x.Name == "" || len(x.Name) > maxXattrName:
		return unix.ERANGE
	case len(x.Value) > maxXattrValue:
		return unix.E2BIG
	case x.Name == xattrACL || x.Name == xattrDefaultACL:
		return nil
	case x.Name == xattrCapability:
		return checkCapability(x.Value)
	case strings.HasPrefix(x.Name, "user."):
		if f := in.format(); f != unix.S_IFREG && f != unix.S_IFDIR {
			return unix.ENOTSUP
		}
	case !strings.HasPrefix(x.Name, "security."):
		return unix.ENOTSUP
	}
	if strings.HasSuffix(x.Name, ".") && strings.Count(x.Name, ".") == 1 {
		return unix.EINVAL // a namespace without a name
	}
	return nil
}

// checkCapability accepts the revisions of a file capability that can be set:
// 2, and 3 with the user ID of a namespace's root behind it.
func checkCapability(v string) error {
	if v == "" {
		return nil
	}
	if len(v) < 20 {
		return unix.EINVAL
	}
	rev := v[3]
	if len(v) == 20 && rev == 2 {
		return nil
	}
	if len(v) == 24 && rev == 3 && binary.LittleEndian.Uint32([]byte(v[20:])) != math.MaxUint32 {
		return nil
	}
	return unix.EINVAL
}

func (in *inode) findXattr(name string) (int, bool) {
	if len(in.Xattrs) == 0 { // as most are
		return 0, false
	}
	return slices.BinarySearchFunc(in.Xattrs, name, func(x layer.Xattr, name string) int {
		return strings.Compare(x.Name, name)
	})
}

// putXattr adds or replaces an attribute.
func (in *inode) putXattr(x layer.Xattr) {
	i, found := in.findXattr(x.Name)
	if found {
		in.Xattrs[i] = x
		return
	}
	in.Xattrs = slices.Insert(in.Xattrs, i, x)
}

func (in *inode) dropXattr(name string) {
	if i, found := in.findXattr(name); found {
		in.Xattrs = slices.Delete(in.Xattrs, i, i+1)
	}
}

// A POSIX ACL as xattr value: a 32-bit version, then 8 bytes per entry (tag,
// permissions, ID), little-endian. See include/uapi/linux/posix_acl_xattr.h.
const (
	aclVersion   = 2
	aclHeaderLen = 4
	aclEntryLen  = 8

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20

	aclNoID = math.MaxUint32
)

// aclEntry is one entry of an ACL.
type aclEntry struct {
	tag, perm uint16
	id        uint32 // of aclUser and aclGroup, else aclNoID
}

// setACL sets an ACL as the kernel does: validated, in canonical form, and not
// stored if the mode says all of it.
func (in *inode) setACL(x layer.Xattr) error {
	acl, err := parseACL(x.Value)
	if errors.Is(err, unix.ENOTSUP) || in.symlink() && err == nil {
		return nil
	}
	if err != nil {
		return err
	}
	if x.Name == xattrDefaultACL && !in.dir() {
		if len(acl) == 0 {
			return nil
		}
		return unix.EACCES
	}
	if err := checkACL(acl); err != nil {
		return err
	}
	if len(acl) == 0 || x.Name == xattrACL && !extended(acl) {
		in.dropXattr(x.Name)
		return nil
	}
	in.putXattr(layer.Xattr{Name: x.Name, Value: encodeACL(acl)})
	return nil
}

// chmod changes permission bits, in the mode and in an ACL.
func (in *inode) chmod(mode uint32) {
	in.Mode = in.format() | mode&0o7777
	i, found := in.findXattr(xattrACL)
	if !found {
		return
	}
	acl, err := parseACL(in.Xattrs[i].Value)
	if err != nil {
		return // cannot be: setACL wrote it
	}
	masked := slices.ContainsFunc(acl, func(e aclEntry) bool { return e.tag == aclMask })
	for j := range acl {
		switch e := &acl[j]; {
		case e.tag == aclUserObj:
			e.perm = uint16(mode >> 6 & 7)
		case e.tag == aclMask, e.tag == aclGroupObj && !masked:
			e.perm = uint16(mode >> 3 & 7)
		case e.tag == aclOther:
			e.perm = uint16(mode & 7)
		}
	}
	in.Xattrs[i].Value = encodeACL(acl)
}

// inheritACL applies the default ACL of a new inode's directory. The mode bits
// in it come with the chmod that always follows.
func (in *inode) inheritACL(parent *inode) {
	i, found := parent.findXattr(xattrDefaultACL)
	if !found {
		return
	}
	value := parent.Xattrs[i].Value
	if acl, err := parseACL(value); err == nil && extended(acl) {
		in.putXattr(layer.Xattr{Name: xattrACL, Value: value})
	}
	if in.dir() {
		in.putXattr(layer.Xattr{Name: xattrDefaultACL, Value: value})
	}
}

// extended reports whether an ACL says more than a mode can.
func extended(acl []aclEntry) bool {
	return slices.ContainsFunc(acl, func(e aclEntry) bool {
		return e.tag&(aclUser|aclGroup|aclMask) != 0
	})
}

// parseACL decodes an xattr value; an empty one is no ACL. ENOTSUP means a
// version that the kernel does not know.
func parseACL(v string) ([]aclEntry, error) {
	b := []byte(v)
	if len(b) == 0 {
		return nil, nil
	}
	if len(b) < aclHeaderLen {
		return nil, unix.EINVAL
	}
	if binary.LittleEndian.Uint32(b) != aclVersion {
		return nil, unix.ENOTSUP
	}
	if b = b[aclHeaderLen:]; len(b)%aclEntryLen != 0 {
		return nil, unix.EINVAL
	}
	acl := make([]aclEntry, 0, len(b)/aclEntryLen)
	for ; len(b) > 0; b = b[aclEntryLen:] {
		e := aclEntry{binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:]), aclNoID}
		switch e.tag {
		case aclUser, aclGroup:
			if e.id = binary.LittleEndian.Uint32(b[4:]); e.id == aclNoID {
				return nil, unix.EINVAL
			}
		case aclUserObj, aclGroupObj, aclMask, aclOther:
		default:
			return nil, unix.EINVAL
		}
		acl = append(acl, e)
	}
	return acl, nil
}

// checkACL refuses an ACL that is incomplete or out of order. The order is
// that of the tags' values; a mask is needed if users or groups are named.
func checkACL(acl []aclEntry) error {
	if len(acl) == 0 {
		return nil
	}
	seen := uint16(0)
	for _, e := range acl {
		repeatable := e.tag == aclUser || e.tag == aclGroup
		if e.perm&^7 != 0 || seen >= 2*e.tag || seen >= e.tag && !repeatable {
			return unix.EINVAL
		}
		seen |= e.tag
	}
	const needed = aclUserObj | aclGroupObj | aclOther
	if seen&needed != needed || seen&(aclUser|aclGroup) != 0 && seen&aclMask == 0 {
		return unix.EINVAL
	}
	return nil
}

func encodeACL(acl []aclEntry) string {
	b := make([]byte, 0, aclHeaderLen+len(acl)*aclEntryLen)
	b = binary.LittleEndian.AppendUint32(b, aclVersion)
	for _, e := range acl {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b)
}
