package root

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/snapshotter/layerfs"
)

// Ability is what the roots of this machine can do.
type Ability struct {
	Mode Mode
	// Nested says why overlayfs cannot stand on overlayfs on a root, as it does
	// where containers run containers.
	Nested error
	// Remap says why a root cannot show other owners to a user namespace.
	Remap error
}

// ErrFull is returned when the disk is too full to find out what the machine
// can do; it may be tried again.
var ErrFull = errors.New("the disk is full: make room and try again")

// full says that there is no room on a disk.
func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// Choose returns the first way of mounting roots below dir, in an empty
// directory of dir that is removed again, that can do everything, or else the
// first that works at all. want restricts the choice to one way. An error says
// for each way what this machine cannot do.
func Choose(ctx context.Context, want Mode, dir string, files *layerfs.FS, h Helper) (Ability, error) {
	modes := []Mode{File, Loop, FUSE}
	if want != Auto {
		modes = []Mode{want}
	}
	var (
		chosen Ability
		errs   []error
	)
	for _, m := range modes {
		can, err := probe(ctx, m, dir, files, h)
		if full(err) {
			return Ability{}, fmt.Errorf("%s: %w: %w", dir, ErrFull, err)
		}
		if err != nil {
			log.G(ctx).WithError(err).WithField("mode", m).Debug("a way to mount roots does not work here")
			errs = append(errs, fmt.Errorf("mode %s: %w", m, err))
			continue
		}
		if chosen.Mode == "" {
			chosen = can
		}
		if can.Nested == nil && can.Remap == nil {
			return can, nil
		}
	}
	if chosen.Mode == "" {
		return Ability{}, errors.Join(errs...)
	}
	return chosen, nil
}

// probeBlock is the whole content of the layer that probe mounts.
var probeBlock = bytes.Repeat([]byte("clip"), 128)

// probeFile is a layer file that lies in memory.
type probeFile struct{ *bytes.Reader }

func (p probeFile) ReadAt(_ context.Context, b []byte, off int64) (int, error) {
	return p.Reader.ReadAt(b, off)
}

// probe mounts a root of one file, whose content comes from files, below dir
// and tries it. An error says what this machine cannot do. Nothing stays.
func probe(ctx context.Context, m Mode, dir string, files *layerfs.FS, h Helper) (can Ability, err error) {
	id := digest.FromBytes(probeBlock)
	if err := files.Add(id, newProbeFile()); err != nil {
		return can, err
	}
	defer files.Remove(id)
	dir, err = os.MkdirTemp(dir, "probe-")
	if err != nil {
		return can, err
	}
	defer func() { err = errors.Join(err, removeProbe(dir)) }()
	x := &layer.Index{DiffID: id, OutSize: 512, Entries: []layer.Entry{{Name: probeName, Type: layer.TypeReg, Mode: 0o600, Size: 512}}}
	r := Root{
		Dir:     filepath.Join(dir, "root"),
		Layers:  []Layer{{Device: files.Path(id), Stream: newProbeFile()}},
		Indexes: func() ([]*layer.Index, error) { return []*layer.Index{x}, nil },
		Helper:  h,
	}
	if err := r.Mount(ctx, m); err != nil {
		return can, fmt.Errorf("%w (%s)", err, needs[m])
	}
	defer func() { err = errors.Join(err, r.Unmount()) }()
	can, err = h.try(dir, r.Path())
	can.Mode = m
	return can, err
}

func newProbeFile() probeFile { return probeFile{bytes.NewReader(probeBlock)} }

// removeProbe removes a probe's directory, and first what a helper that was
// killed has left mounted there: nothing may look into that.
func removeProbe(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		if err := Unmount(m.Mountpoint); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// try looks at the probe's root, and mounts overlayfs on it below dir. The
// process that serves the root has another one do this: see Helper.
func try(dir, lower string) (Ability, error) {
	if err := checkProbe(lower, 0); err != nil {
		return Ability{}, err
	}
	can := Ability{Nested: probeNested(dir, lower), Remap: probeRemap(dir, lower)}
	if err := errors.Join(can.Nested, can.Remap); full(err) {
		return Ability{}, err
	}
	return can, nil
}

const probeName = "probe"

// needs says what the modes need.
var needs = map[Mode]string{
	File: "needs root, Linux 6.12 or newer with EROFS and FUSE, and a state directory that is not on overlayfs or tmpfs",
	Loop: "needs root, Linux 6.4 or newer with EROFS, FUSE and loop devices",
	FUSE: "needs root and Linux 5.4 or newer with FUSE",
}

// checkProbe reads the probe's file below dir. It must not use package os,
// whose poller would wait for this process.
func checkProbe(dir string, owner uint32) error {
	path := filepath.Join(dir, probeName)
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("looking at a probe mount: %w", err)
	}
	if st.Uid != owner || st.Gid != owner {
		return fmt.Errorf("a probe mount shows owner %d:%d instead of %d:%d", st.Uid, st.Gid, owner, owner)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening a file of a probe mount: %w", err)
	}
	defer unix.Close(fd)
	got := make([]byte, len(probeBlock)+1)
	n, err := unix.Pread(fd, got, 0)
	if err != nil {
		return fmt.Errorf("reading from a probe mount: %w", err)
	}
	if !bytes.Equal(got[:n], probeBlock) {
		return errors.New("a probe mount returned wrong bytes")
	}
	return nil
}

// probeNested mounts overlayfs on lower and another one on that.
func probeNested(dir, lower string) (err error) {
	for _, name := range []string{"outer", "inner"} {
		target, err := newOverlay(dir, name, lower, nil)
		if err != nil {
			return fmt.Errorf("overlayfs on a root, %s: %w", name, err)
		}
		defer func() { err = errors.Join(err, unix.Unmount(target, unix.MNT_DETACH)) }()
		lower = target
	}
	return checkProbe(lower, 0)
}

// probeOwner is whom the container's root is in the probe of a user namespace.
const probeOwner = 100000

// probeRemap mounts overlayfs on lower as containerd does for a container with
// a user namespace.
func probeRemap(dir, lower string) (err error) {
	mapping := fmt.Sprintf("0:%d:65536", probeOwner)
	target, err := newOverlay(dir, "remapped", lower, []string{"uidmap=" + mapping, "gidmap=" + mapping})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Unmount(target, unix.MNT_DETACH)) }()
	return checkProbe(target, probeOwner)
}

// newOverlay mounts overlayfs on lower, in a directory of its own below dir.
func newOverlay(dir, name, lower string, options []string) (target string, err error) {
	dir = filepath.Join(dir, name)
	target = filepath.Join(dir, "mnt")
	for _, d := range []string{dir, target, filepath.Join(dir, "upper"), filepath.Join(dir, "work")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return "", err
		}
	}
	m := mount.Mount{Type: "overlay", Source: "overlay", Options: append(options,
		"upperdir="+filepath.Join(dir, "upper"), "workdir="+filepath.Join(dir, "work"), "lowerdir="+lower)}
	if err := m.Mount(target); err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(m.Options, ","), err)
	}
	return target, nil
}
