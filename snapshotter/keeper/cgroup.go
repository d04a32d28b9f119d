package keeper

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// cgroupName is the control group of all keeper processes of a machine, next
// to the root. It stays when the last of them has ended: nobody is left then.
const cgroupName = "containerd-clip-keeper"

// leaveCgroup moves this process out of the control group of the service that
// started it: service managers tell by it what to send their signals to, and
// may end all of it. They look at version 2, and before that at the named
// hierarchy of systemd. See cgroups(7).
func leaveCgroup() error {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		named := m.FSType == "cgroup" && slices.Contains(strings.Split(m.VFSOptions, ","), "name=systemd")
		return m.FSType != "cgroup2" && !named, false
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range mounts {
		dir := filepath.Join(m.Mountpoint, cgroupName)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			errs = append(errs, err)
			continue
		}
		// 0 is who writes it.
		errs = append(errs, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0))
	}
	return errors.Join(errs...)
}
