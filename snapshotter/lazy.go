package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/snapshotter/cache"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
)

// chain is what is kept of a lazy snapshot, in snapshots/<id>/chain.
type chain struct {
	ChainID digest.Digest   `json:"chainID"`
	Layers  []digest.Digest `json:"layers"` // diff IDs, lowest first
	Image   string          `json:"image"`  // reference it was pulled by
	// Manifest is the image's; empty if an earlier version wrote this.
	Manifest digest.Digest `json:"manifest,omitempty"`
	Link     digest.Digest `json:"link,omitempty"` // see discover.Image
}

// prepareLazy commits a lazy snapshot for target, or says why it cannot.
func (s *Snapshotter) prepareLazy(ctx context.Context, key, parent string, target discover.Target, labels map[string]string) error {
	can, err := s.able.now(ctx)
	if err != nil {
		return fmt.Errorf("this machine cannot mount lazy roots: %w", err)
	}
	name := lazyName(target.ChainID, parent)
	if _, err := s.Stat(ctx, name); err == nil {
		return nil // from another namespace, or an earlier pull
	}
	a, release, err := s.finder.Find(ctx, target.Image)
	if err != nil {
		return err
	}
	defer release()
	top, err := position(a, target)
	if err != nil {
		return err
	}
	if err := s.checkMerge(a); err != nil {
		return err
	}
	s.gate.RLock()
	defer s.gate.RUnlock()
	if err := s.addLayers(a, top, target.Image.Ref); err != nil {
		return err
	}
	c := chain{ChainID: target.ChainID, Layers: a.DiffIDs()[:top+1], Image: target.Image.Ref, Manifest: target.Image.Manifest, Link: target.Image.Link}
	id, err := s.commitLazy(ctx, key, name, parent, c, labels)
	if errdefs.IsAlreadyExists(err) {
		return nil // another pull was quicker
	}
	if err != nil {
		return err
	}
	log.G(ctx).WithField("image", target.Image.Ref).WithField("chainID", target.ChainID).Info("reading the layer lazily")
	if top == len(a.DiffIDs())-1 {
		s.finder.Forget(target.Image) // nothing more will be asked of it
		s.fetchList(ctx, a, target.Image.Ref)
		s.buildAhead(ctx, id, c, can.Mode)
		s.fill(ctx, c)
	}
	return nil
}

// fill has the layers of a chain fetched in the background.
func (s *Snapshotter) fill(ctx context.Context, c chain) {
	layers := make([]*cache.Layer, 0, len(c.Layers))
	for _, diffID := range c.Layers {
		l, err := s.layers.Layer(diffID)
		if err != nil {
			log.G(ctx).WithError(err).WithField("image", c.Image).Warn("a layer cannot be fetched ahead")
			continue
		}
		layers = append(layers, l)
	}
	s.filler.Add(layers...)
}

// lazyName is the name of a lazy snapshot. Containerd finds it by the label
// containerd.io/snapshot.ref and the parent, and the same chain may stand on
// different parents: lazy or ordinary ones.
func lazyName(chainID digest.Digest, parent string) string {
	if parent == "" {
		return "lazy " + chainID.String()
	}
	return fmt.Sprintf("lazy %s on %s", chainID, digest.FromString(parent).Encoded()[:16])
}

// position returns which layer of the archive's image the target is, if that
// and all below it can be read lazily.
func position(a *archive.Archive, target discover.Target) (int, error) {
	m, _ := a.Manifest()
	for i, id := range a.ChainIDs() {
		if reason := a.NotLazy(i); reason != "" {
			return 0, fmt.Errorf("layer %d cannot be read lazily: %s", i+1, reason)
		}
		if id != target.ChainID {
			continue
		}
		// The same content in another compression is another blob.
		if got := m.Layers[i].Digest; target.Layer != "" && got != target.Layer {
			return 0, fmt.Errorf("the archive is of another image: its layer %d is %s, not %s: %w", i+1, got, target.Layer, errdefs.ErrInvalidArgument)
		}
		return i, nil
	}
	return 0, fmt.Errorf("the archive is of another image: it has no chain %s: %w", target.ChainID, errdefs.ErrInvalidArgument)
}

// checkMerge makes sure, once per image, that its layers make a root: an image
// that containerd would refuse must be refused before any of it is committed.
func (s *Snapshotter) checkMerge(a *archive.Archive) error {
	const most = 256
	image := a.Info().Descriptor.Digest
	s.mergedMu.Lock()
	defer s.mergedMu.Unlock()
	if err, ok := s.merged[image]; ok {
		return err
	}
	if len(s.merged) >= most {
		clear(s.merged)
	}
	err := merge(a)
	if err == nil || errors.Is(err, tree.ErrInvalid) || errors.Is(err, tree.ErrUnsupported) {
		s.merged[image] = err // what else went wrong may go right the next time
	}
	return err
}

func merge(a *archive.Archive) error {
	var (
		layers []*layer.Index
		total  tree.Total
	)
	for i := range a.DiffIDs() {
		if a.NotLazy(i) != "" {
			break
		}
		x, err := a.Layer(i)
		if err == nil {
			err = total.Add(x)
		}
		if err != nil {
			return err
		}
		x.Spans, x.Points = nil, nil // a hostile image has many, and nothing here needs them
		layers = append(layers, x)
	}
	_, err := tree.Merge(layers)
	return err
}

// addLayers makes sure that the layers up to top are in the store, to be
// fetched from ref's repository as well. If they are not, it adds all that the
// image has: the others are asked for next, and the disk takes many at once in
// little more time than one. The caller holds gate.
func (s *Snapshotter) addLayers(a *archive.Archive, top int, ref string) error {
	if ref == "" {
		ref = a.Info().StorageRef
	}
	m, _ := a.Manifest()
	missing := false
	for i, diffID := range a.DiffIDs()[:top+1] {
		l, err := s.layers.Layer(diffID)
		missing = missing || err != nil || l.Lacks(m.Layers[i].Digest, ref)
	}
	if !missing {
		return nil
	}
	const most = 64 << 20 // bytes of indexes in memory, or one layer's
	var (
		batch []*layer.Index
		held  int
	)
	for i := range a.DiffIDs() {
		if a.NotLazy(i) != "" {
			break
		}
		x, err := a.Layer(i)
		if err != nil {
			return err
		}
		size := x.MemorySize()
		if held+size > most {
			if err := s.layers.Add(ref, batch...); err != nil {
				return err
			}
			batch, held = nil, 0
		}
		batch, held = append(batch, x), held+size
	}
	return s.layers.Add(ref, batch...)
}

// commitLazy records the lazy snapshot and returns its id. The caller holds gate.
func (s *Snapshotter) commitLazy(ctx context.Context, key, name, parent string, c chain, labels map[string]string) (_ string, err error) {
	tmp, err := os.MkdirTemp(filepath.Join(s.dir, "snapshots"), "new-")
	if err != nil {
		return "", err
	}
	path := tmp
	defer func() {
		if err != nil {
			os.RemoveAll(path)
		}
	}()
	raw, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	if err := writeSynced(filepath.Join(tmp, "chain"), raw); err != nil {
		return "", err
	}
	var id string
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		snap, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, parent)
		if err != nil {
			return err
		}
		id = snap.ID
		_, err = storage.CommitActive(ctx, key, name, snapshots.Usage{},
			snapshots.WithLabels(labels), snapshots.WithLabels(map[string]string{discover.LabelLazy: "true"}))
		if err != nil {
			return err
		}
		path = filepath.Join(s.dir, "snapshots", id)
		s.refs.add(id, c.Layers)
		if err := os.Rename(tmp, path); err != nil {
			return err
		}
		// The record of the snapshot must not outlive a power cut without it.
		return errors.Join(syncFile(path), syncFile(filepath.Dir(path)))
	})
	if err != nil {
		s.refs.drop(id)
	}
	return id, err
}

// writeSynced writes a file that survives a power cut, once its directory does.
func writeSynced(path string, b []byte) error {
	if err := os.WriteFile(path, b, 0o600); err != nil {
		return err
	}
	return syncFile(path)
}

// syncFile makes a file, or what is in a directory, durable.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// chain reads what is kept of the lazy snapshot id; errdefs.ErrNotFound says
// that the snapshot is an ordinary one.
func (s *Snapshotter) chain(id string) (c chain, err error) {
	raw, err := os.ReadFile(filepath.Join(s.dir, "snapshots", id, "chain"))
	if os.IsNotExist(err) {
		return c, errdefs.ErrNotFound
	}
	if err != nil {
		return c, err
	}
	if err := json.Unmarshal(raw, &c); err != nil {
		return c, fmt.Errorf("what is kept of snapshot %s: %w: %w", id, err, errdefs.ErrDataLoss)
	}
	if len(c.Layers) == 0 || identity.ChainID(c.Layers) != c.ChainID {
		return c, fmt.Errorf("what is kept of snapshot %s does not name the layers of %q: %w", id, c.ChainID, errdefs.ErrDataLoss)
	}
	return c, nil
}

// chains returns all lazy snapshots by id, but for those that are damaged.
func (s *Snapshotter) chains(ctx context.Context) (map[string]chain, error) {
	dirs, err := os.ReadDir(filepath.Join(s.dir, "snapshots"))
	if err != nil {
		return nil, err
	}
	found := map[string]chain{}
	for _, dir := range dirs {
		c, err := s.chain(dir.Name())
		if errdefs.IsNotFound(err) {
			continue
		}
		if errdefs.IsDataLoss(err) {
			log.G(ctx).WithError(err).Error("a lazy snapshot is damaged on disk; its image's archive is asked for what is lost when a container needs it")
			continue
		}
		if err != nil {
			return nil, err
		}
		found[dir.Name()] = c
	}
	return found, nil
}

// lazyUsage is the disk space that the top layer of a lazy snapshot takes,
// unless an older snapshot answers for it, and the snapshot's root.
func (s *Snapshotter) lazyUsage(ctx context.Context, id string, c chain) (snapshots.Usage, error) {
	usage, err := fs.DiskUsage(ctx, filepath.Join(s.dir, "snapshots", id))
	if err != nil {
		return snapshots.Usage{}, err
	}
	if st, err := os.Stat(s.root(id, c).Image()); err == nil {
		usage.Size += st.Sys().(*syscall.Stat_t).Blocks * 512
		usage.Inodes++
	}
	top := c.Layers[len(c.Layers)-1]
	if s.refs.oldestOn(top) != id {
		return snapshots.Usage(usage), nil
	}
	l, err := s.layers.Layer(top)
	if err != nil {
		return snapshots.Usage{}, err
	}
	size, inodes := l.Usage()
	usage.Size += size
	usage.Inodes += inodes
	return snapshots.Usage(usage), nil
}

// refs counts which lazy snapshots use which layers.
type refs struct {
	mu     sync.Mutex // guards the fields below
	layers map[string][]digest.Digest
	count  map[digest.Digest]int
}

// add records that the snapshot id uses layers.
func (r *refs) add(id string, layers []digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.count == nil {
		r.layers, r.count = map[string][]digest.Digest{}, map[digest.Digest]int{}
	}
	r.layers[id] = layers
	for _, d := range layers {
		r.count[d]++
	}
}

// drop forgets the snapshot id and returns the layers that nobody uses any more.
func (r *refs) drop(id string) (unused []digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range r.layers[id] {
		if r.count[d]--; r.count[d] == 0 {
			delete(r.count, d)
			unused = append(unused, d)
		}
	}
	delete(r.layers, id)
	return unused
}

// oldestOn returns the oldest snapshot whose topmost layer is top.
func (r *refs) oldestOn(top digest.Digest) (oldest string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, layers := range r.layers {
		if layers[len(layers)-1] == top && (oldest == "" || older(id, oldest) < 0) {
			oldest = id
		}
	}
	return oldest
}

// used says whether some snapshot uses the layer.
func (r *refs) used(diffID digest.Digest) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.count[diffID] > 0
}
