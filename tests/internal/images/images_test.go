package images

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/continuity/sysx"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
)

// TestWriteUpper writes an overlay's upper directory as a layer.
func TestWriteUpper(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	require.NoError(t, os.Mkdir(path("opaque"), 0o711))
	require.NoError(t, sysx.LSetxattr(path("opaque"), overlayXattr+"opaque", []byte("y"), 0))
	require.NoError(t, os.WriteFile(path("opaque/file"), []byte("content"), 0o640))
	require.NoError(t, sysx.LSetxattr(path("opaque/file"), "user.x", []byte("value"), 0))
	require.NoError(t, os.Link(path("opaque/file"), path("second")))
	require.NoError(t, os.Symlink("second", path("link")))
	require.NoError(t, unix.Mknod(path("gone"), unix.S_IFCHR, 0))
	require.NoError(t, unix.Mknod(path("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))

	var b bytes.Buffer
	require.NoError(t, writeUpper(&b, dir))
	entries := map[string]*tar.Header{}
	r := tar.NewReader(&b)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		entries[h.Name] = h
	}
	require.Len(t, entries, 7)
	require.EqualValues(t, 0o711, entries["opaque/"].Mode)
	require.NotContains(t, entries["opaque/"].PAXRecords, paxXattr+overlayXattr+"opaque")
	require.Contains(t, entries, "opaque/"+opaqueMarker)
	require.Equal(t, "value", entries["opaque/file"].PAXRecords[paxXattr+"user.x"])
	require.Equal(t, "opaque/file", entries["second"].Linkname)
	require.Equal(t, "second", entries["link"].Linkname)
	require.Contains(t, entries, whiteoutPrefix+"gone")
	require.EqualValues(t, 3, entries["null"].Devminor)
}

// TestSmallIsDeterministic makes the small images twice: same input, same digests.
func TestSmallIsDeterministic(t *testing.T) {
	if _, err := os.Stat(busybox); err != nil {
		need.Missing(t, "busybox-static is not installed")
	}
	blobs := func() []string {
		l, err := Small(t.TempDir())
		require.NoError(t, err)
		files, err := filepath.Glob(filepath.Join(l.Dir, "blobs/sha256/*"))
		require.NoError(t, err)
		for i, f := range files {
			files[i] = filepath.Base(f)
		}
		return files
	}
	require.Equal(t, blobs(), blobs())
}
