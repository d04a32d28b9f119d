package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/snapshotter/cache"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/layerfs"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// erofsType is what the table of mounts calls roots of the modes file and loop.
const erofsType = "erofs"

// repairTimeout is how long a start waits at most for what is damaged below mounted
// roots to come from their images' archives. Readers wait for it, too, and get
// errors without it.
const repairTimeout = 20 * time.Second

// found is a root that an earlier process mounted.
type found struct {
	id     string
	chain  chain
	mode   root.Mode
	target string
	err    error                 // why its chain is not known
	know   func(root.Root) error // has a root of mode FUSE served that was not known; may be nil
}

// takeOver goes on with the roots of an earlier process, and returns those that
// are damaged on disk and not repaired yet. Those that nobody can go on with are
// unmounted: they are mounted again when they are needed, but containers that run
// on them have to be restarted.
func (s *Snapshotter) takeOver(ctx context.Context) (damaged []found, err error) {
	all, err := s.foundRoots()
	if err != nil {
		return nil, err
	}
	repairing, stop := context.WithTimeout(ctx, repairTimeout)
	defer stop()
	for i := range all {
		s.complete(repairing, &all[i])
	}
	s.files, err = s.resumeFiles(ctx, all)
	if err != nil && !errdefs.IsNotFound(err) {
		log.G(ctx).WithError(err).Error("layers of running containers can no longer be read; restart the containers")
	}
	var (
		taken []found
		errs  []error
	)
	for _, f := range slices.Backward(all) { // newest first
		err := s.adopt(repairing, &f)
		if err == nil {
			log.G(ctx).WithField("image", f.chain.Image).WithField("id", f.id).Info("going on with a mounted root")
			taken = append(taken, f)
			continue
		}
		log.G(ctx).WithError(err).WithField("path", f.target).Warn("unmounting a root of an earlier process; containers that run on it must be restarted")
		errs = append(errs, root.Unmount(f.target))
	}
	for _, name := range s.session.Waiting() {
		errs = append(errs, s.session.Abandon(name))
	}
	return s.mendAll(repairing, taken), errors.Join(errs...)
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
		if f.chain, err = s.chain(id); err != nil && !errdefs.IsNotFound(err) {
			f.err = err
		}
		all = append(all, f)
	}
	return all, nil
}

// complete has what is damaged on disk of a root repaired, if that can be done now.
func (s *Snapshotter) complete(ctx context.Context, f *found) {
	if errdefs.IsDataLoss(f.err) && s.meta.damage == nil {
		f.chain, f.err = s.chainNeeded(ctx, f.id)
	}
	err := f.err
	if err == nil {
		err = s.repaired(ctx, f.chain, func() error {
			for _, diffID := range f.chain.Layers {
				if _, err := s.layers.Layer(diffID); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("path", f.target).Error("a mounted root is damaged on disk; what is left of it is served")
	}
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

// adopt makes a root of an earlier process one of this process. If that damaged
// its chain, nobody knows its layers: what is read of them are errors until mend.
func (s *Snapshotter) adopt(ctx context.Context, f *found) error {
	switch {
	case f.err != nil && !errdefs.IsDataLoss(f.err):
		return f.err
	case f.err == nil && len(f.chain.Layers) == 0:
		return errors.New("it belongs to no snapshot")
	case f.mode == root.FUSE:
		if err := s.resumeTree(ctx, f); err != nil {
			return err
		}
	case s.files == nil:
		return errors.New("nobody kept the connection to its layers")
	}
	st := s.roots.get(f.id) // nobody else knows the root yet
	st.mounted, st.mode = true, f.mode
	s.mounted.add(f.id, f.chain.Layers)
	return nil
}

// resumeTree goes on with a root of mode FUSE, if need be without some of its
// layers' spans, or without knowing what is in it.
func (s *Snapshotter) resumeTree(ctx context.Context, f *found) error {
	life := context.WithoutCancel(ctx)
	r, err := root.Root{}, f.err
	if err == nil {
		r, err = s.treeRoot(ctx, f.id, f.chain)
	}
	if err == nil {
		return r.Resume(life)
	}
	log.G(ctx).WithError(err).WithField("path", f.target).Error("nothing of a mounted root can be read; it is tried again to repair it")
	f.know, err = s.root(f.id, f.chain).ResumeUnknown(life)
	return err
}

// treeRoot describes a root of mode FUSE that is mounted.
func (s *Snapshotter) treeRoot(ctx context.Context, id string, c chain) (root.Root, error) {
	r := s.root(id, c)
	var indexes []*layer.Index
	err := s.repaired(ctx, c, func() (err error) {
		indexes, err = indexesOf(c, s.layers.Entries)
		return err
	})
	if err != nil {
		if indexes, err = indexesOf(c, s.layers.Files); err != nil {
			return r, err
		}
	}
	r.Indexes = func() ([]*layer.Index, error) { return indexes, nil }
	for _, diffID := range c.Layers {
		if l, err := s.layers.Layer(diffID); err == nil {
			r.Layers = append(r.Layers, root.Layer{Stream: l})
		} else {
			r.Layers = append(r.Layers, root.Layer{Stream: lateLayer{s.layers, diffID}})
		}
	}
	return r, nil
}

// lateLayer is a layer that is damaged on disk, until it is repaired.
type lateLayer struct {
	layers *cache.Store
	diffID digest.Digest
}

func (l lateLayer) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	now, err := l.layers.Layer(l.diffID)
	if err != nil {
		return 0, err
	}
	return now.ReadAt(ctx, p, off)
}

// mendLater repairs roots that are mounted, and tries again until it has.
func (s *Snapshotter) mendLater(ctx context.Context, damaged []found) {
	const first, most = 4 * time.Second, 5 * time.Minute // for 3 seconds the finder remembers that it found nothing
	for pause := first; len(damaged) > 0; pause = min(2*pause, most) {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		damaged = s.mendAll(ctx, damaged)
	}
}

// mendAll repairs roots that are mounted, and returns those that are damaged still.
func (s *Snapshotter) mendAll(ctx context.Context, all []found) (damaged []found) {
	return slices.DeleteFunc(all, func(f found) bool { return s.mend(ctx, f) == nil })
}

// mend repairs what is damaged on disk of a root that is mounted.
func (s *Snapshotter) mend(ctx context.Context, f found) error {
	c, err := s.chainNeeded(ctx, f.id)
	if errdefs.IsNotFound(err) {
		return nil // it was removed
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("path", f.target).Error("containers cannot read all of their root")
		return err
	}
	whileMounted := func(do func() error) error { // and not while something is fetched: containers start meanwhile
		st := s.roots.get(f.id)
		st.mu.Lock()
		defer st.mu.Unlock()
		if !st.mounted {
			return nil
		}
		return do()
	}
	_ = whileMounted(func() error { s.mounted.add(f.id, c.Layers); return nil })
	err = s.repairMounted(ctx, c)
	if f.know != nil {
		r, terr := s.treeRoot(ctx, f.id, c)
		if terr == nil {
			terr = f.know(r)
		}
		err = errors.Join(err, terr)
	}
	if err != nil || f.mode == root.FUSE {
		return err
	}
	err = s.repaired(ctx, c, func() error {
		return whileMounted(func() error { return s.root(f.id, c).Mend(ctx) })
	})
	if err != nil {
		log.G(ctx).WithError(err).WithField("path", f.target).Error("the metadata image of a mounted root is damaged on disk; restart the containers that run on it")
	}
	return err
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
