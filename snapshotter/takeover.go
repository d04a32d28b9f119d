package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/layerfs"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// erofsType is what the table of mounts calls roots of the modes file and loop.
const erofsType = "erofs"

// found is a root that an earlier process mounted.
type found struct {
	id     string
	chain  chain
	root   root.Root // with its layers
	mode   root.Mode
	target string
	err    error // why its chain is not known
}

// takeOver goes on with the roots of an earlier process. Those that nobody can
// go on with are unmounted: they are mounted again when they are needed, but
// containers that run on them have to be restarted.
func (s *Snapshotter) takeOver(ctx context.Context) error {
	all, err := s.foundRoots()
	if err != nil {
		return err
	}
	s.files, err = s.resumeFiles(ctx, all)
	if err != nil && !errdefs.IsNotFound(err) {
		log.G(ctx).WithError(err).Error("layers of running containers can no longer be read; restart the containers")
	}
	var errs []error
	for _, f := range slices.Backward(all) { // newest first
		err := s.adopt(ctx, f)
		if err == nil {
			log.G(ctx).WithField("image", f.chain.Image).WithField("id", f.id).Info("going on with a mounted root")
			continue
		}
		log.G(ctx).WithError(err).WithField("path", f.target).Warn("unmounting a root of an earlier process; containers that run on it must be restarted")
		errs = append(errs, root.Unmount(f.target))
	}
	for _, name := range s.session.Waiting() {
		errs = append(errs, s.session.Abandon(name))
	}
	return errors.Join(errs...)
}

// modeOf returns the mode in which a mount is a root.
func modeOf(m *mountinfo.Info) root.Mode {
	switch {
	case m.FSType != erofsType:
		return root.FUSE
	case strings.HasPrefix(m.Source, "/dev/"):
		return root.Loop
	}
	return root.File
}

// foundRoots lists what is mounted below roots, in the order of mounting.
func (s *Snapshotter) foundRoots() ([]found, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(s.dir, "roots"))
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, err
	}
	var all []found
	for _, m := range mounts {
		below, ok := strings.CutPrefix(m.Mountpoint, dir+"/")
		if !ok {
			continue
		}
		id, _, _ := strings.Cut(below, "/")
		f := found{id: id, mode: modeOf(m), target: m.Mountpoint}
		if f.chain, err = s.chain(id); err == nil {
			f.root = s.root(id, f.chain)
		} else if !errdefs.IsNotFound(err) {
			f.err = err
		}
		for _, diffID := range f.chain.Layers {
			l, err := s.layers.Layer(diffID)
			if err != nil {
				continue // repairMounted says so
			}
			f.root.Layers = append(f.root.Layers, root.Layer{Stream: l})
		}
		all = append(all, f)
	}
	return all, nil
}

// resumeFiles goes on with the layer file system, in which all layers of
// mounted roots are, whether or not the kernel has them from there.
func (s *Snapshotter) resumeFiles(ctx context.Context, all []found) (*layerfs.FS, error) {
	files := map[digest.Digest]layerfs.File{}
	for _, f := range all {
		for _, diffID := range f.chain.Layers {
			if l, err := s.layers.Layer(diffID); err == nil {
				files[diffID] = l
			}
		}
	}
	return layerfs.Resume(ctx, s.session, files)
}

// adopt makes a root of an earlier process one of this process.
func (s *Snapshotter) adopt(ctx context.Context, f found) error {
	switch {
	case f.err != nil:
		return f.err
	case len(f.chain.Layers) == 0:
		return errors.New("it belongs to no snapshot")
	case f.mode != root.FUSE && s.files == nil:
		return errors.New("nobody kept the connection to its layers")
	case f.mode == root.FUSE:
		if len(f.root.Layers) != len(f.chain.Layers) {
			return errors.New("a layer is missing")
		}
		if err := f.root.Resume(ctx); err != nil {
			return err
		}
	}
	st := s.roots.get(f.id) // nobody else knows the root yet
	st.mounted, st.mode = true, f.mode
	s.mounted.add(f.id, f.chain.Layers)
	return nil
}

// leaveRoots unmounts the roots that nobody needs, or all if nothing outlives
// the process, and then ends what is below them or hands it over.
func (s *Snapshotter) leaveRoots() error {
	var (
		used map[string]bool
		errs []error
	)
	// Not before: who mounts holds a root's lock and waits for an answer.
	defer s.session.HandOver()
	if s.session.Outlives() {
		var err error
		if used, err = s.usedRoots(); err != nil {
			return fmt.Errorf("finding out which roots are in use; all of them stay: %w", err)
		}
	}
	left := 0
	s.roots.mu.Lock()
	defer s.roots.mu.Unlock()
	for id, st := range s.roots.byID {
		st.mu.Lock()
		switch {
		case !st.mounted:
		case used[id]:
			left++
		default:
			errs = append(errs, s.root(id, chain{}).Unmount())
			st.mounted = false
		}
		st.mu.Unlock()
	}
	if s.files == nil || left > 0 {
		return errors.Join(errs...)
	}
	if err := s.files.Close(); err != nil {
		log.L.WithError(err).Warn("containers still run on lazy roots; they can no longer read what is not in memory")
	}
	return errors.Join(errs...)
}

// usedRoots returns the ids of the lazy snapshots that other than lazy ones
// stand on: only for those, roots are mounted.
func (s *Snapshotter) usedRoots() (map[string]bool, error) {
	used := map[string]bool{}
	if s.meta == nil {
		return used, nil
	}
	err := s.meta.WithTransaction(context.Background(), false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			if info.Parent == "" || info.Labels[discover.LabelLazy] == "true" {
				return nil
			}
			id, _, _, err := storage.GetInfo(ctx, info.Parent)
			used[id] = true
			return err
		})
	})
	if errdefs.IsNotFound(err) {
		err = nil // a store in which no snapshot was ever made
	}
	return used, err
}
