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

// Systemd is the first process of namespaces of its own, with the units of the lab alone. What its services mount in
// the lab is mounted for everybody.
type Systemd struct {
	*Process

	lab    *Lab
	cgroup string
}

// Service is the name of the daemon's unit.
const Service = "containerd-clip-grpc.service"

// startSystemd prepares the namespaces in which it runs and becomes systemd. Its arguments are the cgroup that it
// enters, the lab's directory, and an empty directory. Everything but the lab is hidden from the host before anything
// is mounted.
const startSystemd = `set -e
echo 0 >"$1/cgroup.procs"
findmnt --noheadings --list --output TARGET | while read -r mount; do
	[ "$mount" = "$2" ] || mount --make-private "$mount"
done
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --bind /etc /etc
mount -o remount,bind,ro /etc
mount -t tmpfs tmpfs /sys/fs/cgroup
for dir in /run/systemd /run/dbus; do
	[ ! -d $dir ] || mount -t tmpfs tmpfs $dir
done
export container=lab SYSTEMD_UNIT_PATH="$2/units" SYSTEMD_GENERATOR_PATH="$3" SYSTEMD_ENVIRONMENT_GENERATOR_PATH="$3"
exec unshare --cgroup sh -c 'mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec /lib/systemd/systemd --system --unit=lab.target --log-target=console --show-status=0'
`

// targets are the units that every service has something to do with.
var targets = []string{"lab.target", "sysinit.target", "basic.target", "local-fs.target", "shutdown.target", "exit.target"}

// StartSystemd starts a systemd, with the daemon's unit as it is delivered. It is started before what mounts anything in
// the lab.
func (l *Lab) StartSystemd(ctx context.Context) (*Systemd, error) {
	units := l.Path("units")
	if err := os.MkdirAll(filepath.Join(units, Service+".d"), 0o755); err != nil {
		return nil, err
	}
	for _, name := range targets {
		if err := os.WriteFile(filepath.Join(units, name), []byte("[Unit]\nDescription="+name+"\nDefaultDependencies=no\n"), 0o644); err != nil {
			return nil, err
		}
	}
	top, err := Top()
	if err != nil {
		return nil, err
	}
	unit, err := os.ReadFile(filepath.Join(top, Service))
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(units, Service), unit, 0o644); err != nil {
		return nil, err
	}
	if err := shareMount(l.Dir); err != nil {
		return nil, err
	}
	empty := l.Path("empty")
	if err := os.Mkdir(empty, 0o755); err != nil {
		return nil, err
	}
	s := &Systemd{lab: l}
	if s.cgroup, err = newCgroup(); err != nil {
		return nil, err
	}
	l.onClose(func(context.Context) error { return removeCgroup(s.cgroup) })
	s.Process, err = l.launch("systemd", unix.CLONE_NEWNS|unix.CLONE_NEWPID|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC,
		"/bin/sh", "-c", startSystemd, "sh", s.cgroup, l.Dir, empty)
	if err != nil {
		return nil, err
	}
	l.onClose(func(context.Context) error { s.Kill(); return nil }) // and with it all processes of its namespace
	return s, s.await(ctx, func(ctx context.Context) error {
		_, err := s.Ctl(ctx, "is-active", "lab.target")
		return err
	})
}

// Ctl runs systemctl against it.
func (s *Systemd) Ctl(ctx context.Context, args ...string) (Result, error) {
	pid := strconv.Itoa(s.Pid())
	return s.lab.Run(ctx, "nsenter", append([]string{"--target", pid, "--mount", "--pid", "--", "systemctl", "--no-pager"}, args...)...)
}

// Show returns a property of the daemon's service.
func (s *Systemd) Show(ctx context.Context, property string) (string, error) {
	r, err := s.Ctl(ctx, "show", "--value", "--property", property, Service)
	return strings.TrimSpace(r.Stdout), err
}

// StartDaemon has systemd start the daemon with more settings of its unit, in directories as those that the lab's
// StartDaemon uses. What is done to the process of the result is done to systemd.
func (s *Systemd) StartDaemon(ctx context.Context, name, config, settings string) (*Daemon, error) {
	d, err := s.lab.newDaemon(name, config)
	if err != nil {
		return nil, err
	}
	d.Process = s.Process
	lines := []string{"[Service]", "ExecStart=", "ExecStart=" + strings.Join(append([]string{s.lab.program(d.Program)}, d.args()...), " ")}
	for _, v := range s.lab.environ() {
		lines = append(lines, "Environment="+v)
	}
	log := s.lab.Path(name + ".log")
	lines = append(lines, "StandardOutput=append:"+log, "StandardError=append:"+log, settings, "")
	if err := os.WriteFile(s.lab.Path("units", Service+".d", "lab.conf"), []byte(strings.Join(lines, "\n")), 0o644); err != nil {
		return nil, err
	}
	if _, err := s.Ctl(ctx, "daemon-reload"); err != nil {
		return nil, err
	}
	if _, err := s.Ctl(ctx, "start", Service); err != nil {
		text, _ := os.ReadFile(log)
		return nil, fmt.Errorf("%w\n%s", err, text)
	}
	return d, nil
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

// newCgroup makes a cgroup of version 2 next to the root.
func newCgroup() (string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		return "", err
	}
	if len(mounts) == 0 {
		return "", errors.New("no cgroup2 is mounted, which systemd needs")
	}
	return os.MkdirTemp(mounts[0].Mountpoint, labPattern)
}

// removeCgroup removes a cgroup whose processes are ending.
func removeCgroup(dir string) (err error) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		// Only directories can be removed, from the inside out.
		out, ferr := exec.Command("find", dir, "-depth", "-type", "d", "-delete").CombinedOutput()
		if ferr == nil {
			return nil
		}
		err = fmt.Errorf("removing cgroup %s: %w: %s", dir, ferr, out)
	}
	return err
}
