package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// refusing is a registry that must not be asked.
func refusing(context.Context, []string, digest.Digest, int64, int64) (io.ReadCloser, error) {
	return nil, errors.New("nothing is fetched")
}

// receive has a store keep a stream, written in pieces.
func receive(t *testing.T, s *Store, stream []byte) *Incoming {
	t.Helper()
	in := s.Receive()
	for rest := stream; len(rest) > 0; {
		n, err := in.Write(rest[:min(len(rest), 100_000)])
		require.NoError(t, err)
		rest = rest[n:]
	}
	return in
}

func openEmpty(t *testing.T, opts Options) *Store {
	t.Helper()
	s, err := Open(t.Context(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// TestReceive adds a layer whose stream was read already: nothing of it is
// fetched, it becomes complete, and it is counted and survives like any other.
func TestReceive(t *testing.T) {
	stream := testTar(t, 60)
	blob := gzipped(t, stream)
	x := build(t, blob)
	dir := t.TempDir()
	s := openEmpty(t, Options{Dir: dir, Fetch: fetcherFunc(refusing)})
	in := receive(t, s, stream)
	in.Done(x.DiffID)
	require.NoError(t, s.Add("registry.example/repo:tag", x))
	in.Close()
	l, err := s.Layer(x.DiffID)
	require.NoError(t, err)
	requireStream(t, l, stream)
	require.Eventually(t, func() bool {
		_, release, err := s.Device(x.DiffID)
		if err == nil {
			release()
		}
		return err == nil
	}, time.Minute, 10*time.Millisecond, "it is a whole layer")
	require.Equal(t, dataBlocks(t, dir), s.used.Load())

	require.NoError(t, s.Close())
	_, l = open(t, dir, fetcherFunc(refusing), x)
	requireStream(t, l, stream)
}

// An image may have a layer twice.
func TestReceiveTwice(t *testing.T) {
	stream := testTar(t, 60)
	x := build(t, gzipped(t, stream))
	other := testTar(t, 61)
	y := build(t, gzipped(t, other))
	dir := t.TempDir()
	s := openEmpty(t, Options{Dir: dir, Fetch: fetcherFunc(refusing)})
	for _, in := range []struct {
		stream []byte
		diffID digest.Digest
	}{{stream, x.DiffID}, {other, y.DiffID}, {stream, x.DiffID}} {
		i := receive(t, s, in.stream)
		defer i.Close()
		i.Done(in.diffID)
	}
	require.NoError(t, s.Add("registry.example/repo:tag", x, y, x))
	for diffID, want := range map[digest.Digest][]byte{x.DiffID: stream, y.DiffID: other} {
		l, err := s.Layer(diffID)
		require.NoError(t, err)
		requireStream(t, l, want)
	}
}

// TestReceiveUnused lets go of streams that no layer came for, that came for a
// layer that was there, and twice.
func TestReceiveUnused(t *testing.T) {
	stream := testTar(t, 60)
	blob := gzipped(t, stream)
	x := build(t, blob)
	s := openEmpty(t, Options{Dir: t.TempDir(), Fetch: &blobs{blob: blob}})
	first, second := receive(t, s, stream), receive(t, s, stream)
	require.Equal(t, 2*int64(len(stream)), s.used.Load())
	first.Done(x.DiffID)
	second.Done(x.DiffID)
	require.Equal(t, int64(len(stream)), s.used.Load(), "the second takes the place of the first")
	first.Close()
	second.Close()
	second.Close()
	require.Zero(t, s.used.Load())
	require.NoError(t, s.Add("registry.example/repo:tag", x))
	l, err := s.Layer(x.DiffID)
	require.NoError(t, err)
	require.Zero(t, l.Fetched())

	late := receive(t, s, stream)
	late.Done(x.DiffID)
	require.Zero(t, s.used.Load(), "the layer is there")
	require.Zero(t, l.Fetched())
	requireStream(t, l, stream)
}

// TestReceiveNoRoom keeps nothing where it would displace something, and
// nothing that does not fit to the index.
func TestReceiveNoRoom(t *testing.T) {
	stream := testTar(t, 60)
	blob := gzipped(t, stream)
	x := build(t, blob)
	short := stream[:len(stream)-512]
	for name, c := range map[string]struct {
		room   int64
		stream []byte
	}{"full": {int64(len(stream)) / 2, stream}, "short": {1 << 40, short}} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			src := &blobs{blob: blob}
			s := openEmpty(t, Options{Dir: dir, Fetch: src, MaxSize: Limit{Size: c.room}})
			in := receive(t, s, c.stream)
			in.Done(x.DiffID)
			require.NoError(t, s.Add("registry.example/repo:tag", x))
			require.Zero(t, s.used.Load())
			require.Zero(t, dataBlocks(t, dir))
			l, err := s.Layer(x.DiffID)
			require.NoError(t, err)
			requireStream(t, l, stream)
			require.NotZero(t, src.requests.Load())
		})
	}
}

// TestReceiveLeavesNothing has a crash, seen from the disk: what has no name is gone.
func TestReceiveLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s := openEmpty(t, Options{Dir: dir, Fetch: fetcherFunc(refusing)})
	in := receive(t, s, bytes.Repeat([]byte("x"), 1<<20))
	defer in.Close()
	in.Done(digest.FromString("x"))
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, entries)
}
