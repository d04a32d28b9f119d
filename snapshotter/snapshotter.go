// Package snapshotter is a containerd snapshotter whose image layers may stay in the registry.
//
// A snapshot is either ordinary, a directory as overlayfs wants it, or lazy: a
// committed image layer of which only the index is here. A lazy snapshot
// stands for its layer and all below it; what is mounted for it is one root of
// the whole chain (package root), whatever the snapshots below it are.
// Ordinary snapshots may stand on lazy ones, so the mounts of a snapshot are
// overlayfs over the ordinary directories down to the first lazy snapshot and
// its root.
//
// Containerd offers to leave a layer out by Prepare with the label
// containerd.io/snapshot.ref; the answer "already exists" accepts. Whatever
// speaks against it makes the snapshot an ordinary one, with the reason in the
// log and in a label.
//
// On disk, below the root directory:
//
//	metadata.db             containerd's storage.MetaStore, and metadata.db.copy
//	snapshots/<id>/fs,work  an ordinary snapshot
//	snapshots/<id>/chain    a lazy snapshot: its layers, JSON
//	roots/<id>/             its root: image and mount point
//	early/                  roots of snapshots that are about to be made
//	layers/                 package cache
//	archives/               package discover
//	recordings/             package record
//
// Roots outlive the process if Options.Keeper holds what they need: New takes
// over those that it finds mounted, before anything else, because containers
// wait for them. Nothing about them is written down: that they are mounted, the
// kernel says, and which layers they have, their snapshots.
//
// Locks are taken in this order: gate, the metadata store's, a root's, refs'.
package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/snapshotter/cache"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
	"github.com/beam-cloud/containerd-clip/snapshotter/fuseconn"
	"github.com/beam-cloud/containerd-clip/snapshotter/keeper"
	"github.com/beam-cloud/containerd-clip/snapshotter/layerfs"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// Options configures New.
type Options struct {
	Root string // directory of all state; not on overlayfs or tmpfs
	// Mount is how lazy roots are mounted; empty is root.Auto.
	Mount root.Mode
	// Referrers looks for archives in the image's registry.
	Referrers bool
	// Sources are other places to look for archives in. Close does not close them.
	Sources []discover.Source
	// Registry says how registries are reached.
	Registry  remote.Options
	CacheSize cache.Limit // how much disk fetched layers may take
	Fill      fill.Options
	// Prefetch fetches what the archive says that a start reads, as soon as
	// the image is pulled.
	Prefetch bool
	// Keeper keeps roots for the next process, so that containers go on. Nil
	// lets them end with Close.
	Keeper *keeper.Keeper
	// Helper mounts roots; nil does it in this process.
	Helper root.Helper
}

// Snapshotter implements snapshots.Snapshotter and snapshots.Cleaner.
type Snapshotter struct {
	dir      string
	meta     *metadata
	layers   *cache.Store
	filler   *fill.Filler
	files    *layerfs.FS // nil if not even that can be mounted: noFiles
	noFiles  error
	session  *fuseconn.Session
	helper   root.Helper
	able     ability
	finder   *discover.Finder
	recorder *record.Recorder
	started  time.Time
	prefetch bool // Options.Prefetch
	roots    roots
	own      ownRoots

	// gate is held shared while layers are added for a snapshot that is not
	// committed yet, exclusively while unused layers are removed.
	gate sync.RWMutex
	refs refs

	mounted refs // the lazy snapshots whose roots are mounted, and their layers

	mending sync.Mutex // serialises chainNeeded's repairs

	prepared *prometheus.CounterVec

	merging sync.Mutex // held while layers are merged

	mergeMu sync.Mutex                    // guards the fields below
	refused map[digest.Digest]error       // images whose layers make no root
	early   map[*archive.Archive]*merging // those that are still coming

	starts  starts
	imports *importWatch
	tidy    *time.Timer // gives memory back

	background sync.WaitGroup
	stop       context.CancelFunc // ends what waits for the network there; nil if nothing does
	closing    sync.Once
	closeErr   error // of the first Close
}

// New opens the snapshotter in opts.Root and removes what an earlier process
// left half-done. It needs neither network nor containerd, but asks for what
// mounted roots miss.
func New(ctx context.Context, opts Options) (_ *Snapshotter, err error) {
	s := &Snapshotter{started: time.Now(), dir: opts.Root, helper: opts.Helper, prefetch: opts.Prefetch, roots: newRoots(), refused: map[digest.Digest]error{}, early: map[*archive.Archive]*merging{}}
	s.tidy = time.AfterFunc(tidyAfter, debug.FreeOSMemory)
	if err := os.RemoveAll(filepath.Join(s.dir, earlyDir)); err != nil {
		return nil, err
	}
	for _, sub := range []string{"snapshots", "roots", "archives", earlyDir} {
		if err := os.MkdirAll(filepath.Join(s.dir, sub), 0o700); err != nil {
			return nil, err
		}
	}
	// Whoever could pass could run what images have with setuid bits.
	if err := os.Chmod(s.dir, 0o700); err != nil {
		return nil, err
	}
	s.prepared = newPrepared()
	s.session = fuseconn.NewSession(opts.Keeper)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.meta, err = openMetadata(ctx, s.dir); err != nil {
		return nil, err
	}
	client := remote.New(opts.Registry)
	if s.layers, err = cache.Open(ctx, cache.Options{
		Dir: filepath.Join(s.dir, "layers"), Fetch: client, MaxSize: opts.CacheSize, InUse: s.mounted.used,
	}); err != nil {
		return nil, err
	}
	if err := s.mendChains(ctx); err != nil {
		return nil, err
	}
	s.finder = discover.New(discover.Options{
		Dir: filepath.Join(s.dir, "archives"), Referrers: opts.Referrers, Fetcher: client.Fetcher, Sources: opts.Sources,
		Receive: func() discover.Stream { return s.layers.Receive() }, Known: s.layers.Entries,
	})
	// Readers wait for this; nothing may look into a root before it.
	damaged, err := s.takeOver(ctx)
	if err != nil {
		return nil, err
	}
	if s.recorder, err = record.Open(ctx, filepath.Join(s.dir, "recordings")); err != nil {
		return nil, err
	}
	s.filler = fill.New(ctx, opts.Fill)
	s.imports = newImportWatch(s.expectFiles)
	if s.files == nil {
		s.files, s.noFiles = layerfs.New(ctx, s.session)
	}
	s.able.try = func(ctx context.Context) (root.Ability, error) { return s.probe(ctx, cmp.Or(opts.Mount, root.Auto)) }
	s.able.find(ctx)
	return s, s.restore(ctx, damaged)
}

// restore learns which layers are in use and removes what is not. damaged are
// mounted roots that are to be repaired.
func (s *Snapshotter) restore(ctx context.Context, damaged []found) error {
	if s.meta.damage != nil {
		log.G(ctx).WithError(s.meta.damage).Error("the snapshotter works in part")
		return nil // nothing is garbage that nobody can tell from what is not
	}
	if err := s.Cleanup(ctx); err != nil {
		return err
	}
	chains, err := s.chains(ctx)
	if err != nil {
		return err
	}
	for id, c := range chains {
		s.refs.add(id, c.Layers)
	}
	if err := s.layers.Keep(s.refs.used); err != nil {
		return err
	}
	repairing, stop := context.WithCancel(ctx)
	s.stop = stop
	s.background.Go(func() { s.mendLater(repairing, damaged) })
	s.background.Go(func() {
		for _, c := range chains {
			_ = s.repairMounted(repairing, c) // the log says so
		}
		s.fillAll(ctx, chains)
		if err := s.finder.Sweep(ctx); err != nil {
			log.G(ctx).WithError(err).Warn("cannot look for archives")
		}
	})
	return nil
}

// fillAll has the layers of chains fetched in the background.
func (s *Snapshotter) fillAll(ctx context.Context, chains map[string]chain) {
	s.gate.RLock()
	defer s.gate.RUnlock()
	for _, c := range chains {
		s.fill(ctx, c)
	}
}

// Close ends the snapshotter. With Options.Keeper, roots that a snapshot of a
// container stands on stay, and who reads there waits for the next process.
// Other roots are unmounted; without a keeper, a container that still runs on
// one can no longer read what is not in memory. Closing again returns what the
// first Close did.
func (s *Snapshotter) Close() error {
	s.closing.Do(func() { s.closeErr = s.close() })
	return s.closeErr
}

func (s *Snapshotter) close() error {
	if s.stop != nil {
		s.stop()
	}
	s.background.Wait()
	s.tidy.Stop()
	if s.imports != nil {
		s.imports.close()
	}
	if s.filler != nil {
		s.filler.Close()
	}
	errs := []error{s.leaveRoots()}
	s.own.closeAll()
	if s.recorder != nil {
		s.recorder.Close()
	}
	if s.finder != nil {
		s.finder.Close()
	}
	if s.layers != nil {
		errs = append(errs, s.layers.Close())
	}
	if s.meta != nil {
		errs = append(errs, s.meta.Close())
	}
	return errors.Join(errs...)
}

// InFlight returns how many requests of the kernel are being answered now, and
// the age of the oldest. A request that is older than fuseconn.AnswerTimeout is
// stuck; its reader has an error.
func (s *Snapshotter) InFlight() (n int, oldest time.Duration) { return s.session.InFlight() }

// Stat implements snapshots.Snapshotter.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update implements snapshots.Snapshotter.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (out snapshots.Info, err error) {
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		out, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return out, err
}

// Usage implements snapshots.Snapshotter. Of a lazy snapshot it is what its
// layer and its root take on disk now; a layer that is the topmost of several
// snapshots counts for the oldest of them.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	var (
		id    string
		info  snapshots.Info
		usage snapshots.Usage
	)
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		id, info, usage, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return snapshots.Usage{}, err
	}
	if info.Kind == snapshots.KindActive {
		du, err := fs.DiskUsage(ctx, s.upper(id))
		return snapshots.Usage(du), err
	}
	chain, err := s.chain(id)
	if errdefs.IsNotFound(err) {
		return usage, nil
	}
	if err != nil {
		return snapshots.Usage{}, err
	}
	return s.lazyUsage(ctx, id, chain)
}

// Mounts implements snapshots.Snapshotter.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var (
		snap storage.Snapshot
		ids  idmap
	)
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if snap, err = storage.GetSnapshot(ctx, key); err != nil {
			return err
		}
		labels, err := labelsOfKey(ctx, key)
		if err != nil {
			return err
		}
		ids, err = idmapOf(labels)
		return err
	})
	if err != nil {
		return nil, err
	}
	return s.mounts(ctx, snap, ids)
}

// Prepare implements snapshots.Snapshotter. It returns errdefs.ErrAlreadyExists
// if the layer that containerd is about to unpack can be read lazily.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	var info snapshots.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return nil, err
		}
	}
	target, err := discover.ParseTarget(info.Labels)
	if errors.Is(err, discover.ErrNoTarget) {
		return s.create(ctx, snapshots.KindActive, key, parent, opts)
	}
	if diffID := info.Labels[snapshots.LabelSnapshotDiffID]; parent == "" && diffID != "" && diffID != target.ChainID.String() {
		return nil, fmt.Errorf("layer %s without the layers below it: %w", target.ChainID, errRebase)
	}
	if err == nil {
		err = s.prepareLazy(ctx, parent, target, info.Labels)
	}
	if err == nil {
		s.prepared.WithLabelValues(asLazy).Inc()
		return nil, fmt.Errorf("layer %s is read lazily: %w", target.ChainID, errdefs.ErrAlreadyExists)
	}
	if ctx.Err() != nil {
		return nil, err
	}
	s.prepared.WithLabelValues(asOrdinary).Inc()
	log.G(ctx).WithError(err).WithField("image", target.Image.Ref).WithField("chainID", target.ChainID).
		Info("unpacking the layer instead of reading it lazily")
	return s.create(ctx, snapshots.KindActive, key, parent, append(opts, snapshots.WithLabels(map[string]string{
		discover.LabelNotLazy: shorten(err.Error()),
	})))
}

// errRebase is returned when containerd unpacks layers side by side and joins
// them afterwards: it would lose whiteouts, and the parents of lazy snapshots.
var errRebase = fmt.Errorf("containerd-clip does not rebase snapshots (is \"rebase\" among the capabilities of its proxy plugin in containerd's configuration? remove it): %w",
	errdefs.ErrFailedPrecondition)

// shorten keeps a reason within what containerd accepts as a label.
func shorten(reason string) string {
	const most = 1000
	if len(reason) > most {
		reason = reason[:most] + "..."
	}
	return reason
}

// View implements snapshots.Snapshotter.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

// Commit implements snapshots.Snapshotter.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	var committed snapshots.Info
	for _, opt := range opts {
		if err := opt(&committed); err != nil {
			return err
		}
	}
	return s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		id, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		if committed.Parent != info.Parent && committed.Parent != "" {
			return fmt.Errorf("committing %s on another parent: %w", name, errRebase)
		}
		if reason := info.Labels[discover.LabelNotLazy]; reason != "" {
			// What containerd commits with replaces the labels of Prepare.
			opts = append(opts, snapshots.WithLabels(map[string]string{discover.LabelNotLazy: reason}))
		}
		usage, err := fs.DiskUsage(ctx, s.upper(id))
		if err != nil {
			return err
		}
		_, err = storage.CommitActive(ctx, key, name, snapshots.Usage(usage), opts...)
		return err
	})
}

// Remove implements snapshots.Snapshotter.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.meta.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err != nil {
		return err
	}
	// The snapshot is gone; what is left of it is garbage that Cleanup removes
	// too, so failing here must not make containerd believe otherwise.
	if err := s.discard(id); err != nil {
		log.G(ctx).WithError(err).WithField("key", key).Warn("cannot remove all of a snapshot; it is tried again later")
	}
	return nil
}

// Cleanup implements snapshots.Cleaner: it removes the remains of snapshots
// that no longer exist.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	// No snapshot is between its directory and its record while the gate is held.
	s.gate.Lock()
	var ids map[string]string
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if ids, err = storage.IDMap(ctx); errdefs.IsNotFound(err) {
			return nil // a store in which no snapshot was ever made
		}
		return err
	})
	var garbage []string
	if err == nil {
		garbage, err = s.unknown(ids)
	}
	s.gate.Unlock()
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range garbage {
		errs = append(errs, s.discard(id))
	}
	return errors.Join(errs...)
}

// unknown lists the directories of snapshots that are not in ids.
func (s *Snapshotter) unknown(ids map[string]string) ([]string, error) {
	var found []string
	for _, sub := range []string{"snapshots", "roots"} {
		dirs, err := os.ReadDir(filepath.Join(s.dir, sub))
		if err != nil {
			return nil, err
		}
		for _, dir := range dirs {
			if _, ok := ids[dir.Name()]; !ok {
				found = append(found, dir.Name())
			}
		}
	}
	return found, nil
}

// discard removes everything that belongs to the snapshot id, which has no
// record any more.
func (s *Snapshotter) discard(id string) error {
	if err := s.removeRoot(id); err != nil {
		return err
	}
	s.own.drop(id)
	if err := os.RemoveAll(filepath.Join(s.dir, "snapshots", id)); err != nil {
		return err
	}
	s.gate.Lock()
	defer s.gate.Unlock()
	unused := s.refs.drop(id)
	if len(unused) == 0 {
		return nil
	}
	for _, diffID := range unused {
		if s.files != nil {
			s.files.Remove(diffID)
		}
		s.filler.Remove(diffID)
	}
	return s.layers.Keep(s.refs.used)
}

func (s *Snapshotter) upper(id string) string { return filepath.Join(s.dir, "snapshots", id, "fs") }
func (s *Snapshotter) work(id string) string  { return filepath.Join(s.dir, "snapshots", id, "work") }
