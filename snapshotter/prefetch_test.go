package snapshotter

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/snapshotter/cache"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// noise is a file's content that does not compress.
func noise(n int) string {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return string(b)
}

// recordedRoot prepares a container that is recorded as "mine" and reads files
// of it in this order.
func recordedRoot(t *testing.T, sn *Snapshotter, top string, files ...string) {
	t.Helper()
	mounts, err := sn.Prepare(t.Context(), "recorded", top, snapshots.WithLabels(map[string]string{discover.LabelRecord: "mine"}))
	require.NoError(t, err)
	readFiles(t, mounts, files...)
}

func readFiles(t *testing.T, mounts []mount.Mount, files ...string) {
	t.Helper()
	require.NoError(t, mount.WithTempMount(t.Context(), mounts, func(dir string) error {
		for _, name := range files {
			f, err := os.Open(filepath.Join(dir, name))
			require.NoError(t, err)
			_, err = io.CopyN(io.Discard, f, 4096)
			require.NoError(t, err)
			require.NoError(t, f.Close())
		}
		return nil
	}))
}

// touchedLayers are the layers of the touches, in order, and their bytes.
func touchedLayers(doc record.Document) (layers []int, bytes int64) {
	for _, touch := range doc.Touches {
		layers = append(layers, touch.Layer)
		bytes += touch.Len
	}
	return layers, bytes
}

// bigImage has a layer of two large files below one with another.
func bigImage(t *testing.T) *testutil.Image {
	return testutil.NewImage(t,
		testutil.Tar(t, testutil.File{Name: "one", Data: noise(2 << 20)}, testutil.File{Name: "two", Data: noise(3 << 20)}),
		testutil.Tar(t, testutil.File{Name: "three", Data: noise(1 << 20)}))
}

// TestRecordedRoot reads first what is in the kernel's memory and then through
// layers that are complete: a root that is recorded sees every read in each case.
func TestRecordedRoot(t *testing.T) {
	for _, mode := range []root.Mode{root.File, root.Loop, root.FUSE} {
		t.Run(string(mode), func(t *testing.T) {
			dir := t.TempDir()
			img := bigImage(t)
			ref, _ := publishImage(t, dir, img)
			sn, err := New(t.Context(), Options{Root: dir, Mount: mode, Fill: fill.Options{Workers: 2}})
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, sn.Close()) })
			top := pull(t, sn, img, ref)
			mounts, err := sn.Prepare(t.Context(), "container", top)
			require.NoError(t, err)
			readFiles(t, mounts, "two", "three", "one")
			requireComplete(t, sn, img)

			recordedRoot(t, sn, top, "two", "three", "one")
			doc, err := sn.Recording(t.Context(), "mine")
			require.NoError(t, err)
			layers, bytes := touchedLayers(doc)
			layers = slices.Compact(layers)
			if mode != root.FUSE { // where the kernel reads farther ahead
				require.Equal(t, []int{0, 1, 0}, layers)
				require.LessOrEqual(t, bytes, int64(3*2*128<<10), "what was read, and its read-ahead: %v", doc.Touches)
			}
			require.Contains(t, layers, 1)
			require.Equal(t, img.DiffIDs, doc.Layers)
			require.Equal(t, ref, doc.Image)
			require.Empty(t, doc.Hidden)

			require.NoError(t, sn.Remove(t.Context(), "recorded"))
			_, err = sn.Recording(t.Context(), "mine")
			require.ErrorIs(t, err, errdefs.ErrNotFound, "it is gone with the container")
			require.Len(t, names(t, filepath.Join(dir, "roots")), 1, "that of the image")
		})
	}
}

// TestOrdinaryStartIsRecorded finds it while the container runs, and after a
// restart; a start of which less is seen does not replace it.
func TestOrdinaryStartIsRecorded(t *testing.T) {
	dir := t.TempDir()
	img := bigImage(t)
	ref, _ := publishImage(t, dir, img)
	sn := open(t, dir)
	top := pull(t, sn, img, ref)
	chainID := chainOf(img).String()
	_, err := sn.Recording(t.Context(), chainID)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	mounts, err := sn.Prepare(t.Context(), "container", top)
	require.NoError(t, err)
	readFiles(t, mounts, "three", "two")
	doc, err := sn.Recording(t.Context(), chainID)
	require.NoError(t, err)
	layers, _ := touchedLayers(doc)
	require.Equal(t, []int{1, 0}, slices.Compact(layers))
	require.Empty(t, doc.Hidden)
	require.NoError(t, sn.Close())

	sn, err = New(t.Context(), Options{Root: dir, Fill: fill.Options{Workers: 2}})
	require.NoError(t, err)
	kept, err := sn.Recording(t.Context(), chainID)
	require.NoError(t, err)
	require.Equal(t, doc.Touches, kept.Touches)
	requireComplete(t, sn, img)
	mounts, err = sn.Mounts(t.Context(), "container")
	require.NoError(t, err)
	readFiles(t, mounts, "one")
	require.NoError(t, sn.Close())

	sn = open(t, dir)
	again, err := sn.Recording(t.Context(), chainID)
	require.NoError(t, err)
	require.Equal(t, kept, again)
}

// withList writes the image's archive anew, with a list.
func withList(t *testing.T, dir string, spans []archive.SpanRange) {
	t.Helper()
	path := filepath.Join(dir, "archives", "a.clip")
	a, err := archive.OpenFile(path)
	require.NoError(t, err)
	img, err := a.Image()
	require.NoError(t, err)
	require.NoError(t, a.Close())
	img.Prefetch = &archive.Prefetch{Recorded: time.Unix(1, 0), Spans: spans}
	_, err = archive.WriteFile(path, img)
	require.NoError(t, err)
}

// TestPrefetchList fetches what the list says and nothing else, unless told not to.
func TestPrefetchList(t *testing.T) {
	for _, on := range []bool{true, false} {
		dir := t.TempDir()
		img := bigImage(t)
		ref, _ := publishImage(t, dir, img)
		withList(t, dir, []archive.SpanRange{{Layer: 1, First: 0, Count: 2}, {Layer: 0, First: 12, Count: 3}})
		sn, err := New(t.Context(), Options{Root: dir, Prefetch: on, Fill: fill.Options{Workers: 2, ListsOnly: true}})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, sn.Close()) })
		pull(t, sn, img, ref)
		low, err := sn.layers.Layer(img.DiffIDs[0])
		require.NoError(t, err)
		high, err := sn.layers.Layer(img.DiffIDs[1])
		require.NoError(t, err)
		if !on {
			time.Sleep(300 * time.Millisecond)
			require.Zero(t, low.Fetched()+high.Fetched())
			continue
		}
		require.Eventually(t, func() bool { return high.Fetched() >= 512<<10 && low.Fetched() >= 768<<10 }, time.Minute, 10*time.Millisecond)
		time.Sleep(300 * time.Millisecond)
		require.LessOrEqual(t, low.Fetched(), int64(7*256<<10), "the list, and what lies between it and the seek point before")
		require.Equal(t, int64(512<<10), high.Fetched())
	}
}

// spoilList writes a prefetch list of these bytes into the image's archive, which
// has one as its last section (docs/format.md).
func spoilList(t *testing.T, dir string, raw []byte) {
	t.Helper()
	path := filepath.Join(dir, "archives", "a.clip")
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	foot := slices.Clone(b[len(b)-64:])
	table := slices.Clone(b[binary.LittleEndian.Uint64(foot[16:]) : len(b)-64])
	last := table[len(table)-64:]
	require.EqualValues(t, 6, last[0])
	enc, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	stored := enc.EncodeAll(raw, nil)
	b = append(b[:binary.LittleEndian.Uint64(last[8:])], stored...)
	binary.LittleEndian.PutUint64(last[16:], uint64(len(stored)))
	binary.LittleEndian.PutUint64(last[24:], uint64(len(raw)))
	sum := sha256.Sum256(stored)
	copy(last[32:], sum[:])
	binary.LittleEndian.PutUint64(foot[16:], uint64(len(b)))
	sum = sha256.Sum256(table)
	copy(foot[24:], sum[:])
	require.NoError(t, os.WriteFile(path, slices.Concat(b, table, foot), 0o600))
}

// TestHostileList has lists that no writer makes: the image is lazy, its
// container reads, and the log says what is ignored.
func TestHostileList(t *testing.T) {
	for name, c := range map[string]struct {
		raw  []byte
		want string
	}{
		"another image's":   {[]byte{0, 1, 9, 0, 1}, "a layer that the image does not have"},
		"truncated":         {[]byte{0, 1, 0, 0}, "ignoring the archive's prefetch list"},
		"no such spans":     {[]byte{0, 2, 0, 0xf0, 1, 1, 0, 1, 1}, "ignoring a part of the archive's prefetch list"},
		"the same for ever": {append([]byte{0, 0xe8, 7}, bytes.Repeat([]byte{0, 0, 1, 0, 1, 1}, 500)...), "fetching what a recorded start read"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			img, ref := lazyImage(t, dir)
			withList(t, dir, []archive.SpanRange{{Layer: 0, First: 0, Count: 1}})
			spoilList(t, dir, c.raw)
			logged := &logbook{} // what goes on behind a pull may log, too
			logger := logrus.New()
			logger.SetOutput(logged)
			ctx := log.WithLogger(t.Context(), logrus.NewEntry(logger))
			sn, err := New(ctx, Options{Root: dir, Prefetch: true, Fill: fill.Options{Workers: 2, ListsOnly: true}})
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, sn.Close()) })
			top := pullWith(ctx, t, sn, img, ref)
			require.Contains(t, logged.String(), c.want)
			mounts, err := sn.Prepare(t.Context(), "container", top)
			require.NoError(t, err)
			requireRead(t, mounts)
		})
	}
}

// TestUselessList has one that names what is not there: the image works as if
// there were none.
func TestUselessList(t *testing.T) {
	sn := open(t, t.TempDir())
	img := bigImage(t)
	ref, _ := publishImage(t, sn.dir, img)
	pull(t, sn, img, ref)
	a, err := archive.OpenFile(filepath.Join(sn.dir, "archives", "a.clip"))
	require.NoError(t, err)
	defer a.Close()
	wants, unknown, err := sn.wants(a, []archive.SpanRange{
		{Layer: 0, First: 1 << 29, Count: 1}, {Layer: 1, First: 0, Count: 1 << 30}, {Layer: 1, First: 1, Count: 1},
	})
	require.NoError(t, err)
	require.Equal(t, 2, unknown)
	require.Len(t, wants, 1)
	_, unknown, err = open(t, t.TempDir()).wants(a, []archive.SpanRange{{Layer: 0, First: 0, Count: 1}})
	require.NoError(t, err)
	require.Equal(t, 1, unknown, "the layer is not there")
}

// TestListOfOtherSpans has a list that counts spans of another size than those
// of the layer, which came with an earlier archive.
func TestListOfOtherSpans(t *testing.T) {
	sn := open(t, t.TempDir())
	img := bigImage(t)
	ref, _ := publishImage(t, sn.dir, img)
	pull(t, sn, img, ref)
	path := filepath.Join(sn.dir, "archives", "a.clip")
	a, err := archive.OpenFile(path)
	require.NoError(t, err)
	again, err := a.Image()
	require.NoError(t, err)
	require.NoError(t, a.Close())
	for i, desc := range img.Layers {
		again.Layers[i].Index, err = layer.Build(t.Context(), bytes.NewReader(img.Blobs[desc.Digest]), desc, layer.Options{SpanSize: 64 << 10})
		require.NoError(t, err)
	}
	again.Prefetch = &archive.Prefetch{Recorded: time.Unix(1, 0), Spans: []archive.SpanRange{{Layer: 0, First: 5, Count: 4}}}
	_, err = archive.WriteFile(path, again)
	require.NoError(t, err)
	a, err = archive.OpenFile(path)
	require.NoError(t, err)
	defer a.Close()
	wants, unknown, err := sn.wants(a, again.Prefetch.Spans)
	require.NoError(t, err)
	require.Zero(t, unknown)
	require.Len(t, wants, 1)
	require.Equal(t, cache.Spans{First: 1, End: 3}, wants[0].Spans, "[320, 576) KiB in spans of 256 KiB")
}

func chainOf(img *testutil.Image) digest.Digest {
	return identity.ChainID(slices.Clone(img.DiffIDs))
}
