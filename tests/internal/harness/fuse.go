package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// FUSEConnections are the numbers of a lab's FUSE connections: of what is mounted below its directory, and of what its
// processes have of /dev/fuse (since Linux 6.16), which is how mounts that are attached nowhere are found.
func FUSEConnections(dir string) map[string]bool {
	found := map[string]bool{}
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err == nil {
		for _, m := range infos {
			if m.FSType == "fuse" || strings.HasPrefix(m.FSType, "fuse.") {
				found[fmt.Sprint(m.Minor)] = true
			}
		}
	}
	for _, pid := range processesOf(dir) {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // none: it has just ended
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err != nil || to != "/dev/fuse" {
				continue
			}
			info, _ := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, filepath.Base(fd)))
			if _, number, ok := strings.Cut(string(info), "fuse_connection:\t"); ok {
				found[strings.TrimSpace(number)] = true
			}
		}
	}
	return found
}

// abortConnections ends a lab's FUSE connections: whatever waits for them gets an error.
func abortConnections(dir string) error {
	connections := FUSEConnections(dir)
	if len(connections) == 0 {
		return nil
	}
	// The kernel has one such file system, which need not be mounted anywhere.
	fsfd, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("ending FUSE connections: %w", err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return fmt.Errorf("ending FUSE connections: %w", err)
	}
	control, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("ending FUSE connections: %w", err)
	}
	defer unix.Close(control)
	var errs []error
	for number := range connections {
		err := os.WriteFile(fmt.Sprintf("/proc/self/fd/%d/%s/abort", control, number), []byte("1"), 0)
		if !errors.Is(err, os.ErrNotExist) { // else it has ended
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
