package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Systemd is the first process of a node: of namespaces of its own, with the units of the lab alone. What is mounted in
// the lab there is mounted for everybody. /etc is a copy of the host's, /usr/local, /var/lib and /run are empty.
type Systemd struct {
	*Process

	lab    *Lab
	cgroup string
}

// Service is the name of the daemon's unit.
const Service = "containerd-clip-grpc.service"

// startSystemd makes the node's namespaces what they are to be and becomes systemd. Its arguments are the cgroup that it
// enters, and the lab's directory. Everything but the lab is hidden from the host before anything is mounted. A mount that
// the host takes away meanwhile is no error.
const startSystemd = `set -e
echo 0 >"$1/cgroup.procs"
findmnt --noheadings --list --output TARGET | while read -r mount; do
	[ "$mount" = "$2" ] || mount --make-private "$mount" || ! findmnt --mountpoint "$mount" || exit 1
	case $mount in */roots/*/mnt) umount --lazy "$mount" || ! findmnt --mountpoint "$mount" || exit 1 ;; esac # of a daemon of the host
done
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t overlay -o "lowerdir=/etc,upperdir=$2/etc,workdir=$2/work" overlay /etc
for dir in /etc/systemd /etc/containerd; do
	mkdir -p $dir
	mount -t tmpfs tmpfs $dir
done
for dir in /usr/local /var/lib; do
	mount --bind "$2/node$dir" $dir
done
mount --bind "$2/units" /usr/lib/systemd/system
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /sys/fs/cgroup
export container=lab SYSTEMD_GENERATOR_PATH=/nowhere SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/nowhere
exec unshare --cgroup sh -c 'mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=console --show-status=0'
`

// targets are the units that every service has something to do with.
var targets = []string{"multi-user.target", "sysinit.target", "basic.target", "local-fs.target", "shutdown.target", "exit.target"}

// StartSystemd starts a node. It is started before what mounts anything in the lab.
func (l *Lab) StartSystemd(ctx context.Context) (*Systemd, error) {
	for _, dir := range []string{"units", "etc", "work", "node/usr/local/bin", "node/var/lib"} {
		if err := os.MkdirAll(l.Path(dir), 0o755); err != nil {
			return nil, err
		}
	}
	for _, name := range targets {
		if err := os.WriteFile(l.Path("units", name), []byte("[Unit]\nDescription="+name+"\nDefaultDependencies=no\n"), 0o644); err != nil {
			return nil, err
		}
	}
	err := shareMount(l.Dir)
	if err != nil {
		return nil, err
	}
	s := &Systemd{lab: l}
	if s.cgroup, err = newCgroup(l.Dir); err != nil {
		return nil, err
	}
	s.Process, err = l.launch("systemd", unix.CLONE_NEWNS|unix.CLONE_NEWPID|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC,
		"/bin/sh", "-c", startSystemd, "sh", s.cgroup, l.Dir)
	if err != nil {
		return nil, err
	}
	l.onClose(func(context.Context) error { s.Kill(); return nil }) // and with it all processes of its namespace
	return s, s.await(ctx, func(ctx context.Context) error {
		_, err := s.Ctl(ctx, "is-active", "multi-user.target")
		return err
	})
}

// Run runs a program on the node.
func (s *Systemd) Run(ctx context.Context, program string, args ...string) (Result, error) {
	pid := strconv.Itoa(s.Pid())
	return s.lab.Run(ctx, "nsenter", append([]string{"--target", pid, "--mount", "--uts", "--ipc", "--pid", "--", program}, args...)...)
}

// Ctl runs systemctl against it.
func (s *Systemd) Ctl(ctx context.Context, args ...string) (Result, error) {
	return s.Run(ctx, "systemctl", append([]string{"--no-pager"}, args...)...)
}

// Show returns a property of the daemon's service.
func (s *Systemd) Show(ctx context.Context, property string) (string, error) {
	r, err := s.Ctl(ctx, "show", "--value", "--property", property, Service)
	return strings.TrimSpace(r.Stdout), err
}

// StartDaemon has systemd start the daemon from a program, with its unit as it is delivered and more settings, in
// directories as those that the lab's StartDaemon uses. What is done to the process of the result is done to systemd.
func (s *Systemd) StartDaemon(ctx context.Context, name, program, config, settings string) (*Daemon, error) {
	top, err := Top()
	if err != nil {
		return nil, err
	}
	unit, err := os.ReadFile(filepath.Join(top, Service))
	if err != nil {
		return nil, err
	}
	d, err := s.lab.newDaemon(name, config)
	if err != nil {
		return nil, err
	}
	d.Process, d.Program = s.Process, program
	more := "[Service]\nExecStart=\nExecStart=" + strings.Join(append([]string{program}, d.args()...), " ") + "\n"
	return d, s.StartService(ctx, Service, string(unit), more+settings)
}

// StartService has systemd start a service, with more settings beside its unit. Its output is in the lab's log of its
// name.
func (s *Systemd) StartService(ctx context.Context, name, unit, settings string) error {
	log := s.lab.Path(strings.TrimSuffix(name, ".service") + ".log")
	more := "StandardOutput=append:" + log + "\nStandardError=append:" + log + "\n"
	for _, v := range s.lab.environ() {
		more += "Environment=" + v + "\n"
	}
	for file, text := range map[string]string{name: unit, filepath.Join(name+".d", "lab.conf"): settings + "\n[Service]\n" + more} {
		if err := os.MkdirAll(filepath.Dir(s.lab.Path("units", file)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(s.lab.Path("units", file), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if _, err := s.Ctl(ctx, "daemon-reload"); err != nil {
		return err
	}
	if _, err := s.Ctl(ctx, "start", name); err != nil {
		text, _ := os.ReadFile(log)
		return fmt.Errorf("%w\n%s", err, text)
	}
	return nil
}

// shareMount makes a directory a mount whose copies in other namespaces see what is mounted in it, and the other way
// round.
func shareMount(dir string) error {
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting %s on itself: %w", dir, err)
	}
	for _, flags := range []uintptr{unix.MS_PRIVATE, unix.MS_SHARED} { // not with what the directory is on
		if err := unix.Mount("", dir, "", flags, ""); err != nil {
			return fmt.Errorf("sharing %s: %w", dir, err)
		}
	}
	return nil
}

// newCgroup makes the cgroup of version 2 of a lab, next to the root. The sweep removes it.
func newCgroup(dir string) (string, error) {
	cgroups, err := cgroupsOf(dir)
	if err != nil {
		return "", err
	}
	if len(cgroups) == 0 {
		return "", errors.New("no cgroup2 is mounted, which systemd needs")
	}
	return cgroups[0], os.Mkdir(cgroups[0], 0o755)
}

// cgroupsOf are where a lab's cgroup may be.
func cgroupsOf(dir string) (cgroups []string, err error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	for _, m := range mounts {
		cgroups = append(cgroups, filepath.Join(m.Mountpoint, filepath.Base(dir)))
	}
	return cgroups, err
}

// removeCgroups removes a lab's cgroup, whose processes are ending.
func removeCgroups(dir string) error {
	cgroups, err := cgroupsOf(dir)
	errs := []error{err}
	for _, cgroup := range cgroups {
		if _, err := os.Stat(cgroup); err == nil {
			errs = append(errs, removeCgroup(cgroup))
		}
	}
	return errors.Join(errs...)
}

// removeCgroup removes a cgroup whose processes are ending.
func removeCgroup(dir string) (err error) {
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		// Only directories can be removed, from the inside out.
		out, ferr := exec.Command("find", dir, "-depth", "-type", "d", "-delete").CombinedOutput()
		if ferr == nil {
			return nil
		}
		err = fmt.Errorf("removing cgroup %s: %w: %s", dir, ferr, out)
	}
	return err
}
