// Package cache keeps the spans of layers on disk and fetches the missing ones.
//
// There is one directory per diff ID, shared by all images and namespaces:
//
//	<dir>/<hex of diff ID>/spans     the span part of the layer's index, and a checksum
//	                       points    seek points whose windows are in groups, and where to fetch these
//	                       windows   the groups that were fetched, sparse
//	                       entries   the entry part, zstd'ed
//	                       sources   repositories that hold the blob, JSON
//	                       data      the uncompressed stream, sparse
//	                       have      which spans of data are durable
//	                       complete  what data looked like when it was checked against the diff ID
//
// A span counts as there only after its digest was checked, and after a crash
// only if it was recorded in have, which happens after data was synced. What
// is not recorded is fetched again. What an earlier process fetched is checked
// once more when it is first read, unless all of data was checked and nobody
// has written to it since. A layer of which everything is recorded is
// read back and checked as a whole; then it is complete, and its file can serve
// as a device in the kernel (see Store.Device).
//
// Fetching. A run is one request for a stretch of a blob, decoded as it
// arrives; it ends the waits of those who want the spans it brings, one by
// one. A span is fetched by one run, unless that is so far from it that a run
// of its own brings it sooner. Runs of Layer.Fill stand still while a reader
// waits for something else, but those that bring what readers are expected to
// ask for next go on while one waits for another of them. A run that is sent the
// whole blob, since nobody sends a part, brings all that is missing.
//
// A layer that was read in order to be indexed brings its stream along: see
// Store.Receive.
//
// Space. The data files together take at most Options.MaxSize. When it is
// used up, holes are punched: for layers of which no root is mounted, least
// recently read or mounted first, then for spans that were not read lately. A hole is
// punched after its spans are durably unmarked and their reads have ended, and
// never in a file that the kernel has open as a device. If that does not help,
// or the disk is full, spans are served from memory.
//
// Locks are taken in this order: Store.adding, Store.evicting, Store.mu,
// Layer.recording, Layer.punching, Layer.indexing, Layer.mu, and then those of gate
// and memory. With Layer.mu held, no file is written and none of size read.
//
// The package does not know images or snapshots: its user adds the layers it
// needs and says which to keep.
package cache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Fetcher reads ranges of compressed blobs. Sources are image references whose
// repositories should hold the blob. A reader that has a method Blame() is told
// when what it delivered was not the blob; one that has a method Host() string
// says who delivers; one that has a method Widen(off, end int64) bool delivers another
// range than it was asked for, if it gets the whole blob anyway.
type Fetcher interface {
	Open(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error)
}

// Options configures Open.
type Options struct {
	Dir   string // directory of the layers; it is created if need be
	Fetch Fetcher
	// MaxSize is how much disk the layers' data may take. The zero value means
	// 80 % of what is free, counting what they take already.
	MaxSize Limit
	// InUse says whether a root that needs the layer is mounted; nil means that
	// none is. It is called with locks held and must not call the store.
	InUse func(diffID digest.Digest) bool
}

// Store is the layers on disk.
type Store struct {
	dir   string
	fetch Fetcher
	inUse func(digest.Digest) bool
	max   int64 // bytes of disk

	life context.Context // ends with Close
	stop context.CancelFunc
	work sync.WaitGroup // the goroutines of the store and its layers
	wake chan struct{}  // tells the upkeep that a layer may be complete

	gate    gate
	memory  memory
	metrics metrics
	fetches fetches
	used    atomic.Int64 // bytes of disk that data files take, about
	full    atomic.Bool  // spans are being served from memory

	adding sync.Mutex // serialises Add

	evicting  sync.Mutex // serialises eviction; guards the fields below
	allLoaded bool       // all layers on disk are in layers
	futile    time.Time  // when eviction last found nothing

	mu       sync.Mutex // guards the fields below, and Incoming.file once it is among them
	layers   map[digest.Digest]*Layer
	incoming map[digest.Digest]*Incoming // streams that wait for their layer to be added
}

// upkeepPeriod is how long a fetched span may go unrecorded: a crash within it
// costs fetching the span again.
const upkeepPeriod = 5 * time.Second

// Open opens the store. ctx carries the logger and nothing else. The caller
// closes the store.
func Open(ctx context.Context, opts Options) (*Store, error) {
	if err := os.MkdirAll(opts.Dir, 0o700); err != nil {
		return nil, err
	}
	held, err := heldOnDisk(opts.Dir)
	if err != nil {
		return nil, err
	}
	limit, err := opts.MaxSize.bytes(opts.Dir, held)
	if err != nil {
		return nil, err
	}
	s := &Store{
		dir: opts.Dir, fetch: opts.Fetch, inUse: opts.InUse, max: limit,
		wake: make(chan struct{}, 1), layers: map[digest.Digest]*Layer{},
		incoming: map[digest.Digest]*Incoming{},
	}
	if s.inUse == nil {
		s.inUse = func(digest.Digest) bool { return false }
	}
	s.used.Store(held)
	s.metrics = newMetrics(s)
	s.life, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	s.work.Go(s.upkeep)
	return s, nil
}

// Close ends all fetches, records what is there and closes all layers.
func (s *Store) Close() error {
	for _, l := range s.loaded() {
		l.end()
	}
	s.stop()
	s.work.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, l := range s.layers {
		errs = append(errs, l.record(), l.keepUsed(), l.close())
	}
	clear(s.layers)
	return errors.Join(errs...)
}

// upkeep records what was fetched, checks layers that are all there, and lets
// go of the indexes of layers of which nothing is fetched any more.
func (s *Store) upkeep() {
	tick := time.NewTicker(upkeepPeriod)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-s.wake:
		case <-s.life.Done():
			return
		}
		for _, l := range s.loaded() {
			logger := log.G(s.life).WithField("diffID", l.head.DiffID)
			if err := l.record(); isFull(err) {
				s.degrade(err)
			} else if err != nil {
				logger.WithError(err).Warn("cannot record fetched spans; they will be fetched again after a restart")
			}
			if err := l.finish(); err != nil {
				logger.WithError(err).Error("a layer that is all there cannot be used as a whole")
			}
			l.forgetIndex()
		}
	}
}

// nudge has the upkeep look now.
func (s *Store) nudge() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// loaded returns the layers that are open.
func (s *Store) loaded() []*Layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*Layer, 0, len(s.layers))
	for _, l := range s.layers {
		all = append(all, l)
	}
	return all
}

// Encoded is a layer's index of which the entries are encoded.
type Encoded struct {
	*layer.Index               // without entries
	Entries      []byte        // the encoded entry part, as a zstd frame
	Place        archive.Place // where the windows are if the index lacks them; zero if that is not known
}

// encode encodes the entries of x.
func encode(x *layer.Index, enc *zstd.Encoder) Encoded {
	return Encoded{Index: x, Entries: enc.EncodeAll(x.AppendEntries(nil), nil)}
}

// Add makes sure that the layers are in the store and that source is among
// those that they are fetched from. The indexes are complete, with entries.
func (s *Store) Add(source string, layers ...*layer.Index) error {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		return err
	}
	encoded := make([]Encoded, len(layers))
	for i, x := range layers {
		encoded[i] = encode(x, enc)
	}
	return s.AddEncoded(source, encoded...)
}

// AddEncoded is Add for indexes whose entries are encoded.
func (s *Store) AddEncoded(source string, layers ...Encoded) error {
	s.adding.Lock()
	defer s.adding.Unlock()
	missing, size, err := s.missing(layers)
	if err != nil {
		return err
	}
	if err = s.create(missing, source); isFull(err) && s.evict(size) > 0 {
		err = s.create(missing, source)
	}
	if err != nil {
		return err
	}
	for _, x := range layers {
		l, err := s.Layer(x.DiffID)
		if err != nil {
			return err
		}
		if l.head.Digest != x.Digest {
			continue // the same stream, compressed anew: what we have does
		}
		if err := errors.Join(l.addSource(source), l.addWindows(x, source)); err != nil {
			return fmt.Errorf("layer %s: %w", x.DiffID, err)
		}
	}
	return nil
}

// missing returns the layers that are not in the store, each once, and the sum of
// their sizes.
func (s *Store) missing(layers []Encoded) (missing []Encoded, size int64, err error) {
	for _, x := range layers {
		if err := x.DiffID.Validate(); err != nil {
			return nil, 0, fmt.Errorf("diff ID %q: %w", x.DiffID, errdefs.ErrInvalidArgument)
		}
		_, err := s.Layer(x.DiffID)
		if errdefs.IsDataLoss(err) {
			log.G(s.life).WithError(err).Warn("a layer's index was damaged on disk and is replaced")
			err = s.mend(x)
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, 0, err
		}
		if err != nil && !slices.ContainsFunc(missing, func(m Encoded) bool { return m.DiffID == x.DiffID }) {
			missing = append(missing, x)
			size += int64(x.OutSize)
		}
	}
	return missing, size, nil
}

// createWorkers is how many layers are written at once. They wait for the
// disk, and those that wait together wait for the same write of its journal.
const createWorkers = 16

// create writes the directories of new layers; each appears whole or not at
// all, unless the machine dies within moments: a pull does not wait for the disk.
// What it loses then is damage as any other, and shows.
func (s *Store) create(layers []Encoded, source string) (err error) {
	if len(layers) == 0 {
		return nil
	}
	var g errgroup.Group
	g.SetLimit(createWorkers)
	made := make([]string, len(layers))
	defer func() {
		for _, dir := range made {
			if err != nil && dir != "" {
				os.RemoveAll(dir)
			}
		}
	}()
	for i, x := range layers {
		g.Go(func() (err error) {
			if made[i], err = os.MkdirTemp(s.dir, ".new-"); err == nil {
				err = writeLayer(made[i], x, source)
			}
			if err != nil {
				return fmt.Errorf("layer %s: %w", x.DiffID, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	arrived := make([]int64, len(layers))
	var unsettled []digest.Digest
	defer func() { s.work.Go(func() { s.settle(unsettled) }) }()
	for i, x := range layers {
		arrived[i] = s.takeIncoming(made[i], x.Index)
		if err := os.Rename(made[i], filepath.Join(s.dir, x.DiffID.Encoded())); err != nil {
			s.used.Add(-arrived[i])
			return err
		}
		made[i] = ""
		unsettled = append(unsettled, x.DiffID)
	}
	return s.markArrived(layers, arrived)
}

// settle makes new layers durable.
func (s *Store) settle(layers []digest.Digest) {
	var g errgroup.Group
	g.SetLimit(createWorkers)
	for _, diffID := range layers {
		g.Go(func() error {
			dir, err := os.OpenRoot(filepath.Join(s.dir, diffID.Encoded()))
			if os.IsNotExist(err) {
				return nil // it was removed
			}
			if err != nil {
				return err
			}
			defer dir.Close()
			return syncAll(dir, sourcesFile, spansFile, pointsFile, windowsFile, entriesFile, ".")
		})
	}
	err := g.Wait()
	if err == nil {
		var all *os.Root
		if all, err = os.OpenRoot(s.dir); err == nil {
			err = errors.Join(syncDir(all), all.Close())
		}
	}
	if err != nil {
		log.G(s.life).WithError(err).Error("the disk may not keep what was written of new layers")
	}
}

// writeLayer writes the files of a new layer into dir.
func writeLayer(dir string, x Encoded, source string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	var g errgroup.Group
	if validSource(source) {
		raw, err := json.Marshal([]string{source})
		if err != nil {
			return err
		}
		g.Go(func() error { return root.WriteFile(sourcesFile, raw, 0o600) })
	}
	g.Go(func() error { return root.WriteFile(entriesFile, x.Entries, 0o600) })
	if len(x.Groups) > 0 {
		g.Go(func() error { return writePoints(root, x, source) })
	}
	err = root.WriteFile(spansFile, appendChecksum(x.AppendSpans(nil)), 0o600)
	return errors.Join(err, g.Wait())
}

// writePoints writes what a new layer has of seek points in groups.
func writePoints(dir *os.Root, x Encoded, source string) error {
	raw, err := encodePoints(x.Index, locate(x, source))
	if err == nil {
		err = dir.WriteFile(pointsFile, raw, 0o600)
	}
	if err == nil && x.Windows != nil {
		err = dir.WriteFile(windowsFile, x.Windows, 0o600)
	}
	return err
}

// Layer returns the layer with this diff ID, or errdefs.ErrNotFound, or
// errdefs.ErrDataLoss if it is damaged on disk.
func (s *Store) Layer(diffID digest.Digest) (*Layer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l, ok := s.layers[diffID]; ok {
		return l, nil
	}
	l, err := s.load(diffID)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", diffID, err)
	}
	s.layers[diffID] = l
	return l, nil
}

// load opens a layer that is on disk.
func (s *Store) load(diffID digest.Digest) (_ *Layer, err error) {
	if err := diffID.Validate(); err != nil {
		return nil, errors.Join(err, errdefs.ErrInvalidArgument)
	}
	dir, err := os.OpenRoot(filepath.Join(s.dir, diffID.Encoded()))
	if os.IsNotExist(err) {
		return nil, errdefs.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			dir.Close()
		}
	}()
	x, at, err := readIndex(s.life, dir, diffID)
	if err != nil {
		return nil, err
	}
	l := newLayer(s, dir, x)
	l.located = at
	if raw, err := dir.ReadFile(sourcesFile); err == nil {
		if l.sources, err = decodeSources(raw); err != nil {
			return nil, err
		}
	} else if !os.IsNotExist(err) {
		return nil, err
	}
	if l.data, err = dir.OpenFile(dataFile, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	if err := l.restore(); err != nil {
		return nil, errors.Join(err, l.data.Close())
	}
	return l, nil
}

// DiffIDs lists the layers on disk.
func (s *Store) DiffIDs() ([]digest.Digest, error) {
	dirs, err := os.ReadDir(s.dir)
	var all []digest.Digest
	for _, dir := range dirs {
		if diffID := digest.NewDigestFromEncoded(digest.SHA256, dir.Name()); diffID.Validate() == nil {
			all = append(all, diffID)
		}
	}
	return all, err
}

// Keep removes all layers for which keep returns false. A file that the kernel
// still has open as a device stays readable there until it is closed.
func (s *Store) Keep(keep func(diffID digest.Digest) bool) error {
	dirs, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		diffID := digest.NewDigestFromEncoded(digest.SHA256, dir.Name())
		if diffID.Validate() == nil && keep(diffID) {
			continue
		}
		errs = append(errs, s.remove(diffID, dir.Name()))
	}
	return errors.Join(errs...)
}

// remove removes the directory name, which is that of the layer diffID or a
// left-over. Another layer with this diff ID may be added at once.
func (s *Store) remove(diffID digest.Digest, name string) error {
	old := filepath.Join(s.dir, name)
	s.mu.Lock()
	l := s.layers[diffID]
	delete(s.layers, diffID)
	var held int64
	if info, err := os.Stat(filepath.Join(old, dataFile)); err == nil {
		held = blocks(info)
	}
	var err error
	if diffID.Validate() == nil {
		gone := filepath.Join(s.dir, ".old-"+name+time.Now().Format("-150405.000000000"))
		if err = os.Rename(old, gone); err == nil {
			old = gone
		}
	}
	s.mu.Unlock()
	if l != nil {
		held = l.remove()
	}
	s.used.Add(-held)
	return errors.Join(err, os.RemoveAll(old))
}
