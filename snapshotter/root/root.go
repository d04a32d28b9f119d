// Package root builds and mounts the merged roots that containers stand on.
//
// A root is an EROFS metadata image of a stack of layers, whose devices are
// the layers' files: the kernel answers everything but file contents by
// itself. The container's root is the directory erofs.RootDir inside the mount.
//
// The package knows nothing of snapshots and does not fetch.
package root

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/erofs"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// Build merges layers, lowest first, and writes their metadata image to path.
func Build(path string, layers []*layer.Index) (err error) {
	merged, err := tree.Merge(layers)
	if err != nil {
		return err
	}
	devices := make([]erofs.Device, len(layers))
	for i, x := range layers {
		devices[i] = erofs.Device{Tag: x.DiffID.Encoded(), Size: x.OutSize}
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	w := bufio.NewWriterSize(f, 1<<20)
	if err := erofs.Write(w, merged, devices); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// readAheadKB is how far the kernel reads ahead in one file of a root: as far
// as it does in the layer file below, so that a miss is one request of 1 MiB.
const readAheadKB = 1024

// mounting serialises mounts: the read-ahead setting of a new EROFS mount is
// found by what its mounting adds.
var mounting sync.Mutex

// Mount mounts the metadata image at target, read-only, with one device file
// per layer. Nothing is left mounted if it fails.
func Mount(ctx context.Context, image, target string, devices []string) error {
	if err := warm(image); err != nil {
		return err
	}
	mounting.Lock()
	defer mounting.Unlock()
	before := erofsBDIs()
	mnt, err := newMount(image, devices)
	if err != nil {
		return fmt.Errorf("mounting %s: %w", image, err)
	}
	defer unix.Close(mnt)
	for bdi := range erofsBDIs() {
		if before[bdi] {
			continue
		}
		if err := os.WriteFile(filepath.Join(bdi, "read_ahead_kb"), []byte(strconv.Itoa(readAheadKB)), 0); err != nil {
			log.G(ctx).WithError(err).Warn("cannot set the read-ahead of a root; reading through it will be slower")
		}
	}
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

// newMount returns a descriptor of a mount that is attached nowhere yet. The
// option strings of mount(2) would not hold the paths of many devices.
func newMount(image string, devices []string) (int, error) {
	fsfd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigSetString(fsfd, "source", image); err != nil {
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

// erofsBDIs returns the sysfs directories of all mounted EROFS file systems.
func erofsBDIs() map[string]bool {
	found := map[string]bool{}
	dirs, err := filepath.Glob("/sys/class/bdi/erofs-*")
	if err != nil {
		return found // only if the pattern were malformed
	}
	for _, dir := range dirs {
		found[dir] = true
	}
	return found
}

// Unmount unmounts the root at target. A root that somebody still uses
// disappears from the tree of mounts and ends with its last use. It is no
// error if nothing is mounted there.
func Unmount(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
