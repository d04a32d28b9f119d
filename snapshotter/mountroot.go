package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive/erofs"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/snapshotter/layerfs"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// roots holds the state of the lazy snapshots' roots.
type roots struct {
	mu   *sync.Mutex // guards the map
	byID map[string]*rootState
}

// rootState is one root; its lock serialises building, mounting and removing.
type rootState struct {
	mu      sync.Mutex // guards mounted and the root's directory
	mounted bool
}

func newRoots() roots { return roots{mu: &sync.Mutex{}, byID: map[string]*rootState{}} }

func (r roots) get(id string) *rootState {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byID[id] == nil {
		r.byID[id] = &rootState{}
	}
	return r.byID[id]
}

func (s *Snapshotter) rootImage(id string) string { return filepath.Join(s.dir, "roots", id, "image") }
func (s *Snapshotter) rootMount(id string) string { return filepath.Join(s.dir, "roots", id, "mnt") }

// mountRoot makes sure that the root of the lazy snapshot id is mounted and
// returns the directory that is the container's root.
func (s *Snapshotter) mountRoot(ctx context.Context, id string, c chain) (string, error) {
	st := s.roots.get(id)
	st.mu.Lock()
	defer st.mu.Unlock()
	dir := filepath.Join(s.rootMount(id), erofs.RootDir)
	if st.mounted {
		return dir, nil
	}
	if s.noLazy != nil {
		return "", fmt.Errorf("image %s was pulled lazily, but this machine can no longer mount it: %w", c.Image, s.noLazy)
	}
	if err := s.buildRoot(id, c); err != nil {
		return "", fmt.Errorf("root of image %s: %w", c.Image, err)
	}
	devices := make([]string, len(c.Layers))
	for i, diffID := range c.Layers {
		path, release, err := s.device(diffID)
		if err != nil {
			return "", fmt.Errorf("root of image %s: %w", c.Image, err)
		}
		defer release() // once it is mounted, the kernel has the file open
		devices[i] = path
	}
	if err := root.Mount(ctx, s.rootImage(id), s.rootMount(id), devices); err != nil {
		return "", fmt.Errorf("root of image %s: %w", c.Image, err)
	}
	st.mounted = true
	s.mounted.add(id, c.Layers)
	return dir, nil
}

// device returns the file that the kernel reads a layer from: the layer itself
// if all of it is here, so that nothing of ours is in the way, else one that
// fetches what is missing. It stays what it is until release is called.
func (s *Snapshotter) device(diffID digest.Digest) (path string, release func(), err error) {
	path, release, err = s.layers.Device(diffID)
	if !errdefs.IsNotFound(err) {
		return path, release, err
	}
	l, err := s.layers.Layer(diffID)
	if err != nil {
		return "", nil, err
	}
	return s.files.Path(diffID), func() {}, s.files.Add(diffID, l)
}

// buildRoot writes the root's metadata image if it is not there. The caller
// holds the root's lock.
func (s *Snapshotter) buildRoot(id string, c chain) error {
	if _, err := os.Stat(s.rootImage(id)); err == nil {
		return nil
	}
	for _, dir := range []string{filepath.Dir(s.rootMount(id)), s.rootMount(id)} {
		if err := os.Mkdir(dir, 0o711); err != nil && !os.IsExist(err) {
			return err
		}
	}
	layers := make([]*layer.Index, len(c.Layers))
	for i, diffID := range c.Layers {
		var err error
		if layers[i], err = s.layers.Entries(diffID); err != nil {
			return err
		}
	}
	return root.Build(s.rootImage(id), layers)
}

// buildAhead builds the root of an image's top layer while containerd is still
// pulling, so that the first container finds it ready.
func (s *Snapshotter) buildAhead(ctx context.Context, id string, c chain) {
	ctx = context.WithoutCancel(ctx)
	s.background.Go(func() {
		st := s.roots.get(id)
		st.mu.Lock()
		defer st.mu.Unlock()
		if _, err := s.chain(id); err != nil {
			return // removed meanwhile
		}
		if err := s.buildRoot(id, c); err != nil {
			log.G(ctx).WithError(err).WithField("image", c.Image).Warn("building the root ahead failed; it is tried again when a container needs it")
		}
	})
}

// removeRoot unmounts and removes the root of the snapshot id, if it has one.
func (s *Snapshotter) removeRoot(id string) error {
	st := s.roots.get(id)
	st.mu.Lock()
	defer st.mu.Unlock()
	if err := root.Unmount(s.rootMount(id)); err != nil {
		return fmt.Errorf("unmounting %s: %w", s.rootMount(id), err)
	}
	st.mounted = false
	s.mounted.drop(id)
	if err := os.RemoveAll(filepath.Join(s.dir, "roots", id)); err != nil {
		return err
	}
	s.roots.mu.Lock()
	delete(s.roots.byID, id)
	s.roots.mu.Unlock()
	return nil
}

// unmountAll unmounts every root.
func (s *Snapshotter) unmountAll() error {
	s.roots.mu.Lock()
	defer s.roots.mu.Unlock()
	var errs []error
	for id, st := range s.roots.byID {
		st.mu.Lock()
		if st.mounted {
			errs = append(errs, root.Unmount(s.rootMount(id)))
			st.mounted = false
		}
		st.mu.Unlock()
	}
	return errors.Join(errs...)
}

// unmountStale unmounts the roots of an earlier process: nobody answers their
// reads any more.
func (s *Snapshotter) unmountStale() error {
	dir, err := filepath.EvalSymlinks(filepath.Join(s.dir, "roots"))
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range mounts {
		if strings.HasPrefix(m.Mountpoint, dir+"/") {
			errs = append(errs, root.Unmount(m.Mountpoint))
		}
	}
	return errors.Join(errs...)
}

// probe mounts a layer file system and, on top of it, a root of one file. What
// fails here would fail for every image.
func (s *Snapshotter) probe(ctx context.Context) (*layerfs.FS, error) {
	files, err := layerfs.New(ctx)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(filepath.Join(s.dir, "roots"), "probe-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = root.Probe(ctx, dir, files)
	}
	if err != nil {
		return nil, errors.Join(err, files.Close())
	}
	return files, nil
}
