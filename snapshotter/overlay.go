package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// create makes an ordinary snapshot.
func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (_ []mount.Mount, err error) {
	s.gate.RLock()
	defer s.gate.RUnlock()
	tmp, err := s.newDirectory(kind)
	if err != nil {
		return nil, err
	}
	path := tmp
	defer func() {
		if err != nil {
			os.RemoveAll(path)
		}
	}()
	var snap storage.Snapshot
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if snap, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...); err != nil {
			return fmt.Errorf("creating snapshot %q: %w", key, err)
		}
		path = filepath.Join(s.dir, "snapshots", snap.ID)
		return os.Rename(tmp, path)
	})
	if err != nil {
		return nil, err
	}
	mounts, err := s.mounts(ctx, snap)
	if err == nil {
		err = s.inheritOwner(ctx, snap)
	}
	if err != nil {
		// The record is removed first: without it the directory is garbage.
		rerr := s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
			_, _, err := storage.Remove(ctx, key)
			return err
		})
		if rerr != nil {
			err = fmt.Errorf("%w (and removing it again: %w)", err, rerr)
		}
		return nil, err
	}
	return mounts, nil
}

// newDirectory makes the directory of an ordinary snapshot under a temporary name.
func (s *Snapshotter) newDirectory(kind snapshots.Kind) (_ string, err error) {
	dir, err := os.MkdirTemp(filepath.Join(s.dir, "snapshots"), "new-")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	// Others may pass into the container's root; its own modes protect it.
	if err := os.Chmod(dir, 0o711); err != nil {
		return "", err
	}
	if err := os.Mkdir(filepath.Join(dir, "fs"), 0o755); err != nil {
		return "", err
	}
	if kind != snapshots.KindActive {
		return dir, nil
	}
	return dir, os.Mkdir(filepath.Join(dir, "work"), 0o711)
}

// inheritOwner gives the root directory of a new snapshot the owner of its
// parent's, as containerd's overlayfs snapshotter does.
func (s *Snapshotter) inheritOwner(ctx context.Context, snap storage.Snapshot) error {
	if len(snap.ParentIDs) == 0 {
		return nil
	}
	lower, _, err := s.lower(ctx, snap.ParentIDs[0])
	if err != nil {
		return err
	}
	st, err := os.Stat(lower)
	if err != nil {
		return err
	}
	owner := st.Sys().(*syscall.Stat_t)
	return os.Lchown(s.upper(snap.ID), int(owner.Uid), int(owner.Gid))
}

// lower returns the directory that stands for the committed snapshot id in a
// stack, and whether it holds all below it as well.
func (s *Snapshotter) lower(ctx context.Context, id string) (dir string, whole bool, err error) {
	chain, err := s.chain(id)
	if errdefs.IsNotFound(err) {
		return s.upper(id), false, nil
	}
	if err != nil {
		return "", false, err
	}
	dir, err = s.mountRoot(ctx, id, chain)
	return dir, true, err
}

// mounts returns what containerd has to mount for snap.
func (s *Snapshotter) mounts(ctx context.Context, snap storage.Snapshot) ([]mount.Mount, error) {
	if len(snap.ParentIDs) == 0 {
		mode := "rw"
		if snap.Kind == snapshots.KindView {
			mode = "ro"
		}
		return bind(s.upper(snap.ID), mode), nil
	}
	var lowers []string
	for _, id := range snap.ParentIDs {
		dir, whole, err := s.lower(ctx, id)
		if err != nil {
			return nil, err
		}
		lowers = append(lowers, dir)
		if whole {
			break
		}
	}
	if snap.Kind != snapshots.KindActive && len(lowers) == 1 {
		return bind(lowers[0], "ro"), nil
	}
	var options []string
	if snap.Kind == snapshots.KindActive {
		options = append(options, "workdir="+s.work(snap.ID), "upperdir="+s.upper(snap.ID))
	}
	options = append(options, "lowerdir="+strings.Join(lowers, ":"))
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: append(options, overlayOptions()...)}}, nil
}

func bind(source, mode string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: source, Options: []string{mode, "rbind"}}}
}

// overlayOptions switches off the inode index, which would refuse to mount an
// upper directory again over another set of lower ones.
func overlayOptions() []string {
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err != nil {
		return nil
	}
	return []string{"index=off"}
}
