package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// metadata is containerd's store of snapshots, with a copy of it beside. If both
// are damaged, everything but what it is needed for goes on: containers read.
type metadata struct {
	*storage.MetaStore
	path   string
	damage error // why there are no transactions

	later *time.Timer // makes the copy of a large store

	copying sync.Mutex // guards the copy and the fields below
	copied  int        // the transaction that the copy ends with
	closed  bool
}

// openMetadata opens the store in dir, or makes one if there are no snapshots yet.
// The copy takes the place of one that is damaged.
func openMetadata(ctx context.Context, dir string) (*metadata, error) {
	path := filepath.Join(dir, "metadata.db")
	store, err := storage.NewMetaStore(path)
	if err != nil {
		return nil, err
	}
	m := &metadata{MetaStore: store, path: path}
	m.later = time.AfterFunc(copyAfter, func() { m.copy(context.WithoutCancel(ctx)) })
	m.later.Stop()
	last, err := checkMetadata(path)
	if errors.Is(err, fs.ErrNotExist) && !anySnapshot(dir) {
		return m, nil
	}
	if err == nil {
		if copied, err := checkMetadata(copyOf(path)); err == nil && copied == last {
			m.copied = last
		}
		m.copy(ctx) // there may be none, or one from before a power cut
		return m, nil
	}
	if cerr := m.replace(); cerr != nil {
		m.damage = fmt.Errorf("%s is damaged, and its copy cannot take its place: running containers go on, but no snapshot can be made or removed. Stop the daemon "+
			"and put a copy of the file back, or end all containers of this snapshotter, move the daemon's root away, and remove and pull the images again: %w; %w: %w",
			path, err, cerr, errdefs.ErrDataLoss)
		return m, nil
	}
	log.G(ctx).WithError(err).WithField("path", path).Warn("the store of snapshots was damaged on disk and its copy has taken its place; see whether the disk fails or somebody writes below the daemon's root")
	m.copy(ctx)
	return m, nil
}

// copyOf is the copy of a store, damagedOf the store that it took the place of.
func copyOf(path string) string    { return path + ".copy" }
func damagedOf(path string) string { return path + ".damaged" }

// replace puts the copy into the place of the store, which is kept.
func (m *metadata) replace() error {
	if _, err := checkMetadata(copyOf(m.path)); err != nil {
		return err
	}
	if err := os.Rename(m.path, damagedOf(m.path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := syncFile(copyOf(m.path)); err != nil {
		return err
	}
	return os.Rename(copyOf(m.path), m.path)
}

// WithTransaction is MetaStore's. Before anybody is told of a change, it is in
// the copy, too, or there is none: with the copy in the store's place nothing
// that somebody uses is taken for garbage, unless the power was cut.
func (m *metadata) WithTransaction(ctx context.Context, writable bool, fn storage.TransactionCallback) error {
	if m.damage != nil {
		return m.damage
	}
	err := m.MetaStore.WithTransaction(ctx, writable, fn)
	if err == nil && writable {
		m.changed(ctx)
	}
	return err
}

// A store of copyAtOnce bytes, about a thousand snapshots, is copied in
// milliseconds. The copy of a larger one comes when nothing was changed for a while.
const (
	copyAtOnce = 4 << 20
	copyAfter  = time.Second
)

func (m *metadata) changed(ctx context.Context) {
	if st, err := os.Stat(m.path); err == nil && st.Size() <= copyAtOnce {
		m.copy(ctx)
		return
	}
	m.copying.Lock()
	defer m.copying.Unlock()
	m.dropCopyLocked(ctx)
	m.later.Reset(copyAfter)
}

// Close brings the copy up to date and closes the store.
func (m *metadata) Close() error {
	m.later.Stop()
	if m.damage == nil {
		m.copy(context.Background())
	}
	m.copying.Lock()
	defer m.copying.Unlock()
	m.closed = true
	return m.MetaStore.Close()
}

// copy brings the copy up to date. It does not wait for the disk: what a power
// cut takes of the copy, the store still has.
func (m *metadata) copy(ctx context.Context) {
	m.copying.Lock()
	defer m.copying.Unlock()
	if m.closed {
		return
	}
	if err := m.copyLocked(ctx); err != nil {
		log.G(ctx).WithError(err).WithField("path", m.path).Warn("the store of snapshots cannot be copied; there is no copy until the next change")
		m.dropCopyLocked(ctx)
	}
}

// dropCopyLocked removes the copy: an old one would make garbage of what is new.
func (m *metadata) dropCopyLocked(ctx context.Context) {
	m.copied = 0
	if err := os.Remove(copyOf(m.path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.G(ctx).WithError(err).WithField("path", copyOf(m.path)).Error("an old copy of the store of snapshots cannot be removed")
	}
}

func (m *metadata) copyLocked(ctx context.Context) (err error) {
	_, t, err := m.TransactionContext(ctx, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.Rollback()) }()
	tx, ok := t.(*bolt.Tx)
	if !ok {
		return fmt.Errorf("a transaction is a %T", t)
	}
	if tx.ID() == m.copied {
		return nil // with a change that came meanwhile
	}
	tmp := copyOf(m.path) + ".new"
	if err := tx.CopyFile(tmp, 0o600); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	// With a file in its place, ext4 would have the disk write it now.
	if err := os.Remove(copyOf(m.path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(tmp, copyOf(m.path)); err != nil {
		return err
	}
	m.copied = tx.ID()
	return nil
}

// anySnapshot says whether there are snapshots, which a new store would call garbage.
func anySnapshot(dir string) bool {
	found, err := filepath.Glob(filepath.Join(dir, "snapshots", "[0-9]*"))
	return err != nil || len(found) > 0
}

// checkMetadata reads all of a bolt database. Bolt itself believes what it finds
// there, and ends the process if it is wrong. It returns the number of the last
// transaction, and fs.ErrNotExist if there is no database.
func checkMetadata(path string) (last int, err error) {
	if st, err := os.Stat(path); err != nil {
		return 0, err
	} else if st.Size() == 0 {
		return 0, fmt.Errorf("it is empty: %w", fs.ErrNotExist)
	}
	// Behind the end of the file there is no memory.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	var file *os.File
	defer func() {
		if p := recover(); p != nil {
			// Bolt's mapping stays and would keep its lock.
			err = errors.Join(fmt.Errorf("reading it: %v", p), unix.Flock(int(file.Fd()), unix.LOCK_UN), file.Close())
		}
	}()
	db, err := bolt.Open(path, 0o600, &bolt.Options{
		Timeout: 10 * time.Second, ReadOnly: true, PreLoadFreelist: true,
		OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
			file, err = os.OpenFile(name, flag, mode)
			return file, err
		},
	})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	err = db.View(func(tx *bolt.Tx) error {
		last = tx.ID()
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return readBucket(b) })
	})
	return last, err
}

func readBucket(b *bolt.Bucket) error {
	return b.ForEach(func(key, value []byte) error {
		if value != nil {
			return nil
		}
		nested := b.Bucket(key)
		if nested == nil {
			return fmt.Errorf("bucket %q cannot be read", key)
		}
		return readBucket(nested)
	})
}
