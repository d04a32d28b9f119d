package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

func TestIDMap(t *testing.T) {
	for _, c := range []struct {
		uids, gids string
		uid, gid   int
		bad        bool
	}{
		{uids: "0:1000:1", gids: "0:2000:65536", uid: 1000, gid: 2000},
		{uids: "1:5:10,0:7:1", gids: "0:4294967294:1", uid: 7, gid: 4294967294},
		{uids: "0:1000:1", bad: true},
		{gids: "0:1000:1", bad: true},
		{uids: "0:1000", gids: "0:1:1", bad: true},
		{uids: "0:1:1", gids: "0:4294967295:1", bad: true},
		{uids: "0:1:1", gids: "0:-1:1", bad: true},
		{uids: "0:1:1", gids: "0:x:1", bad: true},
		{uids: "0:1:1", gids: "0:1:0", bad: true},
		{uids: "0:1:1", gids: "1:1:1", bad: true},
		{uids: "0:1:1", gids: "0:1:1,", uid: 1, gid: 1},
		{uids: ",0:1:1", gids: "0:1:1", bad: true},
	} {
		m, err := idmapOf(map[string]string{snapshots.LabelSnapshotUIDMapping: c.uids, snapshots.LabelSnapshotGIDMapping: c.gids})
		uid, gid := 0, 0
		if err == nil {
			require.Equal(t, []string{"uidmap=" + c.uids, "gidmap=" + c.gids}, m.options())
			uid, gid, err = m.root()
		}
		if c.bad {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%+v", c)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, []int{c.uid, c.gid}, []int{uid, gid})
	}
	m, err := idmapOf(nil)
	require.NoError(t, err)
	require.True(t, m.empty())
	require.Empty(t, m.options())
}

var mapped = snapshots.WithLabels(map[string]string{
	snapshots.LabelSnapshotUIDMapping: "0:100000:65536",
	snapshots.LabelSnapshotGIDMapping: "0:200000:65536",
})

// requireOwner mounts and looks at the owners of names, "." among them.
func requireOwner(t *testing.T, mounts []mount.Mount, uid, gid uint32, names ...string) {
	t.Helper()
	require.NoError(t, mount.WithTempMount(t.Context(), mounts, func(dir string) error {
		for _, name := range names {
			var st unix.Stat_t
			require.NoError(t, unix.Lstat(filepath.Join(dir, name), &st))
			require.Equal(t, []uint32{uid, gid}, []uint32{st.Uid, st.Gid}, name)
		}
		return nil
	}))
}

// TestUserNamespaces mounts whatever a snapshot can stand on, for a container
// with a user namespace and for one without.
func TestUserNamespaces(t *testing.T) {
	for _, mode := range []root.Mode{root.File, root.Loop, root.FUSE} {
		t.Run(string(mode), func(t *testing.T) {
			dir := t.TempDir()
			img, ref := lazyImage(t, dir)
			sn := openMode(t, dir, mode)
			top := pull(t, sn, img, ref)

			// A chain of an ordinary snapshot on lazy ones.
			mounts, err := sn.Prepare(t.Context(), "build", top)
			require.NoError(t, err)
			require.NoError(t, mount.WithTempMount(t.Context(), mounts, func(dir string) error {
				return os.WriteFile(filepath.Join(dir, "built"), nil, 0o600)
			}))
			require.NoError(t, sn.Commit(t.Context(), "built", "build"))

			for parent, names := range map[string][]string{top: {".", "low", "both"}, "built": {".", "low", "both", "built"}} {
				for name, make := range map[string]func(key string, opts ...snapshots.Opt) ([]mount.Mount, error){
					"container": func(key string, opts ...snapshots.Opt) ([]mount.Mount, error) {
						return sn.Prepare(t.Context(), key, parent, opts...)
					},
					"view": func(key string, opts ...snapshots.Opt) ([]mount.Mount, error) {
						return sn.View(t.Context(), key, parent, opts...)
					},
				} {
					mounts, err := make(name+" mapped "+parent, mapped)
					require.NoError(t, err)
					again, err := sn.Mounts(t.Context(), name+" mapped "+parent)
					require.NoError(t, err)
					require.Equal(t, mounts, again)
					requireOwner(t, mounts, 100000, 200000, names...)
					mounts, err = make(name + " plain " + parent)
					require.NoError(t, err)
					requireOwner(t, mounts, 0, 0, names...)
				}
			}
		})
	}
}

// TestUserNamespaceWithoutParent has an empty root.
func TestUserNamespaceWithoutParent(t *testing.T) {
	sn := open(t, t.TempDir())
	mounts, err := sn.Prepare(t.Context(), "active", "", mapped)
	require.NoError(t, err)
	requireOwner(t, mounts, 100000, 200000, ".")
	mounts, err = sn.View(t.Context(), "view", "", mapped)
	require.NoError(t, err)
	requireOwner(t, mounts, 100000, 200000, ".")
}

// TestUserNamespaceThatCannotBe fails, and leaves nothing.
func TestUserNamespaceThatCannotBe(t *testing.T) {
	dir := t.TempDir()
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	top := pull(t, sn, img, ref)
	sn.able.can.Remap = errors.New("not on this machine")
	_, err := sn.Prepare(t.Context(), "container", top, mapped)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "not on this machine")
	require.ErrorContains(t, err, "remap-ids")
	_, err = sn.Stat(t.Context(), "container")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	mounts, err := sn.Prepare(t.Context(), "copy", top)
	require.NoError(t, err, "others can")

	// What containerd does then, see client/snapshotter_opts_unix.go.
	require.NoError(t, mount.WithTempMount(t.Context(), mounts, func(dir string) error {
		for _, name := range []string{".", "low", "both"} {
			require.NoError(t, os.Lchown(filepath.Join(dir, name), 100000, 200000))
		}
		return nil
	}))
	require.NoError(t, sn.Commit(t.Context(), "copied", "copy"))
	mounts, err = sn.Prepare(t.Context(), "container", "copied", mapped)
	require.NoError(t, err)
	requireOwner(t, mounts, 100000, 200000, ".", "low", "both")
	mounts, err = sn.View(t.Context(), "view", "copied", mapped)
	require.NoError(t, err)
	requireOwner(t, mounts, 100000, 200000, ".", "low", "both")
	_, err = sn.Prepare(t.Context(), "half", top, snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotUIDMapping: "0:1:1"}))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = sn.Stat(t.Context(), "half")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}
