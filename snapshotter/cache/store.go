// Package cache keeps the spans of layers on disk and fetches the missing ones.
//
// There is one directory per diff ID, shared by all images and namespaces:
//
//	<dir>/<hex of diff ID>/spans    the span part of the layer's index
//	                       entries  the entry part, zstd'ed
//	                       sources  repositories that hold the blob, JSON
//	                       data     the uncompressed stream, sparse
//	                       have     which spans of data are durable
//
// A span counts as there only after its digest was checked, and after a crash
// only if it was recorded in have, which happens after data was synced. What
// is not recorded is fetched again.
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
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Fetcher reads ranges of compressed blobs. Sources are image references whose
// repositories should hold the blob. A reader that has a method Blame() is told
// when what it delivered was not the blob.
type Fetcher interface {
	Open(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error)
}

// Store is the layers on disk.
type Store struct {
	dir   string
	fetch Fetcher
	stop  context.CancelFunc
	done  chan struct{}

	mu     sync.Mutex // guards layers
	layers map[digest.Digest]*Layer
}

// syncPeriod is how long a fetched span may go unrecorded: a crash within it
// costs fetching the span again.
const syncPeriod = 5 * time.Second

// Open opens the store in dir, which it creates if need be.
func Open(dir string, fetch Fetcher) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &Store{dir: dir, fetch: fetch, stop: stop, done: make(chan struct{}), layers: map[digest.Digest]*Layer{}}
	go s.syncLoop(ctx)
	return s, nil
}

// Close records what is there and closes all layers. Reads must have ended.
func (s *Store) Close() error {
	s.stop()
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, l := range s.layers {
		errs = append(errs, l.sync(), l.data.Close())
	}
	clear(s.layers)
	return errors.Join(errs...)
}

func (s *Store) syncLoop(ctx context.Context) {
	defer close(s.done)
	tick := time.NewTicker(syncPeriod)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		for _, l := range s.open() {
			if err := l.sync(); err != nil {
				log.G(ctx).WithError(err).WithField("diffID", l.index.DiffID).Warn("cannot record fetched spans; they will be fetched again after a restart")
			}
		}
	}
}

func (s *Store) open() []*Layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*Layer, 0, len(s.layers))
	for _, l := range s.layers {
		all = append(all, l)
	}
	return all
}

func (s *Store) path(diffID digest.Digest, name string) string {
	return filepath.Join(s.dir, diffID.Encoded(), name)
}

// Add makes sure that the layer that x describes is in the store and that
// source is among those it is fetched from. x is complete, entries included.
func (s *Store) Add(x *layer.Index, source string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := x.DiffID.Validate(); err != nil {
		return fmt.Errorf("diff ID %q: %w", x.DiffID, errdefs.ErrInvalidArgument)
	}
	l, err := s.layerLocked(x.DiffID)
	if errdefs.IsNotFound(err) {
		if err := s.create(x); err != nil {
			return fmt.Errorf("layer %s: %w", x.DiffID, err)
		}
		l, err = s.layerLocked(x.DiffID)
	}
	if err != nil {
		return err
	}
	if l.index.Digest != x.Digest {
		return nil // the same stream, compressed anew: what we have does
	}
	return l.addSource(source)
}

// create writes the directory of a new layer; it appears whole or not at all.
func (s *Store) create(x *layer.Index) (err error) {
	tmp, err := os.MkdirTemp(s.dir, ".new-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(tmp)
		}
	}()
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(tmp, "spans"), x.AppendSpans(nil)); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(tmp, "entries"), enc.EncodeAll(x.AppendEntries(nil), nil)); err != nil {
		return err
	}
	data, err := os.OpenFile(filepath.Join(tmp, "data"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(data.Truncate(int64(x.OutSize)), data.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(s.dir, x.DiffID.Encoded()))
}

// Layer returns the layer with this diff ID, or errdefs.ErrNotFound.
func (s *Store) Layer(diffID digest.Digest) (*Layer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.layerLocked(diffID)
}

func (s *Store) layerLocked(diffID digest.Digest) (*Layer, error) {
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
	raw, err := os.ReadFile(s.path(diffID, "spans"))
	if os.IsNotExist(err) {
		return nil, errdefs.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	x, err := layer.DecodeSpans(raw)
	if err != nil {
		return nil, err
	}
	if x.DiffID != diffID {
		return nil, fmt.Errorf("its directory holds %s: %w", x.DiffID, errdefs.ErrDataLoss)
	}
	l := newLayer(s, x)
	if raw, err := os.ReadFile(s.path(diffID, "sources")); err == nil {
		if err := json.Unmarshal(raw, &l.sources); err != nil {
			return nil, fmt.Errorf("sources: %w", err)
		}
	} else if !os.IsNotExist(err) {
		return nil, err
	}
	if l.data, err = os.OpenFile(s.path(diffID, "data"), os.O_RDWR, 0); err != nil {
		return nil, err
	}
	l.loadHave()
	return l, nil
}

// Entries returns the layer's whole index. It is read from disk each time,
// since it is only needed to build a root.
func (s *Store) Entries(diffID digest.Digest) (*layer.Index, error) {
	l, err := s.Layer(diffID)
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(s.path(diffID, "entries"))
	if err != nil {
		return nil, err
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	if raw, err = dec.DecodeAll(raw, nil); err != nil {
		return nil, fmt.Errorf("entries of layer %s: %w", diffID, err)
	}
	x := *l.index
	if err := x.DecodeEntries(raw); err != nil {
		return nil, fmt.Errorf("entries of layer %s: %w", diffID, err)
	}
	return &x, nil
}

// Keep removes all layers for which keep returns false.
func (s *Store) Keep(keep func(diffID digest.Digest) bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
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
		if l, ok := s.layers[diffID]; ok {
			delete(s.layers, diffID)
			errs = append(errs, l.remove())
		}
		errs = append(errs, os.RemoveAll(filepath.Join(s.dir, dir.Name())))
	}
	return errors.Join(errs...)
}

func (l *Layer) addSource(source string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if source == "" || slices.Contains(l.sources, source) {
		return nil
	}
	// The newest first: it is the one that works now.
	sources := append([]string{source}, l.sources...)
	sources = sources[:min(len(sources), maxSources)]
	raw, err := json.Marshal(sources)
	if err != nil {
		return err
	}
	if err := writeFile(l.store.path(l.index.DiffID, "sources"), raw); err != nil {
		return err
	}
	l.sources = sources
	return nil
}

// maxSources bounds how many repositories are remembered per layer.
const maxSources = 16

// writeFile replaces the file at path, durably and in one step.
func writeFile(path string, b []byte) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, tmp.Close())
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	if _, err := tmp.Write(b); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
