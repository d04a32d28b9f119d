package layerfs

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// readAheadKB is what the kernel reads ahead in a layer file. The value that
// FUSE negotiates ends at 128 KiB, which costs a round trip per 128 KiB.
const readAheadKB = maxRead >> 10

// mountDetached mounts a FUSE file system for the connection fd and returns a
// descriptor of the mount. It is in no mount namespace, so no path leads to
// it, and it ends with the last descriptor.
func mountDetached(fd int) (int, error) {
	fsfd, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("mounting FUSE: %w", err)
	}
	defer unix.Close(fsfd)
	for _, o := range [][2]string{
		{"source", "clip-layers"}, {"subtype", "clip"}, {"fd", strconv.Itoa(fd)},
		{"rootmode", "40000"}, {"user_id", "0"}, {"group_id", "0"}, {"max_read", strconv.Itoa(maxRead)},
	} {
		if err := unix.FsconfigSetString(fsfd, o[0], o[1]); err != nil {
			return -1, fmt.Errorf("mounting FUSE: option %s: %w", o[0], err)
		}
	}
	// EROFS reads on behalf of every user.
	if err := unix.FsconfigSetFlag(fsfd, "allow_other"); err != nil {
		return -1, fmt.Errorf("mounting FUSE: option allow_other: %w", err)
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return -1, fmt.Errorf("mounting FUSE: %w", err)
	}
	mnt, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID)
	if err != nil {
		return -1, fmt.Errorf("mounting FUSE: %w", err)
	}
	return mnt, nil
}

func setReadAhead(bdi string) error {
	return os.WriteFile(filepath.Join(bdi, "read_ahead_kb"), []byte(strconv.Itoa(readAheadKB)), 0)
}
