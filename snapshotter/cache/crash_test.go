package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// crashFiles is how many files the layer has that crashes are tested with, and
// crashLimit what the store may take, less than the layer.
const (
	crashFiles = 60
	crashLimit = 4 << 20
)

// churn reads at random and records all the time until the process or the disk dies.
func churn(ctx context.Context, l *Layer, stream []byte) error {
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	p := make([]byte, 300<<10)
	for ctx.Err() == nil {
		off := r.Int64N(l.Size())
		n, err := l.ReadAt(ctx, p, off)
		if err != nil {
			return err
		}
		if !bytes.Equal(p[:n], stream[off:off+int64(n)]) {
			return errors.New("wrong bytes")
		}
		if r.IntN(4) == 0 {
			if err := l.record(); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

// away is a registry that cannot be reached.
type away struct{}

func (away) Open(context.Context, []string, digest.Digest, int64, int64) (io.ReadCloser, error) {
	return nil, errors.New("away")
}

// requireHonest opens the store after a crash: whatever it says is there is
// right, and the rest can be fetched. It returns how much was there.
func requireHonest(t *testing.T, dir string, x *layer.Index, src Fetcher, stream []byte) int64 {
	t.Helper()
	s, l := open(t, dir, away{}, x)
	there := l.Fetched()
	p := make([]byte, x.SpanSize)
	for span := range x.Spans {
		start, end := x.SpanRange(span)
		l.mu.Lock()
		have := l.have.get(span)
		l.mu.Unlock()
		if have {
			n, err := l.ReadAt(t.Context(), p[:end-start], int64(start))
			require.NoError(t, err)
			require.True(t, bytes.Equal(stream[start:end], p[:n]), "span %d is not what it should be", span)
		}
	}
	require.NoError(t, s.Close())
	s, l = open(t, dir, src, x)
	requireStream(t, l, stream)
	require.NoError(t, s.Close())
	return there
}

// TestMain is also the process that TestKilled kills.
func TestMain(m *testing.M) {
	if dir := os.Getenv("CACHE_TEST_CHURN"); dir != "" {
		fmt.Println(churnIn(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// churnIn churns in the store below dir until the process is killed.
func churnIn(dir string) error {
	stream, err := os.ReadFile(filepath.Join(dir, "stream"))
	if err != nil {
		return err
	}
	blob, err := os.ReadFile(filepath.Join(dir, "blob"))
	if err != nil {
		return err
	}
	s, err := Open(context.Background(), Options{
		Dir: filepath.Join(dir, "layers"), Fetch: &blobs{blob: blob},
		MaxSize: Limit{Size: crashLimit}, InUse: func(digest.Digest) bool { return true },
	})
	if err != nil {
		return err
	}
	l, err := s.Layer(digest.FromBytes(stream))
	if err != nil {
		return err
	}
	return churn(context.Background(), l, stream)
}

// TestKilled kills a process that reads and gives up spans, many times.
func TestKilled(t *testing.T) {
	stream := testTar(t, crashFiles)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	dir := t.TempDir()
	layers := filepath.Join(dir, "layers")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "stream"), stream, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "blob"), src.blob, 0o600))
	var there int64
	for range 12 {
		s, _ := open(t, layers, src, x)
		require.NoError(t, s.Close())
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), "CACHE_TEST_CHURN="+dir)
		var out bytes.Buffer
		child.Stdout = &out
		require.NoError(t, child.Start())
		require.Eventually(t, func() bool {
			_, err := os.Stat(filepath.Join(layers, x.DiffID.Encoded(), haveFile))
			return err == nil
		}, time.Minute, time.Millisecond)
		time.Sleep(rand.N(300 * time.Millisecond))
		require.NoError(t, child.Process.Kill())
		require.Error(t, child.Wait())
		require.Empty(t, out.String(), "it did not wait to be killed")
		there += requireHonest(t, layers, x, src, stream)
		if rand.IntN(3) == 0 { // requireHonest completed the layer
			require.NoError(t, os.RemoveAll(layers))
		}
	}
	require.Positive(t, there)
}

// disk is an ext4 file system in a file, whose power can be cut.
type disk struct {
	image, dir string
}

func newDisk(t *testing.T) disk {
	t.Helper()
	d := disk{filepath.Join(t.TempDir(), "image"), t.TempDir()}
	require.NoError(t, os.WriteFile(d.image, nil, 0o600))
	require.NoError(t, os.Truncate(d.image, 64<<20))
	command(t, "mkfs.ext4", "-q", "-F", d.image)
	d.mount(t)
	t.Cleanup(func() { _ = unix.Unmount(d.dir, unix.MNT_DETACH) })
	return d
}

func (d disk) mount(t *testing.T) {
	t.Helper()
	// The kernel lets go of a loop device some time after its file system: with a
	// second one over the same file, each has its own idea of what is in it.
	require.Eventually(t, func() bool {
		held, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		return err == nil && !slices.ContainsFunc(held, func(name string) bool {
			file, _ := os.ReadFile(name) // it may be gone by now
			return strings.TrimSpace(string(file)) == d.image
		})
	}, time.Minute, 10*time.Millisecond)
	command(t, "mount", "-o", "loop,commit=1", d.image, d.dir)
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "this test needs root and %s: %s", name, out)
}

// cut drops everything that is not on the disk: EXT4_IOC_SHUTDOWN without
// flushing even the journal, see fs/ext4/ext4.h.
func (d disk) cut(t *testing.T) {
	t.Helper()
	const shutdown, noLogFlush = 0x8004587d, uint32(2)
	f, err := os.Open(d.dir)
	require.NoError(t, err)
	defer f.Close()
	flags := noLogFlush
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), shutdown, uintptr(unsafe.Pointer(&flags)))
	require.Zero(t, errno)
}

// TestPowerCut cuts the power of a disk under a store that reads and gives up
// spans, many times.
func TestPowerCut(t *testing.T) {
	stream := testTar(t, crashFiles)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	d := newDisk(t)
	layers := filepath.Join(d.dir, "layers")
	var there int64
	for range 12 {
		quiet, _ := logged(t)
		s, err := Open(quiet, Options{Dir: layers, Fetch: src, MaxSize: Limit{Size: crashLimit}, InUse: func(digest.Digest) bool { return true }})
		require.NoError(t, err)
		require.NoError(t, s.Add("registry.example/repo:tag", x))
		l, err := s.Layer(x.DiffID)
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond+rand.N(600*time.Millisecond))
		ended := make(chan error, 1)
		go func() { ended <- churn(ctx, l, stream) }()
		<-ctx.Done()
		d.cut(t)
		cancel()
		<-ended
		_ = s.Close() // it cannot write any more
		require.NoError(t, unix.Unmount(d.dir, 0))
		d.mount(t)
		there += requireHonest(t, layers, x, src, stream)
		if rand.IntN(2) == 0 {
			require.NoError(t, os.RemoveAll(layers))
		}
	}
	require.Positive(t, there, "what was recorded survives")
}

// TestPowerCutAroundComplete cuts the power of a disk while a layer becomes complete:
// a file that is said to be complete is so, and stays so.
func TestPowerCutAroundComplete(t *testing.T) {
	stream := testTar(t, crashFiles)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	d := newDisk(t)
	layers := filepath.Join(d.dir, "layers")
	for round := range 6 {
		quiet, _ := logged(t)
		s, err := Open(quiet, Options{Dir: layers, Fetch: src})
		require.NoError(t, err)
		require.NoError(t, s.Add("registry.example/repo:tag", x))
		l, err := s.Layer(x.DiffID)
		require.NoError(t, err)
		requireStream(t, l, stream)
		if round == 0 {
			_, release := completed(t, s, l)
			release()
		} else {
			time.Sleep(rand.N(100 * time.Millisecond)) // it is recorded, read back and said to be complete
		}
		d.cut(t)
		_ = s.Close()
		require.NoError(t, unix.Unmount(d.dir, 0))
		d.mount(t)

		s, err = Open(quiet, Options{Dir: layers, Fetch: away{}})
		require.NoError(t, err)
		path, release, err := s.Device(x.DiffID)
		if round == 0 {
			require.NoError(t, err)
		}
		if err == nil {
			content, err := os.ReadFile(path)
			require.NoError(t, err)
			require.True(t, bytes.Equal(stream, content[:len(stream)]), "complete, and not what it should be")
			release()
		}
		require.NoError(t, s.Close())
		require.NoError(t, os.RemoveAll(layers))
	}
}

// TestDamagedFiles opens stores whose files are not as they were left.
func TestDamagedFiles(t *testing.T) {
	stream := testTar(t, crashFiles)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	rnd := rand.New(rand.NewPCG(1, 1))
	file := func(dir, name string) string { return filepath.Join(dir, x.DiffID.Encoded(), name) }
	for name, damage := range map[string]func(dir string) error{
		"no data":      func(dir string) error { return os.Remove(file(dir, dataFile)) },
		"empty data":   func(dir string) error { return os.Truncate(file(dir, dataFile), 0) },
		"shorter data": func(dir string) error { return os.Truncate(file(dir, dataFile), int64(len(stream))/2) },
		"longer data":  func(dir string) error { return os.Truncate(file(dir, dataFile), int64(len(stream))*2) },
		"no have":      func(dir string) error { return os.Remove(file(dir, haveFile)) },
		"empty have":   func(dir string) error { return os.Truncate(file(dir, haveFile), 0) },
		"shorter have": func(dir string) error { return os.Truncate(file(dir, haveFile), 33) },
		"garbage have": func(dir string) error { return os.WriteFile(file(dir, haveFile), make([]byte, 48), 0o600) },
		"complete, not": func(dir string) error {
			return errors.Join(os.WriteFile(file(dir, completeFile), nil, 0o600), os.Remove(file(dir, haveFile)))
		},
		"no complete":   func(dir string) error { return os.Remove(file(dir, completeFile)) },
		"empty sources": func(dir string) error { return os.Truncate(file(dir, sourcesFile), 0) },
		"left over":     func(dir string) error { return os.WriteFile(file(dir, ".have.123"), []byte("x"), 0o600) },
		"altered have": func(dir string) error {
			raw, err := os.ReadFile(file(dir, haveFile))
			raw[rnd.IntN(len(raw))] ^= 1
			return errors.Join(err, os.WriteFile(file(dir, haveFile), raw, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, l := open(t, dir, src, x)
			requireStream(t, l, stream)
			_, release := completed(t, s, l)
			release()
			require.NoError(t, s.Close())
			require.NoError(t, damage(dir))
			requireHonest(t, dir, x, src, stream)
			// And once more, after a crash right after opening.
			s, l = open(t, dir, src, x)
			requireStream(t, l, stream)
			_, release = completed(t, s, l)
			release()
			require.NoError(t, s.Close())
			require.NoError(t, damage(dir))
			_, err := Open(t.Context(), Options{Dir: dir, Fetch: src})
			require.NoError(t, err)
			requireHonest(t, dir, x, src, stream)
		})
	}
}

// TestAlteredData changes bytes below a store that is closed: they are never returned, and only the spans that they are
// in are fetched again.
func TestAlteredData(t *testing.T) {
	stream := testTar(t, crashFiles)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	for _, whole := range []bool{true, false} {
		t.Run(fmt.Sprintf("complete %v", whole), func(t *testing.T) {
			dir := t.TempDir()
			s, l := open(t, dir, src, x)
			if whole {
				requireStream(t, l, stream)
				_, release := completed(t, s, l)
				release()
			} else {
				_, err := l.ReadAt(t.Context(), make([]byte, len(stream)/2), 0)
				require.NoError(t, err)
			}
			require.NoError(t, s.Close())
			f, err := os.OpenFile(filepath.Join(dir, x.DiffID.Encoded(), dataFile), os.O_RDWR, 0)
			require.NoError(t, err)
			_, err = f.WriteAt([]byte{^stream[70000], ^stream[70001]}, 70000)
			require.NoError(t, err)
			require.NoError(t, f.Close())

			ctx, log := logged(t)
			s, err = Open(ctx, Options{Dir: dir, Fetch: src})
			require.NoError(t, err)
			defer s.Close()
			l, err = s.Layer(x.DiffID)
			require.NoError(t, err)
			require.Positive(t, l.Fetched())
			p := make([]byte, 10)
			_, err = l.ReadAt(t.Context(), p, 69995)
			require.NoError(t, err)
			require.Equal(t, stream[69995:70005], p)
			requireStream(t, l, stream)
			log.mu.Lock()
			require.Len(t, log.lines, 1)
			require.Contains(t, log.lines[0], "damaged on disk")
			log.mu.Unlock()
			_, release := completed(t, s, l)
			release()
		})
	}
}

// TestShortDataIsForgotten crashes after the file got its size back.
func TestShortDataIsForgotten(t *testing.T) {
	stream := testTar(t, crashFiles)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	dir := t.TempDir()
	s, l := open(t, dir, src, x)
	requireStream(t, l, stream)
	require.NoError(t, s.Close())
	require.NoError(t, os.Truncate(filepath.Join(dir, x.DiffID.Encoded(), dataFile), 1000))
	_, l = open(t, dir, src, x) // and never closed
	require.Zero(t, l.Fetched())
	require.Zero(t, requireHonest(t, dir, x, src, stream))
}

func FuzzBitmap(f *testing.F) {
	b := newBitmap(100)
	b.set(0)
	b.set(99)
	f.Add(b.encode(), 100)
	f.Add(b.encode(), 90)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, raw []byte, spans int) {
		if spans < 0 || spans > 1<<20 {
			return
		}
		b, ok := decodeBitmap(raw, spans)
		if !ok {
			return
		}
		if b.count() > spans {
			t.Fatalf("%d of %d spans", b.count(), spans)
		}
		if !bytes.Equal(b.encode(), raw) {
			t.Fatal("another encoding of the same")
		}
	})
}

func FuzzSources(f *testing.F) {
	f.Add([]byte(`["registry.example/repo:tag"]`))
	f.Add([]byte(`["a","registry.example/repo@sha256:00",""]`))
	f.Add([]byte(`[`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		sources, err := decodeSources(raw)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrDataLoss)
			require.Empty(t, sources)
		}
		if len(sources) > maxSources {
			t.Fatal("too many")
		}
		for _, s := range sources {
			if !validSource(s) {
				t.Fatalf("%q", s)
			}
		}
	})
}

// TestMendedWithOtherSpans has an index written anew that cuts the layer up
// differently, as a newer archive may: nobody reads by both, and after a restart
// the layer is fetched by the new one.
func TestMendedWithOtherSpans(t *testing.T) {
	dir, stream := t.TempDir(), testTar(t, crashFiles)
	blob := gzipped(t, stream)
	src := &blobs{blob: blob}
	x := build(t, blob)
	desc := ocispec.Descriptor{Digest: x.Digest, Size: int64(x.Size)}
	y, err := layer.Build(t.Context(), bytes.NewReader(blob), desc, layer.Options{SpanSize: x.SpanSize / 4})
	require.NoError(t, err)

	s, l := open(t, dir, src, x)
	_, err = l.ReadAt(t.Context(), make([]byte, 1), 0)
	require.NoError(t, err)
	require.NoError(t, os.Truncate(filepath.Join(dir, x.DiffID.Encoded(), spansFile), 100))
	require.NoError(t, s.Mend(y, archive.Place{}, "example.com/a:1"))
	l.mu.Lock()
	l.index = nil // as after a while without fetches
	l.mu.Unlock()
	_, err = l.ReadAt(t.Context(), make([]byte, 1), l.Size()-1)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.NoError(t, s.Close())

	_, l = open(t, dir, src, y)
	requireStream(t, l, stream)
}

// TestMendKeepsGoodParts has an archive with other spans mend a layer of which only the entries are damaged.
func TestMendKeepsGoodParts(t *testing.T) {
	dir, stream := t.TempDir(), testTar(t, crashFiles)
	src := &blobs{blob: gzipped(t, stream)}
	x := build(t, src.blob)
	desc := ocispec.Descriptor{Digest: x.Digest, Size: int64(x.Size)}
	y, err := layer.Build(t.Context(), bytes.NewReader(src.blob), desc, layer.Options{SpanSize: x.SpanSize / 4})
	require.NoError(t, err)
	s, l := open(t, dir, src, x)
	requireStream(t, l, stream)
	require.NoError(t, s.Close())
	spans, entries := filepath.Join(dir, x.DiffID.Encoded(), spansFile), filepath.Join(dir, x.DiffID.Encoded(), entriesFile)
	good, err := os.ReadFile(spans)
	require.NoError(t, err)
	for name, damage := range map[string]func(string) error{
		"cut": func(path string) error { return os.Truncate(path, 20) },
		"altered": func(path string) error {
			raw, err := os.ReadFile(path)
			raw[len(raw)/2] ^= 1
			return errors.Join(err, os.WriteFile(path, raw, 0o600))
		},
		"removed": os.Remove,
	} {
		require.NoError(t, damage(entries), name)
		s, err := Open(t.Context(), Options{Dir: dir, Fetch: away{}})
		require.NoError(t, err)
		_, err = s.Entries(x.DiffID)
		require.ErrorIs(t, err, errdefs.ErrDataLoss, name)
		require.NoError(t, s.Mend(y, archive.Place{}, "example.com/a:1"))
		again, err := s.Entries(x.DiffID)
		require.NoError(t, err, name)
		require.Equal(t, y.Entries, again.Entries)
		l, err := s.Layer(x.DiffID)
		require.NoError(t, err)
		requireStream(t, l, stream) // and nothing is fetched
		require.NoError(t, s.Close())
		now, err := os.ReadFile(spans)
		require.NoError(t, err)
		require.Equal(t, good, now, name)
	}
}

// TestAlteredSpans has no altered bit of an index go unnoticed. An index that an earlier version wrote has no checksum.
func TestAlteredSpans(t *testing.T) {
	dir := t.TempDir()
	x := build(t, gzipped(t, testTar(t, 5)))
	s, _ := open(t, dir, away{}, x)
	require.NoError(t, s.Close())
	at, err := os.OpenRoot(filepath.Join(dir, x.DiffID.Encoded()))
	require.NoError(t, err)
	defer at.Close()
	good, err := at.ReadFile(spansFile)
	require.NoError(t, err)
	step := max(1, len(good)/2000)
	for i := 0; i < len(good); i += 1 + rand.IntN(step) {
		raw := slices.Clone(good)
		raw[i] ^= 1 << (i % 8)
		require.NoError(t, at.WriteFile(spansFile, raw, 0o600))
		_, err := readSpans(at, x.DiffID)
		require.ErrorIs(t, err, errdefs.ErrDataLoss, "byte %d of %d", i, len(good))
	}
	require.NoError(t, at.WriteFile(spansFile, x.AppendSpans(nil), 0o600))
	old, err := readSpans(at, x.DiffID)
	require.NoError(t, err)
	require.Equal(t, x.Spans, old.Spans)
}

// TestFilesWithoutSpans has the entries of a layer serve whose spans are damaged.
func TestFilesWithoutSpans(t *testing.T) {
	dir := t.TempDir()
	x := build(t, gzipped(t, testTar(t, 5)))
	s, _ := open(t, dir, away{}, x)
	require.NoError(t, s.Close())
	file := func(name string) string { return filepath.Join(dir, x.DiffID.Encoded(), name) }
	for _, damage := range []func(string) error{
		func(path string) error { return os.Truncate(path, 10) }, os.Remove,
	} {
		require.NoError(t, damage(file(spansFile)))
		s, err := Open(t.Context(), Options{Dir: dir, Fetch: away{}})
		require.NoError(t, err)
		_, err = s.Entries(x.DiffID)
		require.ErrorIs(t, err, errdefs.ErrDataLoss)
		found, err := s.Files(x.DiffID)
		require.NoError(t, err)
		require.Equal(t, x.Entries, found.Entries)
		_, err = s.Files(digest.FromString("another"))
		require.ErrorIs(t, err, errdefs.ErrNotFound)
		require.NoError(t, s.Close())
	}
	require.NoError(t, os.Truncate(file(entriesFile), 10))
	s, err := Open(t.Context(), Options{Dir: dir, Fetch: away{}})
	require.NoError(t, err)
	defer s.Close()
	_, err = s.Files(x.DiffID)
	require.ErrorIs(t, err, errdefs.ErrDataLoss)
}
