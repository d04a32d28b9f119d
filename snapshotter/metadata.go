package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// metadata is containerd's store of snapshots. If it is damaged, everything but
// what it is needed for goes on: containers read.
type metadata struct {
	*storage.MetaStore
	damage error // why there are no transactions
}

// openMetadata opens the store in dir, or makes one if there are no snapshots yet.
func openMetadata(dir string) (*metadata, error) {
	path := filepath.Join(dir, "metadata.db")
	store, err := storage.NewMetaStore(path)
	if err != nil {
		return nil, err
	}
	m := &metadata{MetaStore: store}
	err = checkMetadata(path)
	if errors.Is(err, fs.ErrNotExist) && !anySnapshot(dir) {
		return m, nil
	}
	if err != nil {
		m.damage = fmt.Errorf("%s is damaged: running containers go on, but no snapshot can be made or removed. Stop the daemon and put a copy "+
			"of the file back, or end all containers of this snapshotter, move the daemon's root away, and remove and pull the images again: %w: %w",
			path, err, errdefs.ErrDataLoss)
	}
	return m, nil
}

// WithTransaction is MetaStore's.
func (m *metadata) WithTransaction(ctx context.Context, writable bool, fn storage.TransactionCallback) error {
	if m.damage != nil {
		return m.damage
	}
	return m.MetaStore.WithTransaction(ctx, writable, fn)
}

// anySnapshot says whether there are snapshots, which a new store would call garbage.
func anySnapshot(dir string) bool {
	found, err := filepath.Glob(filepath.Join(dir, "snapshots", "[0-9]*"))
	return err != nil || len(found) > 0
}

// checkMetadata reads all of a bolt database. Bolt itself believes what it finds
// there, and ends the process if it is wrong. It returns fs.ErrNotExist if
// there is none.
func checkMetadata(path string) (err error) {
	if st, err := os.Stat(path); err != nil {
		return err
	} else if st.Size() == 0 {
		return fmt.Errorf("it is empty: %w", fs.ErrNotExist)
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
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	return db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return readBucket(b) })
	})
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
