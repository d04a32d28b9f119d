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

	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
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
	var (
		snap storage.Snapshot
		ids  idmap
	)
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if snap, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...); err != nil {
			return fmt.Errorf("creating snapshot %q: %w", key, err)
		}
		labels, err := labelsOfKey(ctx, key)
		if err != nil {
			return err
		}
		if ids, err = idmapOf(labels); err != nil {
			return err
		}
		s.own.want(snap, labels[discover.LabelRecord])
		path = filepath.Join(s.dir, "snapshots", snap.ID)
		return os.Rename(tmp, path)
	})
	if err != nil {
		s.own.drop(snap.ID)
		return nil, err
	}
	mounts, err := s.mounts(ctx, snap, ids)
	if err == nil {
		err = s.setOwner(ctx, snap, ids)
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
	if err := os.Mkdir(filepath.Join(dir, "fs"), 0o755); err != nil {
		return "", err
	}
	if kind != snapshots.KindActive {
		return dir, nil
	}
	return dir, os.Mkdir(filepath.Join(dir, "work"), 0o711)
}

// labelsOfKey reads the labels of a snapshot, in a transaction.
func labelsOfKey(ctx context.Context, key string) (map[string]string, error) {
	_, info, _, err := storage.GetInfo(ctx, key)
	return info.Labels, err
}

// setOwner gives the root directory of a new snapshot the owner that
// containerd's overlayfs snapshotter gives it: its parent's or, in a user
// namespace, the one that the namespace calls root.
func (s *Snapshotter) setOwner(ctx context.Context, snap storage.Snapshot, ids idmap) error {
	switch {
	case !ids.empty():
		if len(snap.ParentIDs) == 0 && snap.Kind == snapshots.KindActive {
			return nil // this directory itself is mapped
		}
		uid, gid, err := ids.root()
		if err != nil {
			return err
		}
		return os.Lchown(s.upper(snap.ID), uid, gid)
	case len(snap.ParentIDs) == 0:
		return nil
	}
	lower, whole, err := s.lower(ctx, snap, snap.ParentIDs[0])
	if err != nil || whole {
		return err // the root of a lazy root is 0:0's, see archive/tree
	}
	st, err := os.Stat(lower)
	if err != nil {
		return err
	}
	owner := st.Sys().(*syscall.Stat_t)
	return os.Lchown(s.upper(snap.ID), int(owner.Uid), int(owner.Gid))
}

// lower returns the directory that stands for the committed snapshot id in the
// stack of snap, and whether it holds all below it as well.
func (s *Snapshotter) lower(ctx context.Context, snap storage.Snapshot, id string) (dir string, whole bool, err error) {
	chain, err := s.chainNeeded(ctx, id)
	if errdefs.IsNotFound(err) {
		return s.upper(id), false, nil
	}
	if err != nil {
		return "", false, err
	}
	if own := s.own.get(snap.ID); own != nil {
		dir, err = s.mountOwn(ctx, snap.ID, own, chain)
	} else {
		dir, err = s.mountRoot(ctx, id, chain)
	}
	return dir, true, err
}

// mounts returns what containerd has to mount for snap.
func (s *Snapshotter) mounts(ctx context.Context, snap storage.Snapshot, ids idmap) ([]mount.Mount, error) {
	done, err := s.copied(snap, ids)
	if err != nil {
		return nil, err
	}
	if done {
		ids = idmap{}
	}
	if len(snap.ParentIDs) == 0 {
		if snap.Kind == snapshots.KindView {
			return bind(s.upper(snap.ID), "ro"), nil
		}
		return bind(s.upper(snap.ID), append(ids.options(), "rw")...), nil
	}
	lowers, err := s.lowers(ctx, snap, ids)
	if err != nil {
		return nil, err
	}
	if snap.Kind != snapshots.KindActive && len(lowers) == 1 {
		if ids.empty() {
			return bind(lowers[0], "ro"), nil
		}
		// containerd maps no owners of a read-only bind mount. Overlayfs
		// without an upper directory wants two lower ones.
		lowers = append(lowers, s.upper(snap.ID))
	}
	options := ids.options()
	if snap.Kind == snapshots.KindActive {
		options = append(options, "workdir="+s.work(snap.ID), "upperdir="+s.upper(snap.ID))
	}
	options = append(options, "lowerdir="+strings.Join(lowers, ":"))
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: append(options, overlayOptions()...)}}, nil
}

// copied says whether the owners of all that snap stands on have been changed
// already. Without the capability remap-ids containerd commits a copy for that
// and asks for the same mapping again on top of it. What tells the copy is the
// owner of its root, which is the container's root and else the host's.
func (s *Snapshotter) copied(snap storage.Snapshot, ids idmap) (bool, error) {
	if ids.empty() || len(snap.ParentIDs) == 0 {
		return false, nil
	}
	uid, gid, err := ids.root()
	if err != nil {
		return false, err
	}
	st, err := os.Stat(s.upper(snap.ParentIDs[0]))
	if os.IsNotExist(err) {
		return false, nil // a lazy snapshot
	}
	if err != nil {
		return false, err
	}
	owner := st.Sys().(*syscall.Stat_t)
	return (uid != 0 || gid != 0) && int(owner.Uid) == uid && int(owner.Gid) == gid, nil
}

// lowers returns the directories that snap stands on, the topmost first.
func (s *Snapshotter) lowers(ctx context.Context, snap storage.Snapshot, ids idmap) (dirs []string, err error) {
	for _, id := range snap.ParentIDs {
		dir, whole, err := s.lower(ctx, snap, id)
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, dir)
		if !whole {
			continue
		}
		if can, _ := s.able.known(); !ids.empty() && can.Remap != nil {
			return nil, fmt.Errorf("this machine cannot run lazy images with user namespaces; without the capability remap-ids of the clip "+
				"snapshotter in its configuration, containerd makes a copy with other owners: %w: %w", errdefs.ErrFailedPrecondition, can.Remap)
		}
		break
	}
	return dirs, nil
}

func bind(source string, options ...string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: source, Options: append(options, "rbind")}}
}

// overlayOptions switches off the inode index, which would refuse to mount an
// upper directory again over another set of lower ones.
func overlayOptions() []string {
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err != nil {
		return nil
	}
	return []string{"index=off"}
}
