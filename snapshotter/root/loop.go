package root

import (
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// mountLoop is mountFile with a read-only loop device for the image and for
// each layer. The devices end with the mount, and if it fails, with mountLoop.
//
// They read through the page cache of their files: it is what reads ahead over
// the many small files of a layer. Direct I/O would save the second copy of
// the data in memory, but a program that opens small files in a row would wait
// for each.
func mountLoop(image, target string, devices []string) error {
	var paths []string
	for _, file := range append([]string{image}, devices...) {
		dev, path, err := newLoop(file)
		if err != nil {
			return fmt.Errorf("loop device for %s: %w", file, err)
		}
		defer unix.Close(dev)
		paths = append(paths, path)
	}
	mnt, err := newMount(paths[0], paths[1:])
	if err != nil {
		return fmt.Errorf("mounting %s on loop devices: %w", image, err)
	}
	defer unix.Close(mnt)
	return attach(mnt, image, target)
}

// loopAttempts is how often a free device may be taken by somebody else before
// it is configured.
const loopAttempts = 100

// newLoop returns a read-only loop device on a file, open, and its path. The
// device ends when it is closed and nothing uses it any more. See loop(4).
func newLoop(file string) (dev int, path string, err error) {
	// Not os.Open: the runtime's poller would wait for a layer file's server,
	// which is this process.
	backing, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, "", err
	}
	defer unix.Close(backing)
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, "", fmt.Errorf("opening /dev/loop-control: %w", err)
	}
	defer unix.Close(control)
	config := unix.LoopConfig{Fd: uint32(backing), Size: 512}
	config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
	copy(config.Info.File_name[:len(config.Info.File_name)-1], filepath.Base(file)) // for losetup(8)
	for range loopAttempts {
		free, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return -1, "", fmt.Errorf("asking for a free loop device: %w", err)
		}
		path := fmt.Sprintf("/dev/loop%d", free)
		dev, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, "", fmt.Errorf("opening %s: %w", path, err)
		}
		err = unix.IoctlLoopConfigure(dev, &config)
		if err == nil {
			return dev, path, nil
		}
		unix.Close(dev)
		if !errors.Is(err, unix.EBUSY) {
			return -1, "", fmt.Errorf("configuring %s: %w", path, err)
		}
	}
	return -1, "", errors.New("others take every free loop device")
}
