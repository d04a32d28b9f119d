package snapshotter

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
)

// logbook is what was logged.
type logbook struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (l *logbook) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// openLogged is open with a log to look into.
func openLogged(t *testing.T, dir string) (context.Context, *Snapshotter, *logbook) {
	t.Helper()
	book := &logbook{}
	logger := logrus.New()
	logger.SetOutput(book)
	ctx := log.WithLogger(t.Context(), logrus.NewEntry(logger))
	sn, err := New(ctx, Options{Root: dir})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sn.Close()) })
	return ctx, sn, book
}

// TestDamage alters the files of a snapshotter that does not run: what is wrong is named with what to do, nothing wrong
// is served, and what can be fetched again is.
func TestDamage(t *testing.T) {
	cut := func(path string) error {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.Truncate(path, st.Size()/2)
	}
	alter := func(path string) error {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for i := range b {
			b[i] ^= byte(i%7 + 1)
		}
		return os.WriteFile(path, b, 0o600)
	}
	for name, c := range map[string]struct {
		files  string // a pattern
		damage func(string) error
		says   []string
	}{
		"image cut":         {"roots/*/image", cut, []string{"metadata image", "built again"}},
		"image altered":     {"roots/*/image", alter, []string{"metadata image", "built again"}},
		"image removed":     {"roots/*/image", os.Remove, nil},
		"digest removed":    {"roots/*/image.sha256", os.Remove, nil},
		"digest altered":    {"roots/*/image.sha256", alter, []string{"metadata image", "built again"}},
		"spans cut":         {"layers/*/spans", cut, []string{"damaged on disk", "replaced from the image's archive"}},
		"spans altered":     {"layers/*/spans", alter, []string{"damaged on disk", "replaced from the image's archive"}},
		"spans removed":     {"layers/*/spans", os.Remove, []string{"damaged on disk", "replaced from the image's archive"}},
		"data cut":          {"layers/*/data", cut, nil},
		"data altered":      {"layers/*/data", alter, []string{"damaged on disk", "fetched again"}},
		"data removed":      {"layers/*/data", os.Remove, nil},
		"marks altered":     {"layers/*/have", alter, nil},
		"sources emptied":   {"layers/*/sources", func(path string) error { return os.Truncate(path, 0) }, []string{"damaged on disk", "replaced from the image's archive"}},
		"sources and layer": {"layers/*", os.RemoveAll, []string{"damaged on disk", "replaced from the image's archive"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			img, ref := lazyImage(t, dir)
			sn := open(t, dir)
			mounts, err := sn.Prepare(t.Context(), "container", pull(t, sn, img, ref))
			require.NoError(t, err)
			requireRead(t, mounts)
			require.NoError(t, sn.Close())
			damageFiles(t, filepath.Join(dir, c.files), c.damage)

			ctx, sn, book := openLogged(t, dir)
			mounts, err = sn.Mounts(ctx, "container")
			require.NoError(t, err)
			requireRead(t, mounts)
			for _, says := range c.says {
				require.Contains(t, book.String(), says)
			}
			require.NoError(t, sn.Close())
			ctx, sn, book = openLogged(t, dir)
			mounts, err = sn.Mounts(ctx, "container")
			require.NoError(t, err)
			requireRead(t, mounts)
			require.NotContains(t, book.String(), "level=error", "it is as if nothing had been: %s", book)
			require.NoError(t, sn.Remove(t.Context(), "container"))
		})
	}
}

// TestEntriesDamaged is about what is needed only to build a root.
func TestEntriesDamaged(t *testing.T) {
	dir := t.TempDir()
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	top := pull(t, sn, img, ref)
	require.NoError(t, sn.Close())
	damageFiles(t, filepath.Join(dir, "layers/*/entries"), func(path string) error { return os.WriteFile(path, []byte("entries"), 0o600) })
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "roots")))

	ctx, sn, book := openLogged(t, dir)
	mounts, err := sn.Prepare(ctx, "container", top)
	require.NoError(t, err)
	requireRead(t, mounts)
	require.Contains(t, book.String(), "replaced from the image's archive")
	require.NoError(t, sn.Close())

	// Without the archive there is no repair: an error says so.
	damageFiles(t, filepath.Join(dir, "layers/*/entries"), os.Remove)
	damageFiles(t, filepath.Join(dir, "roots/*/image"), os.Remove)
	damageFiles(t, filepath.Join(dir, "archives/*"), os.Remove)
	_, sn, _ = openLogged(t, dir)
	_, err = sn.Mounts(t.Context(), "container")
	require.ErrorIs(t, err, errdefs.ErrDataLoss)
	require.ErrorContains(t, err, "archive cannot be fetched again")
}

func damageFiles(t *testing.T, pattern string, damage func(string) error) {
	t.Helper()
	files, err := filepath.Glob(pattern)
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, f := range files {
		require.NoError(t, damage(f))
	}
}

// TestChainDamaged has lazy snapshots that no longer know their layers: they are told again, the archive being asked
// only where nothing on the machine knows. The others work.
func TestChainDamaged(t *testing.T) {
	write := func(content string) func(string) error {
		return func(path string) error { return os.WriteFile(path, []byte(content), 0o600) }
	}
	swap := func(path string) error {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(path, bytes.Replace(b, []byte(`sha256:`), []byte(`sha256:00`), 1), 0o600)
	}
	for name, c := range map[string]struct {
		files  string // patterns
		damage func(string) error
	}{
		"top":             {"snapshots/2/chain", write("{")},
		"top altered":     {"snapshots/2/chain", swap},
		"top removed":     {"snapshots/2/chain", os.Remove},
		"bottom":          {"snapshots/1/chain", write("")},
		"both":            {"snapshots/*/chain", write("{}")},
		"both removed":    {"snapshots/*/chain", os.Remove},
		"and the layer":   {"snapshots/2/chain layers/*", os.RemoveAll},
		"and the layers":  {"snapshots/*/chain layers/*", os.RemoveAll},
		"and the indexes": {"snapshots/*/chain layers/*/spans", os.Remove},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			img, ref := lazyImage(t, dir)
			sn := open(t, dir)
			mounts, err := sn.Prepare(t.Context(), "container", pull(t, sn, img, ref))
			require.NoError(t, err)
			requireRead(t, mounts)
			ordinary, err := sn.Prepare(t.Context(), "ordinary", "")
			require.NoError(t, err)
			require.NoError(t, sn.Close())
			for _, files := range strings.Fields(c.files) {
				damageFiles(t, filepath.Join(dir, files), c.damage)
			}

			ctx, sn, book := openLogged(t, dir)
			again, err := sn.Mounts(t.Context(), "ordinary")
			require.NoError(t, err)
			require.Equal(t, ordinary, again)
			_, err = sn.Status(ctx)
			require.NoError(t, err)
			mounts, err = sn.Mounts(ctx, "container")
			require.NoError(t, err)
			requireRead(t, mounts)
			require.Contains(t, book.String(), "damaged on disk and is written anew")
			require.NoError(t, sn.Close())
			require.NoError(t, open(t, dir).Close(), "the lower snapshot is told from the upper one")

			ctx, sn, book = openLogged(t, dir)
			mounts, err = sn.Mounts(ctx, "container")
			require.NoError(t, err)
			requireRead(t, mounts)
			require.NoError(t, sn.Remove(ctx, "container"))
			require.NotContains(t, book.String(), "level=error", "it is as if nothing had been: %s", book)
		})
	}
}

// TestChainLost has nothing left that knows the layers.
func TestChainLost(t *testing.T) {
	dir := t.TempDir()
	img, ref, away := lazyImageAt(t, dir)
	sn := open(t, dir)
	top := pull(t, sn, img, ref)
	require.NoError(t, sn.Close())
	away()
	for _, files := range []string{"snapshots/*/chain", "layers/*", "archives/*"} {
		damageFiles(t, filepath.Join(dir, files), os.RemoveAll)
	}

	ctx, sn, book := openLogged(t, dir)
	require.Contains(t, book.String(), "a lazy snapshot is damaged on disk")
	_, err := sn.Prepare(ctx, "container", top)
	require.ErrorIs(t, err, errdefs.ErrDataLoss)
	require.ErrorContains(t, err, "archive cannot be fetched again")
	require.ErrorContains(t, err, "remove the image and pull it again")
	status, err := sn.Status(ctx)
	require.NoError(t, err)
	require.Contains(t, status.Snapshots[0].NotLazy, "does not name the layers")
	info, err := sn.Stat(ctx, top)
	require.NoError(t, err)
	require.NoError(t, sn.Remove(ctx, top))
	require.NoError(t, sn.Remove(ctx, info.Parent))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "archives"), 0o700))
	ref, _ = publishImage(t, dir, img)
	require.Eventually(t, func() bool { // archives that come later are seen, but not at once
		_, release, err := sn.finder.Find(ctx, discover.Image{Ref: ref, Manifest: img.Descriptor.Digest})
		if err == nil {
			release()
		}
		return err == nil
	}, time.Minute, 50*time.Millisecond)
	mounts, err := sn.Prepare(ctx, "container", pull(t, sn, img, ref))
	require.NoError(t, err)
	requireRead(t, mounts)
}

// TestLayersCountedOnce has a snapshot's layers told anew: who used them before does not use them twice.
func TestLayersCountedOnce(t *testing.T) {
	low, high := digest.FromString("low"), digest.FromString("high")
	var r refs
	r.add("1", nil)
	r.add("1", []digest.Digest{low})
	r.add("2", []digest.Digest{low, high})
	r.add("2", []digest.Digest{low, high})
	require.Equal(t, []digest.Digest{high}, r.drop("2"))
	require.True(t, r.used(low))
	require.Equal(t, []digest.Digest{low}, r.drop("1"))
	require.False(t, r.used(low))
}

// metadataDamage is what a disk may do to a store of snapshots.
var metadataDamage = map[string]func(path string) error{
	"removed": os.Remove,
	"empty":   func(path string) error { return os.Truncate(path, 0) },
	"half": func(path string) error {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.Truncate(path, st.Size()/2)
	},
	"a page": func(path string) error { return os.Truncate(path, 4096) },
	"two":    func(path string) error { return os.Truncate(path, 8192) },
	"garbage": func(path string) error {
		return os.WriteFile(path, bytes.Repeat([]byte("clip"), 8192), 0o600)
	},
	"pages": func(path string) error {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for i := 8192; i < len(b); i++ {
			b[i] ^= 0x5a
		}
		return os.WriteFile(path, b, 0o600)
	},
}

// precious makes a container with a file of its own, and returns its image.
func precious(t *testing.T, dir string) (image string) {
	t.Helper()
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	image = pull(t, sn, img, ref)
	mounts, err := sn.Prepare(t.Context(), "container", image)
	require.NoError(t, err)
	require.NoError(t, mount.WithTempMount(t.Context(), mounts, func(root string) error {
		return os.WriteFile(filepath.Join(root, "precious"), nil, 0o600)
	}))
	require.NoError(t, sn.Close())
	return image
}

// TestMetadataDamaged has the copy of the store of snapshots take its place: every snapshot is there.
func TestMetadataDamaged(t *testing.T) {
	for name, damage := range metadataDamage {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			top := precious(t, dir)
			for range 2 { // and there is a copy of the copy
				require.NoError(t, damage(filepath.Join(dir, "metadata.db")))
				ctx, sn, book := openLogged(t, dir)
				require.Contains(t, book.String(), "its copy has taken its place")
				require.NotContains(t, book.String(), "level=error")
				if name != "removed" {
					require.FileExists(t, filepath.Join(dir, "metadata.db.damaged"))
				}
				var keys []string
				require.NoError(t, sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
					keys = append(keys, info.Name)
					return nil
				}))
				require.Len(t, keys, 3)
				require.Subset(t, keys, []string{top, "container"})
				mounts, err := sn.Mounts(ctx, "container")
				require.NoError(t, err)
				requireRead(t, mounts)
				require.FileExists(t, filepath.Join(dir, "snapshots/3/fs/precious"))
				require.NoError(t, sn.Close())
			}
			ctx, sn, book := openLogged(t, dir)
			require.NotContains(t, book.String(), "damaged")
			require.NoError(t, sn.Remove(ctx, "container"))
		})
	}
}

// TestMetadataCopied has changes made side by side by a process that is killed: all of them are in the copy.
func TestMetadataCopied(t *testing.T) {
	dir := t.TempDir()
	sn := open(t, dir)
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			_, err := sn.Prepare(t.Context(), fmt.Sprint("container", i), "")
			assert.NoError(t, err)
		})
	}
	all.Wait()
	crashed := t.TempDir()
	require.NoError(t, os.CopyFS(crashed, os.DirFS(dir)))
	require.NoError(t, os.Remove(filepath.Join(crashed, "metadata.db")))
	again := open(t, crashed)
	for i := range 20 {
		_, err := again.Stat(t.Context(), fmt.Sprint("container", i))
		require.NoError(t, err)
	}
}

// TestMetadataLost has no snapshot be made or removed when nobody knows which there are; nothing is taken for
// garbage.
func TestMetadataLost(t *testing.T) {
	for name, damage := range metadataDamage {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			top := precious(t, dir)
			db := filepath.Join(dir, "metadata.db")
			pristine, err := os.ReadFile(db)
			require.NoError(t, err)
			require.NoError(t, damage(db))
			require.NoError(t, damage(db+".copy"))

			_, sn, book := openLogged(t, dir)
			require.Contains(t, book.String(), "metadata.db is damaged, and its copy cannot take its place")
			require.Contains(t, book.String(), "put a copy")
			_, err = sn.Prepare(t.Context(), "another", top)
			require.ErrorIs(t, err, errdefs.ErrDataLoss)
			require.ErrorIs(t, sn.Remove(t.Context(), "container"), errdefs.ErrDataLoss)
			require.ErrorIs(t, sn.Cleanup(t.Context()), errdefs.ErrDataLoss)
			_, err = sn.Status(t.Context())
			require.ErrorIs(t, err, errdefs.ErrDataLoss, "clipctl doctor goes by it")
			require.NoError(t, sn.Close())
			require.FileExists(t, filepath.Join(dir, "snapshots/3/fs/precious"))

			require.NoError(t, os.WriteFile(db, pristine, 0o600))
			sn = open(t, dir)
			mounts, err := sn.Mounts(t.Context(), "container")
			require.NoError(t, err)
			requireRead(t, mounts)
		})
	}
}

// addSnapshots makes n snapshots at once.
func addSnapshots(t testing.TB, m *metadata, n int) {
	t.Helper()
	require.NoError(t, m.WithTransaction(t.Context(), true, func(ctx context.Context) error {
		for i := range n {
			_, err := storage.CreateSnapshot(ctx, snapshots.KindActive, fmt.Sprint(i), "", snapshots.WithLabels(map[string]string{"label": strings.Repeat("x", 200)}))
			if err != nil {
				return err
			}
		}
		return nil
	}))
}

// changeMetadata makes a change that leaves everything as it is.
func changeMetadata(ctx context.Context) error {
	if _, err := storage.CreateSnapshot(ctx, snapshots.KindActive, "another", ""); err != nil {
		return err
	}
	_, _, err := storage.Remove(ctx, "another")
	return err
}

// requireNoCopy is called right behind a change. On a machine that stands still for
// copyAfter there, the copy was quicker, and another change is made.
func requireNoCopy(t *testing.T, m *metadata) {
	t.Helper()
	for began := time.Now(); time.Since(began) < time.Minute; {
		if _, err := os.Stat(copyOf(m.path)); err != nil {
			require.ErrorIs(t, err, os.ErrNotExist)
			return
		}
		require.NoError(t, m.WithTransaction(t.Context(), true, changeMetadata))
	}
	require.Fail(t, "changes wait for the copy")
}

// TestMetadataLarge has changes not wait for the copy of a large store: there is none, until there is one.
func TestMetadataLarge(t *testing.T) {
	m, err := openMetadata(t.Context(), t.TempDir())
	require.NoError(t, err)
	addSnapshots(t, m, 1)
	require.FileExists(t, copyOf(m.path))
	require.NoError(t, m.WithTransaction(t.Context(), true, func(ctx context.Context) error {
		_, _, err := storage.Remove(ctx, "0")
		return err
	}))
	addSnapshots(t, m, 2000)
	requireNoCopy(t, m)
	require.Eventually(t, func() bool { _, err := checkMetadata(copyOf(m.path)); return err == nil }, time.Minute, 50*time.Millisecond)
	require.NoError(t, m.WithTransaction(t.Context(), true, changeMetadata))
	requireNoCopy(t, m)
	require.NoError(t, m.Close())
	store, err := checkMetadata(m.path)
	require.NoError(t, err)
	copied, err := checkMetadata(copyOf(m.path))
	require.NoError(t, err)
	require.Equal(t, store, copied)
}

// TestMetadataNotCopied has no copy made of what has not changed since the last one, but of what has.
func TestMetadataNotCopied(t *testing.T) {
	dir := t.TempDir()
	precious(t, dir)
	copied := filepath.Join(dir, "metadata.db.copy")
	before, err := os.Stat(copied)
	require.NoError(t, err)
	old, err := os.ReadFile(copied)
	require.NoError(t, err)
	require.NoError(t, open(t, dir).Close())
	after, err := os.Stat(copied)
	require.NoError(t, err)
	require.True(t, os.SameFile(before, after))

	sn := open(t, dir)
	require.NoError(t, sn.Remove(t.Context(), "container"))
	require.NoError(t, sn.Close())
	require.NoError(t, os.WriteFile(copied, old, 0o600)) // as after a power cut
	require.NoError(t, open(t, dir).Close())
	require.NoError(t, os.Remove(filepath.Join(dir, "metadata.db")))
	_, err = open(t, dir).Stat(t.Context(), "container")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

// BenchmarkMetadata is a change of a store with so many snapshots, and how much of that is its copy.
func BenchmarkMetadata(b *testing.B) {
	for _, n := range []int{10, 500, 1000, 3000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			m, err := openMetadata(b.Context(), b.TempDir())
			require.NoError(b, err)
			defer m.Close()
			addSnapshots(b, m, n)
			var copying time.Duration
			for b.Loop() {
				require.NoError(b, m.MetaStore.WithTransaction(b.Context(), true, changeMetadata))
				began := time.Now()
				m.changed(b.Context())
				copying += time.Since(began)
			}
			b.ReportMetric(float64(copying.Nanoseconds())/float64(b.N), "copy-ns/op")
		})
	}
}
