package snapshotter

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// smallDisk is a file system of 32 MiB that can be filled up.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir, image := t.TempDir(), filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 32<<20))
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-m", "0", image}, {"mount", "-o", "loop", image, dir}} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		require.NoError(t, err, "this test needs root and %s: %s", args[0], out)
	}
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, 0)) })
	return dir
}

// fillUp takes all space of a disk and returns the file to be removed.
func fillUp(t *testing.T, dir string) (file string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "filler"))
	require.NoError(t, err)
	defer f.Close()
	for size := int64(8 << 20); size >= 1024; {
		st, err := f.Stat()
		require.NoError(t, err)
		if err := unix.Fallocate(int(f.Fd()), 0, st.Size(), size); err != nil {
			require.ErrorIs(t, err, unix.ENOSPC)
			size /= 2
		}
	}
	return f.Name()
}

// TestStartOnFullDisk does not take a full disk for a machine that cannot mount
// lazy roots: as soon as there is room, it can.
func TestStartOnFullDisk(t *testing.T) {
	dir := smallDisk(t)
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	_, err := sn.Prepare(t.Context(), "container", pull(t, sn, img, ref))
	require.NoError(t, err)
	require.NoError(t, sn.Close())
	filler := fillUp(t, dir)

	ctx, sn, book := openLogged(t, dir)
	_, err = sn.Mounts(ctx, "container")
	require.ErrorIs(t, err, unix.ENOSPC)
	require.ErrorContains(t, err, "make room")
	status, err := sn.Status(ctx)
	require.NoError(t, err)
	require.Contains(t, status.Daemon.NotLazy, "make room")
	require.True(t, status.Daemon.Full)
	require.Equal(t, 1, strings.Count(book.String(), "until there is room"), "said once: %s", book)
	require.NotContains(t, book.String(), "this machine")
	require.Equal(t, []string{"2"}, names(t, filepath.Join(dir, "roots")), "no probe is left")

	require.NoError(t, os.Remove(filler))
	mounts, err := sn.Mounts(ctx, "container")
	require.NoError(t, err)
	requireRead(t, mounts)
	require.Contains(t, book.String(), "this machine can mount lazy roots")
	status, err = sn.Status(ctx)
	require.NoError(t, err)
	require.Empty(t, status.Daemon.NotLazy)
	require.NotEmpty(t, status.Daemon.Mode)
}
