package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestMillionEntries indexes, pulls, mounts and walks an image of a million files, in memory that a machine has.
func TestMillionEntries(t *testing.T) {
	const files, most = 1_000_000, 2500                            // MB
	w := worldIn(t, harness.ForTestWithin(t, 2*harness.Limit), "") // it computes more than it waits
	layout, err := images.Large(w.lab.Path("large"), files)
	require.NoError(t, err)
	file := w.lab.Path("large.tar")
	require.NoError(t, layout.WriteTar(file))
	w.ctr(w.builder, "image", "import", "--no-unpack", file)
	w.publish(images.LargeName)
	ref := w.ref(images.LargeName)

	indexed := w.index(images.LargeName)
	t.Logf("clipctl index: %v, %d MB of memory", indexed.Took, indexed.Memory>>20)
	require.Less(t, indexed.Memory>>20, int64(most))

	began := time.Now()
	require.Empty(t, w.pull(w.worker, lazy, ref).Gets(w.layers(images.LargeName)...))
	pulled := time.Since(began)
	root := w.view(w.worker, lazy, ref)
	t.Logf("pull: %v, mounted after %v", pulled, time.Since(began))
	began = time.Now()
	out := w.run(w.worker, lazy, ref, "sh", "-c", "busybox find /large -type f | busybox wc -l")
	require.Equal(t, "999999", strings.TrimSpace(out))
	memory := w.daemon.Memory()
	t.Logf("container that lists all: %v; the daemon had at most %d MB of memory", time.Since(began), memory>>20)
	require.Less(t, memory>>20, int64(most))

	for i := 0; i < files; i += 9973 {
		path, want := images.LargeFile(i)
		got, err := os.ReadFile(filepath.Join(root, path))
		require.NoError(t, err)
		require.Equal(t, want, string(got))
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(root, path), &st))
		require.EqualValues(t, i%7, st.Uid)
		require.Equal(t, images.Epoch.Unix(), st.Mtim.Sec)
	}
	last, _ := images.LargeFile(files - 1)
	require.NoFileExists(t, filepath.Join(root, last))
}
