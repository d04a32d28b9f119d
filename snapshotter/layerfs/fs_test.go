package layerfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

func randomBytes(n int) []byte {
	b := make([]byte, n)
	src := rand.NewChaCha8([32]byte{1})
	_, _ = src.Read(b)
	return b
}

func newFS(t *testing.T) *FS {
	t.Helper()
	fs, err := New(context.Background(), nil)
	require.NoError(t, err, "this test needs root and /dev/fuse")
	t.Cleanup(func() { require.NoError(t, fs.Close()) })
	return fs
}

// TestNumbersStay has the node numbers of two layers: what the kernel holds since an earlier version is asked for by them.
func TestNumbersStay(t *testing.T) {
	for text, want := range map[string]uint64{"": 0x63b0c44298fc1c14, "abc": 0x7a7816bf8f01cfea} {
		got, err := nodeID(digest.FromString(text))
		require.NoError(t, err)
		require.Equal(t, want, got, "%#x", got)
	}
}

func TestReadsEqualTheLayer(t *testing.T) {
	fs := newFS(t)
	data := randomBytes(5<<20 + 12345)
	id := digest.FromBytes(data)
	require.NoError(t, fs.Add(id, testutil.Stream{Reader: bytes.NewReader(data)}))

	got, err := testutil.ReadFile(fs.Path(id))
	require.NoError(t, err)
	require.Zero(t, len(got)%blockSize)
	require.Less(t, len(got)-len(data), blockSize)
	require.True(t, bytes.Equal(data, got[:len(data)]))
	require.True(t, bytes.Equal(make([]byte, len(got)-len(data)), got[len(data):]), "padding is zero")

	f, err := testutil.Open(fs.Path(id))
	require.NoError(t, err)
	defer f.Close()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			for range 200 {
				off := r.Int64N(int64(len(data)))
				p := make([]byte, r.IntN(300<<10))
				n, err := f.ReadAt(p[:min(int64(len(p)), int64(len(data))-off)], off)
				if err != nil && !errors.Is(err, io.EOF) {
					t.Error(err)
				}
				if !bytes.Equal(p[:n], data[off:off+int64(n)]) {
					t.Errorf("wrong bytes at %d", off)
				}
			}
		})
	}
	wg.Wait()
}

func TestReadErrorIsEIOAndNotRemembered(t *testing.T) {
	fs := newFS(t)
	data := randomBytes(1 << 20)
	id := digest.FromBytes(data)
	var fail atomic.Bool
	fail.Store(true)
	require.NoError(t, fs.Add(id, testutil.Stream{Reader: bytes.NewReader(data), Before: func() error {
		if fail.Load() {
			return errors.New("registry is away")
		}
		return nil
	}}))
	_, err := testutil.ReadFile(fs.Path(id))
	require.ErrorIs(t, err, unix.EIO)
	fail.Store(false)
	got, err := testutil.ReadFile(fs.Path(id))
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, got))
}

func TestUnknownLayersAndWrites(t *testing.T) {
	fs := newFS(t)
	data := randomBytes(100)
	id := digest.FromBytes(data)
	_, err := os.Stat(fs.Path(id))
	require.ErrorIs(t, err, os.ErrNotExist)
	require.NoError(t, fs.Add(id, testutil.Stream{Reader: bytes.NewReader(data)}))
	_, err = os.OpenFile(fs.Path(id), os.O_RDWR, 0)
	require.Error(t, err)
	fs.Remove(id)
	_, err = testutil.ReadFile(fs.Path(id))
	require.ErrorIs(t, err, unix.EIO, "the kernel knows it: it must not be taken for a file that does not exist")
	require.NoError(t, fs.Add(id, testutil.Stream{Reader: bytes.NewReader(data)}))
	got, err := testutil.ReadFile(fs.Path(id))
	require.NoError(t, err)
	require.Equal(t, data, got[:len(data)])
	require.Error(t, fs.Add("sha256:nonsense", testutil.Stream{Reader: bytes.NewReader(data)}))
}

func TestManySlowReadersAreServedAtOnce(t *testing.T) {
	fs := newFS(t)
	const readers = 24
	var entered, read sync.WaitGroup
	entered.Add(readers)
	for i := range readers {
		data := randomBytes(100 + i)
		id := digest.FromBytes(data)
		once := sync.Once{}
		require.NoError(t, fs.Add(id, testutil.Stream{Reader: bytes.NewReader(data), Before: func() error {
			once.Do(entered.Done)
			entered.Wait() // ends only if all of them are being answered at once
			return nil
		}}))
		read.Go(func() {
			got, err := testutil.ReadFile(fs.Path(id))
			if err != nil || !bytes.Equal(data, got[:len(data)]) {
				t.Errorf("layer %d: %v", i, err)
			}
		})
	}
	read.Wait()
}

// TestErrorThatWrapsEOF must not look like the end of the file, which is filled
// up with zeros.
func TestErrorThatWrapsEOF(t *testing.T) {
	for name, err := range map[string]error{"wrapped": fmt.Errorf("connection closed: %w", io.EOF), "bare": io.EOF} {
		t.Run(name, func(t *testing.T) {
			fs := newFS(t)
			data := randomBytes(1 << 20)
			id := digest.FromBytes(data)
			require.NoError(t, fs.Add(id, testutil.Stream{Reader: bytes.NewReader(data), Before: func() error { return err }}))
			_, err := testutil.ReadFile(fs.Path(id))
			require.ErrorIs(t, err, unix.EIO)
		})
	}
}
