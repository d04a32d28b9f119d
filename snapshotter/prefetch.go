package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/snapshotter/cache"
	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
	"github.com/beam-cloud/containerd-clip/snapshotter/layerfs"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// fetchList has fetched what the archive says that a start of its image reads.
// Without a list it remembers what every start reads, for the first mount of the
// snapshot id. A list that cannot be used is no reason to refuse the image. The
// caller holds gate and has added the layers.
func (s *Snapshotter) fetchList(ctx context.Context, id string, a *archive.Archive, is *stack, ref string) {
	if !s.prefetch {
		return
	}
	logger := log.G(ctx).WithField("image", ref)
	list, err := a.Prefetch()
	if err != nil {
		logger.WithError(err).Warn("ignoring the archive's prefetch list")
	}
	if list == nil {
		s.starts.set(id, s.wantsOf(is, startFiles(a.Config(), is.root)))
		return
	}
	wants, unknown, err := s.wants(a, list.Spans)
	if err != nil {
		logger.WithError(err).Warn("ignoring the archive's prefetch list")
		return
	}
	if unknown > 0 {
		logger.WithField("ranges", unknown).Warn("ignoring a part of the archive's prefetch list: its layers do not have these spans")
	}
	logger.WithField("ranges", len(wants)).WithField("recorded", list.Recorded).Info("fetching what a recorded start read")
	s.filler.Prefetch(wants)
}

// wants returns the spans of a's list that exist, and how many of its ranges are
// of others. A layer that came with another archive may have spans of another
// size than a says.
func (s *Snapshotter) wants(a *archive.Archive, list []archive.SpanRange) (wants []fill.Want, unknown int, err error) {
	indexes := make([]*layer.Index, len(a.DiffIDs()))
	layers := make([]*cache.Layer, len(a.DiffIDs()))
	for _, r := range list {
		if indexes[r.Layer] == nil && a.NotLazy(r.Layer) == "" {
			if indexes[r.Layer], err = a.Spans(r.Layer); err != nil {
				return nil, 0, err
			}
			layers[r.Layer], _ = s.layers.Layer(a.DiffIDs()[r.Layer]) // the list may name one that is not there
		}
		x, l := indexes[r.Layer], layers[r.Layer]
		if l == nil || r.End() > len(x.Spans) {
			unknown++
			continue
		}
		from, _ := x.SpanRange(r.First)
		_, to := x.SpanRange(r.End() - 1)
		wants = append(wants, fill.Want{Layer: l, Spans: l.Cover(int64(from), int64(to))})
	}
	return wants, unknown, nil
}

// Recording implements record.Source: it returns what was recorded under a
// name (see discover.LabelRecord), or of the last start of a chain.
func (s *Snapshotter) Recording(_ context.Context, name string) (record.Document, error) {
	if doc, ok := s.own.recording(name); ok {
		return doc, nil
	}
	chainID, err := digest.Parse(name)
	if err != nil {
		return record.Document{}, fmt.Errorf("nothing is recorded under %q: %w", name, errdefs.ErrNotFound)
	}
	return s.recorder.Get(chainID)
}

// ownRoots are the active snapshots with a root of their own, which is recorded.
// The root is in roots/<id>, and is removed with the snapshot.
type ownRoots struct {
	mu   sync.Mutex // guards the map
	byID map[string]*ownRoot
}

// ownRoot is one of them. Its fields are guarded by the lock of its rootState,
// but for name, which does not change, and rec, which is guarded by ownRoots.mu.
type ownRoot struct {
	name  string
	rec   *record.Recording // nil until the root is mounted
	files *layerfs.FS       // nil until then
}

// want says that snap is to have a root of its own that is recorded under name,
// unless that is empty.
func (o *ownRoots) want(snap storage.Snapshot, name string) {
	if name == "" || snap.Kind != snapshots.KindActive {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byID == nil {
		o.byID = map[string]*ownRoot{}
	}
	o.byID[snap.ID] = &ownRoot{name: name}
}

func (o *ownRoots) get(id string) *ownRoot {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.byID[id]
}

func (o *ownRoots) recording(name string) (record.Document, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, own := range o.byID {
		if own.name == name && own.rec != nil {
			return own.rec.Document(), true
		}
	}
	return record.Document{}, false
}

// drop forgets the snapshot id, whose root is unmounted.
func (o *ownRoots) drop(id string) {
	o.mu.Lock()
	own := o.byID[id]
	delete(o.byID, id)
	o.mu.Unlock()
	if own == nil || own.files == nil {
		return
	}
	if err := own.files.Close(); err != nil {
		log.L.WithError(err).Warn("a root that was recorded is still in use")
	}
}

func (o *ownRoots) closeAll() {
	o.mu.Lock()
	ids := make([]string, 0, len(o.byID))
	for id := range o.byID {
		ids = append(ids, id)
	}
	o.mu.Unlock()
	for _, id := range ids {
		o.drop(id)
	}
}

// record returns the recording of a new root of c and the files that are its
// devices. The caller closes the files.
func (s *Snapshotter) record(ctx context.Context, c chain) (rec *record.Recording, files *layerfs.FS, layers []root.Layer, err error) {
	if files, err = layerfs.NewBrief(ctx, s.session); err != nil {
		return nil, nil, nil, err
	}
	rec = record.New(record.Document{Image: c.Image, ChainID: c.ChainID, Layers: c.Layers})
	for i, diffID := range c.Layers {
		l, err := s.layers.Layer(diffID)
		if err != nil {
			return nil, nil, nil, errors.Join(err, files.Close())
		}
		stream := rec.Stream(i, l)
		if err := files.Add(diffID, stream); err != nil {
			return nil, nil, nil, errors.Join(err, files.Close())
		}
		layers = append(layers, root.Layer{Device: files.Path(diffID), Stream: stream})
	}
	return rec, files, layers, nil
}

// mountOwn makes sure that the snapshot id has a root of its own and returns the
// directory that is the container's root. The kernel has nothing of that root in
// memory, so it reads what it would read on a machine that sees the image for the
// first time.
func (s *Snapshotter) mountOwn(ctx context.Context, id string, own *ownRoot, c chain) (string, error) {
	st := s.roots.get(id)
	st.mu.Lock()
	defer st.mu.Unlock()
	r := s.root(id, c)
	r.Brief = true
	if st.mounted {
		return r.Path(), nil
	}
	can, err := s.able.now(ctx)
	if err != nil {
		return "", fmt.Errorf("image %s cannot be recorded: this machine cannot mount lazy roots: %w", c.Image, err)
	}
	rec, files, layers, err := s.record(ctx, c)
	if err != nil {
		return "", fmt.Errorf("root of image %s: %w", c.Image, err)
	}
	r.Layers = layers
	if err := r.Mount(ctx, can.Mode); err != nil {
		return "", fmt.Errorf("root of image %s: %w", c.Image, errors.Join(err, files.Close()))
	}
	st.mounted, st.mode = true, can.Mode
	s.mounted.add(id, c.Layers)
	s.own.mu.Lock()
	own.rec, own.files = rec, files
	s.own.mu.Unlock()
	return r.Path(), nil
}
