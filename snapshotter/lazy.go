package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sync/errgroup"

	"github.com/beam-cloud/containerd-clip/archive"
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

// prepareLazy commits a lazy snapshot for target, and for the image's layers on
// top of it, or says why it cannot.
func (s *Snapshotter) prepareLazy(ctx context.Context, parent string, target discover.Target, labels map[string]string) error {
	can, err := s.able.now(ctx)
	if err != nil {
		return fmt.Errorf("this machine cannot mount lazy roots: %w", err)
	}
	if _, err := s.Stat(ctx, lazyName(target.ChainID, parent)); err == nil {
		return nil // it was made with a layer below, from another namespace, or by an earlier pull
	}
	a, release, err := s.finder.FindEarly(ctx, target.Image, s.mergeEarly)
	if err != nil {
		return err
	}
	defer release()
	top, err := position(a, target)
	if err != nil {
		return err
	}
	is, err := s.merge(a)
	if err != nil {
		return err
	}
	last := agreed(a, target, top, len(is.layers)-1)
	s.gate.RLock()
	defer s.gate.RUnlock()
	if err := s.addLayers(a, is, target.Image.Ref); err != nil {
		return err
	}
	made := lazySnapshots(a, target, parent, top, last)
	made[0].labels = labels
	ids, err := s.commitLazy(ctx, made)
	if err != nil {
		return err
	}
	log.G(ctx).WithField("image", target.Image.Ref).WithField("chainID", target.ChainID).WithField("layers", len(ids)).Info("reading layers lazily")
	if last == len(a.DiffIDs())-1 && len(ids) > 0 {
		s.finder.Forget(target.Image) // nothing more will be asked of it
		c := made[len(made)-1].chain
		id := ids[len(ids)-1]
		s.fetchList(ctx, id, a, is, target.Image.Ref)
		s.watchImports(ctx, id, a, is)
		s.buildAhead(ctx, id, c, is, can.Mode)
		s.fill(ctx, c)
	}
	return nil
}

// lazySnapshot is one that is to be committed.
type lazySnapshot struct {
	name, parent string
	chain        chain
	labels       map[string]string
}

// agreed returns the last of the archive's layers from top to last that are also
// the image's, as far as containerd says. An archive that an image links to may be
// of one whose upper layers were compressed otherwise.
func agreed(a *archive.Archive, target discover.Target, top, last int) int {
	m, _ := a.Manifest()
	for i, d := range target.Above {
		if at := top + i; i > 0 && at <= last && m.Layers[at].Digest != d {
			return at - 1
		}
	}
	return last
}

// lazySnapshots returns the snapshots of the layers from top, which is the target
// on the snapshot parent, to last. containerd asks for those behind the target
// next: made together, they cost one wait for the disk.
func lazySnapshots(a *archive.Archive, target discover.Target, parent string, top, last int) []lazySnapshot {
	var all []lazySnapshot
	chainIDs := a.ChainIDs()
	for i := top; i <= last; i++ {
		c := chain{ChainID: chainIDs[i], Layers: a.DiffIDs()[:i+1], Image: target.Image.Ref, Manifest: target.Image.Manifest, Link: target.Image.Link}
		name := lazyName(c.ChainID, parent)
		all = append(all, lazySnapshot{name, parent, c, discover.LazyLabels(target.Image, c.ChainID)})
		parent = name
	}
	return all
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

// addLayers makes sure that the layers are in the store, to be fetched from ref's
// repository as well. The caller holds gate.
func (s *Snapshotter) addLayers(a *archive.Archive, is *stack, ref string) error {
	if ref == "" {
		ref = a.Info().StorageRef
	}
	missing := false
	for i, x := range is.layers {
		l, err := s.layers.Layer(x.DiffID)
		place, elsewhere := a.Place(i)
		missing = missing || err != nil || l.Lacks(x.Digest, ref) || elsewhere && l.LacksPlace(place)
	}
	if !missing {
		return nil
	}
	const most = 64 << 20 // bytes of indexes in memory, or one layer's
	var (
		batch []cache.Encoded
		held  int
	)
	for i := range is.layers {
		x, err := encodedLayer(a, i)
		if err != nil {
			return err
		}
		size := x.MemorySize() + len(x.Entries)
		if held+size > most {
			if err := s.layers.AddEncoded(ref, batch...); err != nil {
				return err
			}
			batch, held = nil, 0
		}
		batch, held = append(batch, x), held+size
	}
	return s.layers.AddEncoded(ref, batch...)
}

func encodedLayer(a *archive.Archive, i int) (cache.Encoded, error) {
	x, err := a.SpansAndWindows(i)
	if err != nil {
		return cache.Encoded{}, err
	}
	entries, err := a.Entries(i)
	place, _ := a.Place(i)
	return cache.Encoded{Index: x, Entries: entries, Place: place}, err
}

// commitLazy records lazy snapshots, each on top of the one before, and returns
// the ids of those that were not there yet. The caller holds gate.
func (s *Snapshotter) commitLazy(ctx context.Context, all []lazySnapshot) (ids []string, err error) {
	dirs := make([]string, len(all)) // as they are to be removed if anything fails
	defer func() {
		for _, dir := range dirs {
			if dir != "" {
				os.RemoveAll(dir)
			}
		}
	}()
	if err := s.writeChains(all, dirs); err != nil {
		return nil, err
	}
	parent := filepath.Join(s.dir, "snapshots")
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		for i, snap := range all {
			id, err := recordLazy(ctx, snap)
			if errdefs.IsAlreadyExists(err) {
				continue // another pull was quicker
			}
			if err != nil {
				return err
			}
			path := filepath.Join(parent, id)
			if err := os.Rename(dirs[i], path); err != nil {
				return err
			}
			dirs[i] = path
			ids = append(ids, id)
			s.refs.add(id, snap.chain.Layers)
		}
		// The record of a snapshot must not outlive a power cut without it.
		return syncFile(parent)
	})
	if err != nil {
		for _, id := range ids {
			s.refs.drop(id)
		}
		return nil, err
	}
	for i, dir := range dirs {
		if slices.Contains(ids, filepath.Base(dir)) {
			dirs[i] = ""
		}
	}
	return ids, nil
}

// recordLazy writes down a lazy snapshot and returns its id. The error is
// errdefs.ErrAlreadyExists if there is one of its name.
func recordLazy(ctx context.Context, snap lazySnapshot) (string, error) {
	if _, _, _, err := storage.GetInfo(ctx, snap.name); err == nil {
		return "", fmt.Errorf("snapshot %q: %w", snap.name, errdefs.ErrAlreadyExists)
	}
	key := "new " + snap.name
	made, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, snap.parent)
	if err != nil {
		return "", err
	}
	_, err = storage.CommitActive(ctx, key, snap.name, snapshots.Usage{},
		snapshots.WithLabels(snap.labels), snapshots.WithLabels(map[string]string{discover.LabelLazy: "true"}))
	return made.ID, err
}

// chainWriters is how many chains are written at once: those that wait for the
// disk together wait for the same write of its journal.
const chainWriters = 16

// writeChains makes a directory for each snapshot, durable but for its name.
func (s *Snapshotter) writeChains(all []lazySnapshot, dirs []string) error {
	var g errgroup.Group
	g.SetLimit(chainWriters)
	for i, snap := range all {
		g.Go(func() error {
			raw, err := json.Marshal(snap.chain)
			if err != nil {
				return err
			}
			if dirs[i], err = os.MkdirTemp(filepath.Join(s.dir, "snapshots"), "new-"); err != nil {
				return err
			}
			return errors.Join(writeSynced(filepath.Join(dirs[i], "chain"), raw), syncFile(dirs[i]))
		})
	}
	return g.Wait()
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

// add records that the snapshot id uses layers, and no others.
func (r *refs) add(id string, layers []digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.count == nil {
		r.layers, r.count = map[string][]digest.Digest{}, map[digest.Digest]int{}
	}
	for _, d := range layers {
		r.count[d]++
	}
	r.dropLocked(id)
	r.layers[id] = layers
}

// drop forgets the snapshot id and returns the layers that nobody uses any more.
func (r *refs) drop(id string) (unused []digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dropLocked(id)
}

func (r *refs) dropLocked(id string) (unused []digest.Digest) {
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
