package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// roots holds the state of the lazy snapshots' roots.
type roots struct {
	mu   *sync.Mutex // guards the map
	byID map[string]*rootState
}

// rootState is one root; its lock serialises building, mounting and removing.
type rootState struct {
	mu      sync.Mutex // guards the fields below and the root's directory
	mounted bool
	mode    root.Mode // while it is mounted
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

// root describes the root of the lazy snapshot id.
func (s *Snapshotter) root(id string, c chain) root.Root {
	return root.Root{Dir: filepath.Join(s.dir, "roots", id), Session: s.session, Helper: s.helper, Indexes: func() ([]*layer.Index, error) {
		return indexesOf(c, s.layers.Entries)
	}}
}

// indexesOf reads the indexes of a chain's layers.
func indexesOf(c chain, read func(digest.Digest) (*layer.Index, error)) ([]*layer.Index, error) {
	layers := make([]*layer.Index, len(c.Layers))
	for i, diffID := range c.Layers {
		var err error
		if layers[i], err = read(diffID); err != nil {
			return nil, err
		}
	}
	return layers, nil
}

// mountRoot makes sure that the root of the lazy snapshot id is mounted and
// returns the directory that is the container's root.
func (s *Snapshotter) mountRoot(ctx context.Context, id string, c chain) (_ string, err error) {
	st := s.roots.get(id)
	st.mu.Lock()
	defer st.mu.Unlock()
	r := s.root(id, c)
	if st.mounted {
		return r.Path(), nil
	}
	ctx, span := tracing.StartSpan(ctx, "clip.mount", tracing.WithAttribute("image", c.Image))
	defer func() { span.SetStatus(err); span.End() }()
	can, err := s.able.now(ctx)
	if err != nil {
		return "", fmt.Errorf("image %s was pulled lazily, but this machine can no longer mount it: %w", c.Image, err)
	}
	if err := s.repaired(ctx, c, func() error { return s.mountShared(ctx, id, r, c, can.Mode) }); err != nil {
		return "", fmt.Errorf("root of image %s: %w", c.Image, err)
	}
	st.mounted, st.mode = true, can.Mode
	s.mounted.add(id, c.Layers)
	s.tidy.Reset(tidyAfter)
	return r.Path(), nil
}

// mountShared mounts the root r of the snapshot id, which all containers of an
// image share.
func (s *Snapshotter) mountShared(ctx context.Context, id string, r root.Root, c chain, mode root.Mode) error {
	start := record.Document{Image: c.Image, ChainID: c.ChainID, Layers: c.Layers}
	for i, diffID := range c.Layers {
		l, seen, release, err := s.layerOf(diffID, mode)
		if err != nil {
			return err
		}
		defer release() // once it is mounted, the kernel has the file open
		r.Layers = append(r.Layers, l)
		// What another root reads of it may be in the kernel's memory.
		if !seen || s.mounted.used(diffID) {
			start.Hidden = append(start.Hidden, i)
		}
	}
	s.recorder.Start(start)
	if wants := s.starts.take(id); len(wants) > 0 {
		s.filler.Prefetch(wants)
	}
	s.imports.mounted(id)
	return r.Mount(ctx, mode)
}

// layerOf decides where a root that is about to be mounted reads a layer: from
// the layer's own file if all of it is here, so that nothing of ours is in the
// way, else from one that fetches what is missing. It stays what it is until
// release is called. seen says whether we are asked for what is read.
func (s *Snapshotter) layerOf(diffID digest.Digest, mode root.Mode) (_ root.Layer, seen bool, release func(), err error) {
	l, err := s.layers.Layer(diffID)
	if err != nil {
		return root.Layer{}, false, nil, err
	}
	l.Use()
	stream := s.imports.stream(diffID, s.recorder.Stream(diffID, l))
	path, release, err := s.layers.Device(diffID)
	seen = mode == root.FUSE
	if errdefs.IsNotFound(err) {
		path, release, seen = s.files.Path(diffID), func() {}, true
		err = s.files.Add(diffID, stream)
	}
	return root.Layer{Device: path, Stream: stream}, seen, release, err
}

// earlyDir holds roots that are built before there is a snapshot for them.
const earlyDir = "early"

// tidyAfter is how long after the last root was built the memory that it took is
// given back. Nothing else may allocate for minutes, and then nothing collects.
const tidyAfter = 10 * time.Second

// rootAhead is a root that is built before there is a snapshot for it: while the
// image's archive comes, processor and disk have nothing else to do.
type rootAhead struct {
	done    chan struct{}
	dir     string // valid after done; empty if it was not built
	claimed atomic.Bool
}

func newRootAhead() *rootAhead { return &rootAhead{done: make(chan struct{})} }

// claim says whether the caller is the one who moves or removes the root.
func (r *rootAhead) claim() bool { return r.claimed.CompareAndSwap(false, true) }

func (r *rootAhead) remove() {
	if <-r.done; r.dir != "" {
		os.RemoveAll(r.dir)
	}
}

// move makes it the root to, unless there is one already. If it does not come
// about, to is built as any other.
func (r *rootAhead) move(to string) {
	if <-r.done; r.dir != "" && os.Rename(r.dir, to) != nil {
		os.RemoveAll(r.dir)
	}
}

// buildEarly builds the root of a stack that has no snapshot yet.
func (s *Snapshotter) buildEarly(r *rootAhead, is *stack, image string) {
	can, err := s.able.known()
	if err != nil {
		return
	}
	dir, err := os.MkdirTemp(filepath.Join(s.dir, earlyDir), "")
	if err == nil {
		err = root.Root{Dir: dir}.BuildMerged(context.Background(), can.Mode, is.layers, is.root)
	}
	if err != nil {
		os.RemoveAll(dir)
		log.L.WithError(err).WithField("image", image).Debug("a root was not built while its archive came; it is built later")
		return
	}
	r.dir = dir
}

// buildAhead builds the root of an image's top layer while containerd is still
// pulling, so that the first container finds it ready.
func (s *Snapshotter) buildAhead(ctx context.Context, id string, c chain, is *stack, mode root.Mode) {
	ctx = context.WithoutCancel(ctx)
	mine := is.ahead != nil && is.ahead.claim()
	s.background.Go(func() {
		defer s.tidy.Reset(tidyAfter)
		st := s.roots.get(id)
		st.mu.Lock()
		defer st.mu.Unlock()
		if _, err := s.chain(id); err != nil {
			if mine {
				is.ahead.remove()
			}
			return // removed meanwhile
		}
		if mine {
			is.ahead.move(s.root(id, c).Dir)
		}
		if err := s.root(id, c).BuildMerged(ctx, mode, is.layers, is.root); err != nil {
			log.G(ctx).WithError(err).WithField("image", c.Image).Warn("building the root ahead failed; it is tried again when a container needs it")
		}
	})
}

// removeRoot unmounts and removes the root of the snapshot id, if it has one.
func (s *Snapshotter) removeRoot(id string) error {
	st := s.roots.get(id)
	st.mu.Lock()
	defer st.mu.Unlock()
	r := s.root(id, chain{})
	if err := r.Unmount(); err != nil {
		return fmt.Errorf("unmounting %s: %w", r.Dir, err)
	}
	st.mounted = false
	s.starts.take(id)
	s.imports.drop(id)
	for _, diffID := range s.mounted.drop(id) {
		if l, err := s.layers.Layer(diffID); err == nil {
			l.Use() // until now
		}
	}
	if err := os.RemoveAll(r.Dir); err != nil {
		return err
	}
	s.roots.mu.Lock()
	delete(s.roots.byID, id)
	s.roots.mu.Unlock()
	return nil
}

// probe finds out what roots can be on top of the layer file system. What fails
// here would fail for every image.
func (s *Snapshotter) probe(ctx context.Context, want root.Mode) (root.Ability, error) {
	if s.files == nil {
		return root.Ability{}, s.noFiles
	}
	return root.Choose(ctx, want, filepath.Join(s.dir, "roots"), s.files, s.helper)
}
