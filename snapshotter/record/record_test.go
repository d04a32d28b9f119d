package record

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// zeros is a layer of that many zeros.
type zeros int64

func (z zeros) Size() int64 { return int64(z) }

func (z zeros) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	if off >= int64(z) {
		return 0, io.EOF
	}
	n := min(int64(len(p)), int64(z)-off)
	clear(p[:n])
	return int(n), nil
}

func read(t *testing.T, s Stream, off int64, n int) {
	t.Helper()
	_, err := s.ReadAt(t.Context(), make([]byte, n), off)
	require.NoError(t, err)
}

func document(layers ...string) Document {
	doc := Document{Image: "registry.example/app:1"}
	for _, l := range layers {
		doc.Layers = append(doc.Layers, digest.FromString(l))
	}
	doc.ChainID = digest.FromString(fmt.Sprint(layers))
	return doc
}

func TestTouches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(document("a", "b"))
		a, b := r.Stream(0, zeros(1<<20)), r.Stream(1, zeros(100))
		require.Equal(t, int64(1<<20), a.Size())
		read(t, a, 40000, 100)
		read(t, a, 40000, 10)
		time.Sleep(1500 * time.Millisecond)
		read(t, b, 0, 4096)
		read(t, a, 49152, 20000)
		read(t, a, 81920, 1)
		read(t, a, 0, 98304)
		_, err := a.ReadAt(t.Context(), make([]byte, 1), 1<<20)
		require.ErrorIs(t, err, io.EOF)
		doc := r.Document()
		require.Equal(t, []Touch{
			{0, 32768, 16384, 0}, {1, 0, 16384, 1500}, {0, 49152, 3 * 16384, 1500}, {0, 0, 32768, 1500},
		}, doc.Touches)
		require.False(t, doc.Full)
		require.Equal(t, version, doc.Version)
	})
}

func TestMostPieces(t *testing.T) {
	r := New(document("a"))
	s := r.Stream(0, zeros(2*MostBytes))
	for i := range int64(mostPieces) {
		r.touch(0, 2*i*pieceSize, 1)
	}
	require.False(t, r.Document().Full)
	read(t, s, pieceSize, 1)
	doc := r.Document()
	require.True(t, doc.Full)
	require.Len(t, doc.Touches, mostPieces)
	raw, err := json.Marshal(doc)
	require.NoError(t, err)
	require.Less(t, len(raw), mostFile, "it can be handed out and kept")
}

func open(t *testing.T, dir string) *Recorder {
	t.Helper()
	r, err := Open(t.Context(), dir)
	require.NoError(t, err)
	return r
}

// TestSharedLayers has two images with one layer in common, of which one starts later.
func TestSharedLayers(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		r := open(t, dir)
		one, two := document("base", "one"), document("base", "two")
		base := r.Stream(one.Layers[0], zeros(1<<20))
		top := r.Stream(one.Layers[1], zeros(1<<20))
		read(t, base, 0, 1)
		r.Start(one)
		read(t, top, 0, 1)
		time.Sleep(Period / 2)
		r.Start(one)
		r.Start(two)
		read(t, base, 16384, 1)
		time.Sleep(Period/2 + time.Second)
		read(t, base, 65536, 1)
		got, err := r.Get(one.ChainID)
		require.NoError(t, err)
		require.Equal(t, []Touch{{1, 0, 16384, 0}, {0, 16384, 16384, (Period / 2).Milliseconds()}}, got.Touches)
		require.FileExists(t, r.file(one.ChainID))
		require.NoFileExists(t, r.file(two.ChainID))
		r.Close()
		r.Start(one)
		require.Empty(t, r.under, "it is closed")
		got, err = open(t, dir).Get(two.ChainID)
		require.NoError(t, err)
		require.Len(t, got.Touches, 2)
	})
}

// TestBetter keeps what was seen of all layers until a later start says as much.
func TestBetter(t *testing.T) {
	r := open(t, t.TempDir())
	start := func(off int64, hidden ...int) {
		doc := document("a", "b")
		doc.Hidden = hidden
		r.Start(doc)
		if off >= 0 {
			read(t, r.Stream(doc.Layers[0], zeros(1<<20)), off, 1)
		}
		r.end(doc.ChainID, nil)
	}
	expect := func(off int64) {
		t.Helper()
		doc, err := r.Get(document("a", "b").ChainID)
		require.NoError(t, err)
		require.Equal(t, off, doc.Touches[0].Off)
	}
	start(-1)
	_, err := r.Get(document("a", "b").ChainID)
	require.ErrorIs(t, err, errdefs.ErrNotFound, "nothing was read")
	start(16384, 0, 1)
	expect(16384)
	start(0)
	expect(0)
	start(32768, 1)
	expect(0)
	start(49152)
	expect(49152)
}

func TestOldRecordingsGo(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	litter := filepath.Join(dir, ".new-1")
	require.NoError(t, os.WriteFile(litter, nil, 0o600))
	old := time.Now().Add(-2 * time.Hour)
	require.NoError(t, os.Chtimes(litter, old, old))
	for i := range mostKept + 3 {
		doc := document(fmt.Sprint(i))
		doc.Touches = []Touch{{0, 0, 1, 0}}
		doc.Version = version
		require.NoError(t, r.keep(doc))
		at := time.Now().Add(time.Duration(i-1000) * time.Second)
		require.NoError(t, os.Chtimes(r.file(doc.ChainID), at, at))
	}
	require.NoError(t, r.prune())
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, mostKept)
	require.NoFileExists(t, r.file(document("0").ChainID))
}

func TestSpoiledFiles(t *testing.T) {
	r := open(t, t.TempDir())
	doc := document("a")
	for content, want := range map[string]string{
		"{":             "unexpected EOF",
		"{}":            "version 0",
		`{"version":2}`: "version 2",
	} {
		require.NoError(t, os.WriteFile(r.file(doc.ChainID), []byte(content), 0o600))
		_, err := r.Get(doc.ChainID)
		require.ErrorContains(t, err, want)
	}
	_, err := r.Get("../x")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	r.Start(doc)
	read(t, r.Stream(doc.Layers[0], zeros(100)), 0, 1)
	r.Close()
	got, err := r.Get(doc.ChainID)
	require.NoError(t, err, "a spoiled file is replaced")
	require.Len(t, got.Touches, 1)
}

type source map[string]Document

func (s source) Recording(_ context.Context, name string) (Document, error) {
	if doc, ok := s[name]; ok {
		return doc, nil
	}
	return Document{}, fmt.Errorf("recording %q: %w", name, errdefs.ErrNotFound)
}

func TestService(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	server := grpc.NewServer()
	many := New(document("a")).Document()
	for i := range mostPieces {
		many.Touches = append(many.Touches, Touch{0, int64(i) * 1 << 40, pieceSize, 59999})
	}
	Register(server, source{"many": many, "new": {Version: 2}})
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	got, err := Get(t.Context(), conn, "many")
	require.NoError(t, err)
	require.Equal(t, many, got)
	_, err = Get(t.Context(), conn, "none")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorContains(t, err, `"none"`)
	_, err = Get(t.Context(), conn, "new")
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
}
