package cache

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// dataBlocks is what the kernel says the layers' data takes.
func dataBlocks(t testing.TB, dir string) int64 {
	t.Helper()
	n, err := heldOnDisk(dir)
	require.NoError(t, err)
	return n
}

// corpus is several layers and the registry that has them.
type corpus struct {
	blobs   byDigest
	indexes []*layer.Index
	streams [][]byte
}

func newCorpus(t testing.TB, layers, files int) *corpus {
	t.Helper()
	c := &corpus{blobs: byDigest{}}
	for i := range layers {
		stream := testTar(t, files+i)
		blob := gzipped(t, stream)
		x := build(t, blob)
		c.blobs[x.Digest] = &blobs{blob: blob}
		c.indexes, c.streams = append(c.indexes, x), append(c.streams, stream)
	}
	return c
}

func (c *corpus) open(t testing.TB, opts Options) (*Store, []*Layer) {
	t.Helper()
	opts.Fetch = c.blobs
	s, err := Open(t.Context(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	var layers []*Layer
	for _, x := range c.indexes {
		require.NoError(t, s.Add("registry.example/repo:tag", x))
		l, err := s.Layer(x.DiffID)
		require.NoError(t, err)
		layers = append(layers, l)
	}
	return s, layers
}

func (c *corpus) size() (n int64) {
	for _, s := range c.streams {
		n += int64(len(s))
	}
	return n
}

// TestCap reads more than fits, at random and from many goroutines: all bytes
// are right, and the disk never holds more than it may.
func TestCap(t *testing.T) {
	c := newCorpus(t, 4, 60)
	dir := t.TempDir()
	limit := c.size() / 2
	mounted := c.indexes[0].DiffID
	s, layers := c.open(t, Options{Dir: dir, MaxSize: Limit{Size: limit}, InUse: func(d digest.Digest) bool { return d == mounted }})
	var wg sync.WaitGroup
	for seed := range uint64(8) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 0))
			p := make([]byte, 200<<10)
			for range 60 {
				i := r.IntN(len(layers))
				off := r.Int64N(layers[i].Size())
				n, err := layers[i].ReadAt(t.Context(), p, off)
				if err != nil || !bytes.Equal(p[:n], c.streams[i][off:off+int64(n)]) {
					t.Errorf("layer %d at %d: %v", i, off, err)
					return
				}
			}
		})
	}
	wg.Wait()
	require.LessOrEqual(t, dataBlocks(t, dir), limit)
	for _, l := range layers {
		arrived(t, l) // runs go on behind their readers, and would between two looks
	}
	var punched int
	for _, l := range layers {
		require.NoError(t, l.record())
		l.mu.Lock()
		punched += l.punches
		l.mu.Unlock()
	}
	require.Positive(t, punched)
	require.InDelta(t, dataBlocks(t, dir), s.used.Load(), 1<<20, "what is counted is what is there")
	for i, l := range layers {
		requireStream(t, l, c.streams[i])
	}
	require.NoError(t, s.Close())

	s, layers = c.open(t, Options{Dir: dir, MaxSize: Limit{Size: limit}})
	require.Equal(t, dataBlocks(t, dir), s.used.Load(), "the count survives")
	for i, l := range layers {
		requireStream(t, l, c.streams[i])
	}
	require.LessOrEqual(t, dataBlocks(t, dir), limit)
	for _, l := range layers {
		arrived(t, l)
	}
	require.NoError(t, s.Keep(func(digest.Digest) bool { return false }))
	require.Zero(t, s.used.Load())
}

// TestLimit is a share of what is free and of what the layers take already, so that
// it is the same after a restart; or a size.
func TestLimit(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"), "this test needs root")
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	stream := testTar(t, 60)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	limitOf := func(text string) int64 {
		var limit Limit
		require.NoError(t, limit.UnmarshalText([]byte(text)))
		again, err := limit.MarshalText()
		require.NoError(t, err)
		var same Limit
		require.NoError(t, same.UnmarshalText(again))
		require.Equal(t, limit, same)
		s, l := openWith(t, Options{Dir: filepath.Join(dir, "layers"), Fetch: src, MaxSize: limit}, x)
		requireStream(t, l, stream)
		_, most, _ := s.Space()
		require.NoError(t, s.Close())
		return most
	}
	const all = 64 << 20
	require.InDelta(t, all/4, limitOf("25%"), 1<<20)
	require.InDelta(t, all/4, limitOf("25%"), 1<<20, "of which a part is taken now")
	require.InDelta(t, all, limitOf("100%"), 1<<20)
	require.EqualValues(t, 20<<20, limitOf("20MiB"))
	for _, wrong := range []string{"0%", "101%", "-1%", "x%", "", "0", "-5", "many"} {
		require.Error(t, new(Limit).UnmarshalText([]byte(wrong)), wrong)
	}
}

// TestWhatGoesFirst fills two layers and then needs room for a third.
func TestWhatGoesFirst(t *testing.T) {
	c := newCorpus(t, 3, 30)
	limit := int64(len(c.streams[0])+len(c.streams[1])) + 1<<20
	inUse := c.indexes[0].DiffID
	_, layers := c.open(t, Options{Dir: t.TempDir(), MaxSize: Limit{Size: limit}, InUse: func(d digest.Digest) bool { return d == inUse }})
	requireStream(t, layers[0], c.streams[0])
	requireStream(t, layers[1], c.streams[1])
	require.Equal(t, layers[0].Size(), layers[0].Fetched())
	requireStream(t, layers[2], c.streams[2])
	require.Equal(t, layers[0].Size(), layers[0].Fetched(), "it was read first, but its root is mounted")
	require.Zero(t, layers[1].Fetched())
	require.Equal(t, layers[2].Size(), layers[2].Fetched())
}

// TestUseOutlivesARestart has a layer that was read first, and used last: by the
// kernel, which asks nobody.
func TestUseOutlivesARestart(t *testing.T) {
	c := newCorpus(t, 3, 30)
	limit := Limit{Size: int64(len(c.streams[0])+len(c.streams[1])) + 1<<20}
	for name, use := range map[string]func(*Store, *Layer){
		"device": func(s *Store, l *Layer) { _, release := completed(t, s, l); release() },
		"mount":  func(_ *Store, l *Layer) { l.Use() },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, layers := c.open(t, Options{Dir: dir, MaxSize: limit})
			requireStream(t, layers[0], c.streams[0])
			requireStream(t, layers[1], c.streams[1])
			use(s, layers[0])
			require.NoError(t, s.Close())
			_, layers = c.open(t, Options{Dir: dir, MaxSize: limit})
			requireStream(t, layers[2], c.streams[2])
			require.Zero(t, layers[1].Fetched())
			require.Equal(t, layers[0].Size(), layers[0].Fetched())
		})
	}
}

// TestColdSpansGoFirst keeps what is read again and again.
func TestColdSpansGoFirst(t *testing.T) {
	c := newCorpus(t, 1, 100)
	l0 := int64(len(c.streams[0]))
	_, layers := c.open(t, Options{Dir: t.TempDir(), MaxSize: Limit{Size: l0 / 2}, InUse: func(digest.Digest) bool { return true }})
	l, hot := layers[0], make([]byte, 64<<10)
	p := make([]byte, 64<<10)
	src := c.blobs[c.indexes[0].Digest].(*blobs)
	read := func(p []byte, off int64) {
		t.Helper()
		_, err := l.ReadAt(t.Context(), p, off)
		require.NoError(t, err)
	}
	read(hot, 0)
	missed := 0
	for off := int64(1 << 20); off < l0; off += int64(len(p)) {
		read(p, off)
		before := src.requests.Load()
		read(hot, 0)
		if src.requests.Load() > before {
			missed++
		}
	}
	require.LessOrEqual(t, missed, 2)
}

// TestHolesWaitForReads punches nothing while a read of the file is under way.
func TestHolesWaitForReads(t *testing.T) {
	c := newCorpus(t, 1, 30)
	dir := t.TempDir()
	s, layers := c.open(t, Options{Dir: dir})
	l := layers[0]
	requireStream(t, l, c.streams[0])
	require.NoError(t, l.record())
	before := dataBlocks(t, dir)
	l.punching.RLock() // as readHere does
	ended := make(chan int64, 1)
	go func() { ended <- s.evict(1) }()
	require.Eventually(t, func() bool { return l.Fetched() == 0 }, time.Minute, time.Millisecond)
	time.Sleep(100 * time.Millisecond)
	require.Equal(t, before, dataBlocks(t, dir))
	l.punching.RUnlock()
	require.Positive(t, <-ended)
	require.Less(t, dataBlocks(t, dir), before)
}

func TestFillDisplacesNothing(t *testing.T) {
	c := newCorpus(t, 2, 60)
	limit := int64(len(c.streams[0])) + 1<<20
	dir := t.TempDir()
	_, layers := c.open(t, Options{Dir: dir, MaxSize: Limit{Size: limit}})
	requireStream(t, layers[0], c.streams[0])
	var err error
	for done := (Filled{Bytes: 1}); done.Bytes > 0 && err == nil; {
		done, err = layers[1].Fill(t.Context(), Fill{Want: layers[1].All(), Bytes: 100 << 10, Pace: unpaced})
	}
	require.ErrorIs(t, err, ErrFull)
	require.Equal(t, layers[0].Size(), layers[0].Fetched())
	require.LessOrEqual(t, dataBlocks(t, dir), limit)
	requireStream(t, layers[1], c.streams[1])
	require.Equal(t, layers[1].Size(), layers[1].Fetched(), "a reader displaces")
}

// warnings are the lines of the log, of level warning and up.
type warnings struct {
	mu    sync.Mutex // guards lines
	lines []string
}

func (w *warnings) Levels() []logrus.Level { return logrus.AllLevels[:4] }
func (w *warnings) Fire(e *logrus.Entry) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lines = append(w.lines, e.Message)
	return nil
}

// logged returns a context whose log is also in the result.
func logged(t testing.TB) (context.Context, *warnings) {
	t.Helper()
	w := &warnings{}
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.AddHook(w)
	return log.WithLogger(t.Context(), logrus.NewEntry(logger)), w
}

// TestFullDisk runs out of disk in the middle of reading, with nothing of its
// own to give up, and again has room.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"), "this test needs root")
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	stream := testTar(t, 200) // about 20 MB
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	ctx, log := logged(t)
	s, err := Open(ctx, Options{Dir: filepath.Join(dir, "layers"), Fetch: src, MaxSize: Limit{Size: 1 << 30}})
	require.NoError(t, err)
	defer s.Close()
	require.NoError(t, s.Add("registry.example/repo:tag", x))
	l, err := s.Layer(x.DiffID)
	require.NoError(t, err)
	ballast := filepath.Join(dir, "ballast")
	require.ErrorIs(t, os.WriteFile(ballast, make([]byte, 16<<20), 0o600), unix.ENOSPC)

	var wg sync.WaitGroup
	for seed := range uint64(8) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 0))
			p := make([]byte, 500<<10)
			for range 30 {
				off := r.Int64N(l.Size())
				n, err := l.ReadAt(t.Context(), p, off)
				if err != nil || !bytes.Equal(p[:n], stream[off:off+int64(n)]) {
					t.Errorf("at %d: %v", off, err)
					return
				}
			}
		})
	}
	wg.Wait()
	arrived(t, l) // runs go on behind their readers
	require.Equal(t, 1.0, metric(t, s, "clip_cache_in_memory"))
	require.LessOrEqual(t, s.memory.size, memorySize)
	require.Zero(t, l.Fetched())
	asked := src.requests.Load()
	_, err = l.Fill(t.Context(), Fill{Want: l.All(), Bytes: 1 << 20, Pace: unpaced})
	require.ErrorIs(t, err, ErrFull)
	require.Equal(t, asked, src.requests.Load(), "a fill does not ask in order to find that out")
	require.Len(t, log.lines, 1, "said once: %q", log.lines)
	require.Contains(t, log.lines[0], "served from memory")

	require.NoError(t, os.Remove(ballast))
	s.memory.forget(l)
	p := make([]byte, 1<<20)
	_, err = l.ReadAt(t.Context(), p, 0)
	require.NoError(t, err)
	require.Equal(t, stream[:len(p)], p)
	require.Equal(t, 0.0, metric(t, s, "clip_cache_in_memory"))
	require.GreaterOrEqual(t, l.Fetched(), int64(len(p)))

	// It is fuller than the store may know: it gives up what it can.
	time.Sleep(evictFutile)
	requireStream(t, l, stream)
	arrived(t, l)
	require.NoError(t, l.record())
	require.Positive(t, l.punches)
}

// TestSourceOnFullDisk learns of a repository that cannot be written down: it is
// asked all the same.
func TestSourceOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"), "this test needs root")
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	x := build(t, gzipped(t, testTar(t, 5)))
	s, l := open(t, filepath.Join(dir, "layers"), away{}, x)
	require.ErrorIs(t, os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 16<<20), 0o600), unix.ENOSPC)
	require.NoError(t, s.Add("other.example/repo:tag", x))
	require.Equal(t, []string{"other.example/repo:tag", "registry.example/repo:tag"}, l.State().Sources)
}

// TestEvictionOnFullDisk unmarks spans although not even the marks can be written.
func TestEvictionOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"), "this test needs root")
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	stream := testTar(t, 40)
	src := &blobs{blob: gzipped(t, stream)}
	s, l := open(t, filepath.Join(dir, "layers"), src, build(t, src.blob))
	requireStream(t, l, stream)
	require.NoError(t, l.record())
	require.FileExists(t, filepath.Join(dir, "layers", l.DiffID().Encoded(), haveFile))
	require.ErrorIs(t, os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 16<<20), 0o600), unix.ENOSPC)
	require.Positive(t, s.evict(1<<20))
	require.Less(t, l.Fetched(), l.Size())
	requireStream(t, l, stream)
}

// TestDeviceIsNeverPunched mounts a complete layer as a device, has the store
// forget everything as a restart does, and hides the mount.
func TestDeviceIsNeverPunched(t *testing.T) {
	c := newCorpus(t, 2, 30)
	dir := t.TempDir()
	limit := c.size() - 1<<20
	s, layers := c.open(t, Options{Dir: dir, MaxSize: Limit{Size: limit}})
	_, _, err := s.Device(c.indexes[0].DiffID)
	require.ErrorContains(t, err, "not complete")
	requireStream(t, layers[0], c.streams[0])
	path, release := completed(t, s, layers[0])

	r := root.Root{
		Dir:     filepath.Join(t.TempDir(), "root"),
		Indexes: func() ([]*layer.Index, error) { return c.indexes[:1], nil },
		Layers:  []root.Layer{{Device: path}},
	}
	require.NoError(t, r.Mount(t.Context(), root.File), "this test needs root and EROFS")
	release()
	file, err := os.Open(filepath.Join(r.Path(), "dir", "file7"))
	require.NoError(t, err)
	require.NoError(t, r.Unmount(), "it disappears, and its last use goes on")
	require.NoError(t, s.Close())

	s, layers = c.open(t, Options{Dir: dir, MaxSize: Limit{Size: limit}})
	requireStream(t, layers[1], c.streams[1])
	require.Equal(t, layers[0].Size(), layers[0].Fetched())
	_, again, err := s.Device(c.indexes[0].DiffID)
	require.NoError(t, err, "it is still complete")
	again()
	require.NoError(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0))
	got, err := io.ReadAll(file)
	require.NoError(t, err)
	require.True(t, bytes.Contains(c.streams[0], got))
	require.NotEmpty(t, got)
	require.NoError(t, file.Close())

	require.Eventually(t, func() bool { s.futile = time.Time{}; return s.evict(limit) > 0 && layers[0].Fetched() == 0 }, time.Minute, 50*time.Millisecond,
		"when the last use has ended, it can go")
	_, _, err = s.Device(c.indexes[0].DiffID)
	require.Error(t, err)
	requireStream(t, layers[0], c.streams[0])
}

// completed waits for the layer to be complete and returns its file.
func completed(t testing.TB, s *Store, l *Layer) (path string, release func()) {
	t.Helper()
	require.Eventually(t, func() (ok bool) {
		var err error
		path, release, err = s.Device(l.DiffID())
		return err == nil
	}, time.Minute, 10*time.Millisecond)
	return path, release
}

func TestComplete(t *testing.T) {
	for name, padding := range map[string]int{"whole blocks": 0, "ends inside a block": 100} {
		t.Run(name, func(t *testing.T) {
			stream := append(testTar(t, 30), make([]byte, padding)...)
			src := &blobs{blob: gzipped(t, stream)}
			x := build(t, src.blob)
			dir := t.TempDir()
			s, l := open(t, dir, src, x)
			fillAll(t, l, 200<<10)
			path, release := completed(t, s, l)
			release()
			content, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Zero(t, len(content)%deviceBlock)
			require.True(t, bytes.Equal(stream, content[:len(stream)]))
			require.Empty(t, strings.Trim(string(content[len(stream):]), "\x00"))
			size, inodes := l.Usage()
			require.Greater(t, size, l.Size())
			require.EqualValues(t, 7, inodes)
			require.NoError(t, s.Close())

			s, _ = open(t, dir, src, x)
			_, release, err = s.Device(x.DiffID)
			require.NoError(t, err, "it stays complete")
			release()
		})
	}
}

// TestDamagedDisk has the disk return something else than was written.
func TestDamagedDisk(t *testing.T) {
	stream := testTar(t, 30)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	dir := t.TempDir()
	ctx, log := logged(t)
	s, err := Open(ctx, Options{Dir: dir, Fetch: src})
	require.NoError(t, err)
	defer s.Close()
	require.NoError(t, s.Add("registry.example/repo:tag", x))
	l, err := s.Layer(x.DiffID)
	require.NoError(t, err)
	_, err = l.ReadAt(t.Context(), make([]byte, 1), 0)
	require.NoError(t, err)
	f, err := os.OpenFile(filepath.Join(dir, x.DiffID.Encoded(), dataFile), os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("damage"), 100)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	fillAll(t, l, 1<<20)
	require.Eventually(t, func() bool { return l.Fetched() == 0 }, time.Minute, 10*time.Millisecond)
	requireStream(t, l, stream)
	time.Sleep(100 * time.Millisecond)
	_, _, err = s.Device(x.DiffID)
	require.Error(t, err)
	log.mu.Lock()
	defer log.mu.Unlock()
	require.Len(t, log.lines, 1)
}
