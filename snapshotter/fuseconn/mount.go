package fuseconn

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// readAheadKB is what the kernel reads ahead in a file. The value that FUSE
// negotiates ends at 128 KiB, which costs a round trip per 128 KiB.
const readAheadKB = maxRead >> 10

// mountDetached mounts a FUSE file system for the connection fd and returns a
// descriptor of the mount. It is in no mount namespace and ends with the last
// descriptor, unless it is attached before.
func mountDetached(fd int, o Options) (int, error) {
	fsfd, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("mounting FUSE: %w", err)
	}
	defer unix.Close(fsfd)
	for _, s := range [][2]string{
		{"source", o.Source}, {"subtype", "clip"}, {"fd", strconv.Itoa(fd)},
		{"rootmode", "40000"}, {"user_id", "0"}, {"group_id", "0"}, {"max_read", strconv.Itoa(maxRead)},
	} {
		if err := unix.FsconfigSetString(fsfd, s[0], s[1]); err != nil {
			return -1, fmt.Errorf("mounting FUSE: option %s: %w", s[0], err)
		}
	}
	for _, flag := range o.Flags {
		if err := unix.FsconfigSetFlag(fsfd, flag); err != nil {
			return -1, fmt.Errorf("mounting FUSE: option %s: %w", flag, err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return -1, fmt.Errorf("mounting FUSE: %w", err)
	}
	mnt, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, o.Attr)
	if err != nil {
		return -1, fmt.Errorf("mounting FUSE: %w", err)
	}
	return mnt, nil
}

// setReadAhead sets the read-ahead of the file system mounted at mnt. It asks
// the kernel for the device number only: anything else would be a request to
// this process.
func setReadAhead(mnt int) error {
	var st unix.Statx_t
	if err := unix.Statx(mnt, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		return err
	}
	bdi := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", st.Dev_major, st.Dev_minor)
	return os.WriteFile(bdi, []byte(strconv.Itoa(readAheadKB)), 0)
}
