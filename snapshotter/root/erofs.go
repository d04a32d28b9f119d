package root

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// mountFile mounts the metadata image at target, read-only, with one device
// file per layer.
func mountFile(image, target string, devices []string) error {
	if err := warm(image); err != nil {
		return err
	}
	mnt, err := newMount(image, devices)
	if err != nil {
		return fmt.Errorf("mounting %s: %w", image, err)
	}
	defer unix.Close(mnt)
	return attach(mnt, image, target)
}

func attach(mnt int, image, target string) error {
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mounting %s at %s: %w", image, target, err)
	}
	return nil
}

// warm reads the image once. EROFS then finds it in the page cache; reading it
// through ext4 from inside the mount makes some kernels print a warning.
func warm(image string) error {
	f, err := os.Open(image)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, f)
	return err
}

// newMount returns a descriptor of an EROFS mount that is attached nowhere
// yet. The option strings of mount(2) would not hold the paths of many devices.
func newMount(source string, devices []string) (int, error) {
	fsfd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigSetString(fsfd, "source", source); err != nil {
		return -1, kernelSays(fsfd, err)
	}
	if err := unix.FsconfigSetFlag(fsfd, "ro"); err != nil {
		return -1, kernelSays(fsfd, err)
	}
	for _, dev := range devices {
		if err := unix.FsconfigSetString(fsfd, "device", dev); err != nil {
			return -1, kernelSays(fsfd, err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return -1, kernelSays(fsfd, err)
	}
	mnt, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return -1, kernelSays(fsfd, err)
	}
	return mnt, nil
}

// kernelSays adds the messages that the kernel left in the context to err.
func kernelSays(fsfd int, err error) error {
	var said []string
	buf := make([]byte, 1024)
	for range 16 {
		n, rerr := unix.Read(fsfd, buf)
		if rerr != nil {
			break
		}
		said = append(said, strings.TrimSpace(string(buf[:n])))
	}
	if len(said) == 0 {
		return err
	}
	return fmt.Errorf("%w (%s)", err, strings.Join(said, "; "))
}
