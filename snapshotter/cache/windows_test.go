package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// windowsTar is how many files make a stream with two groups of windows.
const windowsTar = 110

// elsewhere is a registry with a layer, and with the archive that has its windows.
type elsewhere struct {
	layer   blobs
	archive blobs
	sound   blobs // the archive, once it is mended
	mended  atomic.Bool
	id      digest.Digest // of the layer
	place   archive.Place
	blamed  atomic.Int64
	source  atomic.Value // the first one that the archive was last asked of
}

// newElsewhere returns the registry, and the layer's index without its windows.
func newElsewhere(t *testing.T, stream []byte) (*elsewhere, *layer.Index) {
	t.Helper()
	e := &elsewhere{place: archive.Place{Blob: digest.FromString("archive"), In: 1000, Off: 127 << 10}}
	e.layer.blob = gzipped(t, stream)
	x := build(t, e.layer.blob)
	require.Greater(t, len(x.Groups), 1)
	_, end := e.place.Range(0, x.WindowsSize())
	e.archive.blob = make([]byte, 2*(e.place.In+e.place.Off+end))
	for i, b := range x.Windows {
		in, _ := e.place.Range(int64(i), 1)
		e.archive.blob[in] = b
	}
	e.sound.blob, e.id = e.archive.blob, x.Digest
	y := *x
	y.Windows = nil
	return e, &y
}

func (e *elsewhere) Open(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	if d == e.id {
		return e.layer.Open(ctx, sources, d, off, n)
	}
	if e.mended.Load() {
		return e.sound.Open(ctx, sources, d, off, n)
	}
	e.source.Store(sources[0])
	rc, err := e.archive.Open(ctx, sources, d, off, n)
	if err != nil {
		return nil, err
	}
	return blamed{rc, &e.blamed}, nil
}

type blamed struct {
	io.ReadCloser
	n *atomic.Int64
}

func (b blamed) Blame() { b.n.Add(1) }

// add adds the layer, whose windows are in the archive.
func (e *elsewhere) add(t *testing.T, s *Store, x *layer.Index, source string) *Layer {
	t.Helper()
	encoded := Encoded{Index: x, Place: e.place}
	require.NoError(t, s.AddEncoded(source, encoded))
	l, err := s.Layer(x.DiffID)
	require.NoError(t, err)
	return l
}

func (e *elsewhere) open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Options{Dir: dir, Fetch: e})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// backwards reads a byte of each span, the last first, and compares: each run begins at a seek point.
func backwards(t *testing.T, l *Layer, stream []byte) {
	t.Helper()
	p := make([]byte, 10)
	for span := l.spans - 1; span >= 0; span-- {
		start, _ := l.spanRange(span)
		n, err := l.ReadAt(t.Context(), p, int64(start))
		require.NoError(t, err)
		require.Equal(t, stream[start:][:n], p[:n])
	}
}

// TestWindowsFetched fetches groups of windows as decoding starts in them, once, also over restarts.
func TestWindowsFetched(t *testing.T) {
	stream, dir := testTar(t, windowsTar), t.TempDir()
	e, x := newElsewhere(t, stream)
	s := e.open(t, dir)
	const source = "registry.example/repo:tag"
	l := e.add(t, s, x, source)
	require.False(t, l.LacksPlace(e.place))
	require.Zero(t, e.archive.requests.Load(), "nothing has started yet")

	// One read needs one group, or some that fit into one request.
	at := farSpan(x)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			p := make([]byte, 100)
			if _, err := l.ReadAt(context.Background(), p, int64(at)); err != nil || !bytes.Equal(p, stream[at:][:100]) {
				t.Error("wrong bytes", err)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, e.archive.requests.Load())
	require.Equal(t, source, e.source.Load())
	require.EqualValues(t, 1, e.layer.requests.Load())
	require.LessOrEqual(t, e.archive.bytes.Load(), max(leastWindows, x.Groups[0].Len)+16)

	require.NoError(t, s.Close())
	s = e.open(t, dir)
	l, err := s.Layer(x.DiffID)
	require.NoError(t, err)
	backwards(t, l, stream)
	asked := e.archive.requests.Load()
	require.LessOrEqual(t, asked, int64(len(x.Groups)))
	require.LessOrEqual(t, e.archive.bytes.Load(), x.WindowsSize()+100)

	// All of them are here by now, whatever is fetched again.
	require.NoError(t, s.Close())
	require.NoError(t, os.Remove(filepath.Join(dir, x.DiffID.Encoded(), dataFile)))
	s = e.open(t, dir)
	l, err = s.Layer(x.DiffID)
	require.NoError(t, err)
	backwards(t, l, stream)
	require.Equal(t, asked, e.archive.requests.Load())
	files, err := os.ReadDir(l.dir.Name())
	require.NoError(t, err)
	_, inodes := l.Usage()
	require.EqualValues(t, len(files)+1, inodes)
}

// TestWindowsOnDiskDamaged has windows on disk altered at random: they are fetched again.
func TestWindowsOnDiskDamaged(t *testing.T) {
	stream := testTar(t, windowsTar)
	e, x := newElsewhere(t, stream)
	s := e.open(t, t.TempDir())
	l := e.add(t, s, x, "registry.example/repo:tag")
	require.NoError(t, l.storeWindows(make([]byte, x.WindowsSize()), 0))
	backwards(t, l, stream)
	require.Positive(t, e.archive.requests.Load())
	require.Zero(t, e.blamed.Load())
}

// TestWindowsUnavailable reads a layer whose windows cannot be had, or are wrong.
func TestWindowsUnavailable(t *testing.T) {
	stream := testTar(t, windowsTar)
	for name, c := range map[string]struct {
		answer func(b []byte) ([]byte, error)
		wrap   func(r io.Reader, off, n int64) io.Reader
		blamed bool
	}{
		"gone":     {answer: func([]byte) ([]byte, error) { return nil, errdefs.ErrNotFound }},
		"altered":  {answer: func(b []byte) ([]byte, error) { b[len(b)/2]++; return b, nil }, blamed: true},
		"short":    {answer: func(b []byte) ([]byte, error) { return b[:len(b)-1], nil }},
		"breaking": {wrap: func(r io.Reader, _, _ int64) io.Reader { return iotest.TimeoutReader(iotest.OneByteReader(r)) }},
	} {
		t.Run(name, func(t *testing.T) {
			e, x := newElsewhere(t, stream)
			e.archive.answer, e.archive.wrap = c.answer, c.wrap
			s := e.open(t, t.TempDir())
			l := e.add(t, s, x, "registry.example/repo:tag")
			backwards(t, l, stream)
			require.EqualValues(t, 1, e.archive.requests.Load(), "it is not asked for again at once")
			require.Equal(t, c.blamed, e.blamed.Load() > 0)
			require.NoError(t, l.State().Failure.Err)
			require.Less(t, e.layer.bytes.Load(), int64(2*len(e.layer.blob)), "what is passed through on the way is kept")

			// After a while they are: it may be over.
			e.mended.Store(true)
			l.mu.Lock()
			require.Less(t, len(l.index.Points), len(x.Points))
			l.reduced = time.Now().Add(-2 * windowsPause)
			l.mu.Unlock()
			l.prepareIndex()
			l.mu.Lock()
			require.Len(t, l.index.Points, len(x.Points))
			l.mu.Unlock()
			frame, err := l.window(t.Context(), x, 0)
			require.NoError(t, err)
			require.NoError(t, x.VerifyGroup(0, frame))
		})
	}
}

// TestWindowsTogether has one wait for the group that another one fetches, which fails.
func TestWindowsTogether(t *testing.T) {
	e, x := newElsewhere(t, testTar(t, windowsTar))
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) { testWindowsTogether(t, dir, e, x) })
}

func testWindowsTogether(t *testing.T, dir string, e *elsewhere, x *layer.Index) {
	s := e.open(t, dir)
	l := e.add(t, s, x, "registry.example/repo:tag")
	asked, answer := make(chan struct{}), make(chan struct{})
	broken := errors.New("broken")
	e.archive.answer = func([]byte) ([]byte, error) { close(asked); <-answer; return nil, broken }
	failed := make(chan error, 2)
	ask := func() {
		_, err := l.window(t.Context(), x, 0)
		failed <- err
	}
	go ask()
	<-asked
	go ask()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := l.window(ended, x, 0)
	require.ErrorIs(t, err, context.Canceled, "who waits can give up")
	time.Sleep(time.Second) // which is over when both wait, however long that takes
	close(answer)
	first, second := <-failed, <-failed
	if errors.Is(first, errWindowFailed) {
		first, second = second, first
	}
	require.ErrorIs(t, first, broken)
	require.ErrorIs(t, second, errWindowFailed)
	require.EqualValues(t, 1, e.archive.requests.Load())
}

// TestWindowsOfRemovedLayer removes a layer, and closes the store, while windows are fetched.
func TestWindowsOfRemovedLayer(t *testing.T) {
	e, x := newElsewhere(t, testTar(t, windowsTar))
	s := e.open(t, t.TempDir())
	l := e.add(t, s, x, "registry.example/repo:tag")
	asked, answer := make(chan struct{}), make(chan struct{})
	e.archive.answer = func(b []byte) ([]byte, error) { close(asked); <-answer; return b, nil }
	read := make(chan error)
	go func() {
		_, err := l.ReadAt(t.Context(), make([]byte, 1), int64(farSpan(x)))
		read <- err
	}()
	<-asked
	require.NoError(t, s.Keep(func(digest.Digest) bool { return false }))
	require.ErrorIs(t, <-read, errdefs.ErrNotFound)
	close(answer)
	require.NoError(t, s.Close())
	left, err := os.ReadDir(s.dir)
	require.NoError(t, err)
	require.Empty(t, left)
	require.Error(t, l.storeWindows([]byte("windows"), 0))
}

// farSpan returns where a span begins whose seek point has its window in a group.
func farSpan(x *layer.Index) inflate.Out {
	for span := range x.Spans {
		start, _ := x.SpanRange(span)
		if _, ok := x.GroupAt(start); ok {
			return start
		}
	}
	return -1
}

// TestWindowsInPart keeps the groups before one that is wrong.
func TestWindowsInPart(t *testing.T) {
	e, x := newElsewhere(t, testTar(t, windowsTar))
	// As if the first two were small: they are asked for together.
	whole := build(t, e.layer.blob).Windows
	x.Groups = slices.Clone(x.Groups)
	x.Groups[0] = layer.Group{Len: 1000, Digest: sha256.Sum256(whole[:1000])}
	x.Groups[1] = layer.Group{Off: 1000, Len: 1000, Digest: sha256.Sum256(whole[:1000])}
	s := e.open(t, t.TempDir())
	l := e.add(t, s, x, "registry.example/repo:tag")
	frame, err := l.window(t.Context(), x, 0)
	require.NoError(t, err)
	require.NoError(t, x.VerifyGroup(0, frame))
	require.NotNil(t, l.windowHere(x, 0))
	require.EqualValues(t, 1, e.archive.requests.Load())
	require.EqualValues(t, 1, e.blamed.Load())
	_, err = l.window(t.Context(), x, 1)
	require.ErrorIs(t, err, layer.ErrMismatch)

	// One with the right digest of which nothing can be made is not started at.
	_, err = pointIn(x, farSpan(x), 0, frame)
	require.ErrorAs(t, err, new(*noWindow))
}

// TestWindowsUnknown has nobody know where windows are: nobody is asked.
func TestWindowsUnknown(t *testing.T) {
	stream := testTar(t, windowsTar)
	e, x := newElsewhere(t, stream)
	e.place = archive.Place{}
	s := e.open(t, t.TempDir())
	l := e.add(t, s, x, "registry.example/repo:tag")
	backwards(t, l, stream)
	require.Zero(t, e.archive.requests.Load())
	require.Less(t, e.layer.bytes.Load(), int64(2*len(e.layer.blob)))
}

// TestWindowsFromWholeArchives has a registry that sends whole blobs: they are not read through for a window.
func TestWindowsFromWholeArchives(t *testing.T) {
	e, x := newElsewhere(t, testTar(t, windowsTar))
	src := &rangeless{blob: e.archive.blob}
	s, err := Open(t.Context(), Options{Dir: t.TempDir(), Fetch: byDigest{x.Digest: &e.layer, e.place.Blob: src}})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	l := e.add(t, s, x, "registry.example/repo:tag")
	_, err = l.window(t.Context(), x, 0)
	require.ErrorIs(t, err, errWholeArchives)
	require.Zero(t, src.sent.Load())
}

// TestWindowsMove has another pull say that the archive is elsewhere by now.
func TestWindowsMove(t *testing.T) {
	stream, dir := testTar(t, windowsTar), t.TempDir()
	e, x := newElsewhere(t, stream)
	s := e.open(t, dir)
	good := e.place
	e.place.Blob = digest.FromString("removed")
	l := e.add(t, s, x, "registry.example/repo:tag")
	e.place = good
	require.True(t, l.LacksPlace(good))
	e.add(t, s, x, "registry.example/repo:tag")
	require.False(t, l.LacksPlace(good))
	require.NoError(t, s.Close())
	s = e.open(t, dir)
	l, err := s.Layer(x.DiffID)
	require.NoError(t, err)
	require.False(t, l.LacksPlace(good), "it is written down")
	backwards(t, l, stream)
	require.Positive(t, e.archive.requests.Load())

	// An archive of another index, or of no use, changes nothing.
	other := *x
	other.Spans = slices.Clone(x.Spans)
	other.Spans[0].Digest[0]++
	e.place.Blob = digest.FromString("other")
	e.add(t, s, &other, "registry.example/repo:tag")
	e.add(t, s, x.WithoutGroups(), "registry.example/repo:tag")
	e.place.In = -1
	e.add(t, s, x, "registry.example/repo:tag")
	require.False(t, l.LacksPlace(good))

	// One that brings its windows along has them stored.
	e.place = good
	asked := e.archive.requests.Load()
	require.NoError(t, l.storeWindows(make([]byte, x.WindowsSize()), 0))
	whole := *x
	whole.Windows = build(t, e.layer.blob).Windows
	require.NoError(t, s.Add("registry.example/repo:tag", &whole))
	for group := range x.Groups {
		require.NotNil(t, l.windowHere(x, group))
	}
	require.Equal(t, asked, e.archive.requests.Load())
}

// TestWindowsInArchive adds a layer with its windows: nothing is asked for.
func TestWindowsInArchive(t *testing.T) {
	stream := testTar(t, windowsTar)
	e, _ := newElsewhere(t, stream)
	x := build(t, e.layer.blob)
	_, l := open(t, t.TempDir(), e, x)
	require.True(t, l.LacksPlace(e.place), "nobody knows where else they are")
	backwards(t, l, stream)
	require.Zero(t, e.archive.requests.Load())
}

// TestPointsDamaged has each byte of the file with the seek points be altered, and it cut off: there are fewer, until
// the layer is added once more.
func TestPointsDamaged(t *testing.T) {
	e, x := newElsewhere(t, testTar(t, windowsTar))
	s := e.open(t, t.TempDir())
	l := e.add(t, s, x, "registry.example/repo:tag")
	good, err := l.dir.ReadFile(pointsFile)
	require.NoError(t, err)
	fewer := x.WithoutGroups().Points
	for i := 0; i < len(good); i += 7 {
		for _, raw := range [][]byte{append(append(bytes.Clone(good[:i]), good[i]^0x80), good[i+1:]...), good[:i]} {
			require.NoError(t, l.dir.WriteFile(pointsFile, raw, 0o600))
			y, at, err := readIndex(t.Context(), l.dir, x.DiffID)
			require.NoError(t, err)
			require.Zero(t, at)
			require.Equal(t, fewer, y.Points)
		}
	}
	require.NoError(t, s.Close())
	s = e.open(t, s.dir)
	l, err = s.Layer(x.DiffID)
	require.NoError(t, err)
	require.True(t, l.LacksPlace(e.place))
	e.add(t, s, x, "registry.example/repo:tag")
	require.False(t, l.LacksPlace(e.place))
	raw, err := l.dir.ReadFile(pointsFile)
	require.NoError(t, err)
	require.Equal(t, good, raw)

	// The spans are mended, and what belongs to them.
	require.NoError(t, s.Close())
	spans := filepath.Join(s.dir, x.DiffID.Encoded(), spansFile)
	require.NoError(t, os.Truncate(spans, 100))
	s = e.open(t, s.dir)
	_, err = s.Layer(x.DiffID)
	require.ErrorIs(t, err, errdefs.ErrDataLoss)
	require.NoError(t, s.Mend(x, e.place, "registry.example/repo:tag"))
	l, err = s.Layer(x.DiffID)
	require.NoError(t, err)
	require.False(t, l.LacksPlace(e.place))
	raw, err = l.dir.ReadFile(pointsFile)
	require.NoError(t, err)
	require.Equal(t, good, raw)

	// Points of another blob, and a place that is none, are not used.
	for _, at := range []located{{Layer: digest.FromString("other")}, {Layer: x.Digest, Source: "no reference", Place: e.place}, {Layer: x.Digest, Source: "example.com/a:1"}} {
		raw, err := encodePoints(x, at)
		require.NoError(t, err)
		require.NoError(t, l.dir.WriteFile(pointsFile, raw, 0o600))
		y, got, err := readIndex(t.Context(), l.dir, x.DiffID)
		require.NoError(t, err)
		require.Empty(t, got.Source)
		require.Equal(t, at.Layer == x.Digest, len(y.Groups) > 0)
	}
	// Without it there are fewer seek points.
	require.NoError(t, l.dir.Remove(pointsFile))
	y, _, err := readIndex(t.Context(), l.dir, x.DiffID)
	require.NoError(t, err)
	require.Equal(t, x.WithoutGroups().Points, y.Points)
}

func FuzzDecodePoints(f *testing.F) {
	blob := gzipped(f, testTar(f, 60))
	x := build(f, blob)
	raw, err := encodePoints(x, located{Layer: x.Digest, Source: "example.com/a:1", Place: archive.Place{Blob: x.Digest}})
	require.NoError(f, err)
	f.Add(raw[:len(raw)-4-len(checksumMagic)])
	f.Add([]byte(nil))
	f.Add([]byte("\x02{}"))
	bare := x.WithoutGroups()
	f.Fuzz(func(t *testing.T, raw []byte) {
		y := *bare
		at, err := decodePoints(appendChecksum(bytes.Clone(raw)), &y)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrDataLoss)
			require.Equal(t, bare, &y)
			return
		}
		require.True(t, at.Source == "" || validSource(at.Source) && at.Validate() == nil)
		again, err := encodePoints(&y, at)
		require.NoError(t, err)
		z := *bare
		got, err := decodePoints(again, &z)
		require.NoError(t, err)
		require.Equal(t, at, got)
		require.Equal(t, y, z)
	})
}

// TestWholeBlobNeedsNoWindow has a registry send all of the layer: nothing is decoded from a window then.
func TestWholeBlobNeedsNoWindow(t *testing.T) {
	stream := testTar(t, windowsTar)
	e, x := newElsewhere(t, stream)
	src := &rangeless{blob: e.layer.blob}
	s, err := Open(t.Context(), Options{Dir: t.TempDir(), Fetch: byDigest{x.Digest: src, e.place.Blob: &e.archive}})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	l := e.add(t, s, x, "registry.example/repo:tag")
	requireStream(t, l, stream)
	backwards(t, l, stream)
}
