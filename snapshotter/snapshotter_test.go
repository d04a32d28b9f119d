package snapshotter

import (
	"context"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

func open(t testing.TB, root string) *Snapshotter {
	t.Helper()
	return openMode(t, root, "")
}

func openMode(t testing.TB, dir string, mode root.Mode) *Snapshotter {
	t.Helper()
	sn, err := New(t.Context(), Options{Root: dir, Mount: mode})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sn.Close()) })
	_, err = sn.able.known()
	require.NoError(t, err, "this test needs root, FUSE and EROFS")
	return sn
}

// names lists a directory.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	found := []string{}
	for _, e := range entries {
		found = append(found, e.Name())
	}
	return found
}

func mountsBelow(t *testing.T, dir string) int {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	require.NoError(t, err)
	return len(infos)
}

func TestRestartKeepsSnapshots(t *testing.T) {
	root := t.TempDir()
	sn := open(t, root)
	_, err := sn.Prepare(t.Context(), "active", "")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(sn.upper("1"), "file"), []byte("kept"), 0o644))
	require.NoError(t, sn.Commit(t.Context(), "base", "active"))
	before, err := sn.Prepare(t.Context(), "container", "base", snapshots.WithLabels(map[string]string{"a": "b"}))
	require.NoError(t, err)
	require.NoError(t, sn.Close())

	sn = open(t, root)
	info, err := sn.Stat(t.Context(), "container")
	require.NoError(t, err)
	require.Equal(t, "base", info.Parent)
	require.Equal(t, "b", info.Labels["a"])
	after, err := sn.Mounts(t.Context(), "container")
	require.NoError(t, err)
	require.Equal(t, before, after)
	b, err := os.ReadFile(filepath.Join(sn.upper("1"), "file"))
	require.NoError(t, err)
	require.Equal(t, "kept", string(b))
}

// litter makes what processes leave that were killed.
func litter(t *testing.T, root string) {
	t.Helper()
	for _, dir := range []string{"snapshots/99/fs", "snapshots/new-123/work", "roots/99/mnt", "roots/probe-1/mnt"} {
		require.NoError(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	require.NoError(t, os.WriteFile(filepath.Join(root, "roots/99/image"), []byte("x"), 0o600))
}

func TestLeftovers(t *testing.T) {
	root := t.TempDir()
	sn := open(t, root)
	_, err := sn.Prepare(t.Context(), "active", "")
	require.NoError(t, err)
	require.NoError(t, sn.Close())

	litter(t, root)
	// A root that the earlier process had mounted.
	require.NoError(t, (&mount.Mount{Type: "tmpfs", Source: "tmpfs"}).Mount(filepath.Join(root, "roots/99/mnt")))
	require.NoError(t, os.MkdirAll(filepath.Join(root, "layers", digest.FromString("x").Encoded()), 0o700))
	require.NoError(t, os.MkdirAll(filepath.Join(root, "layers", ".new-1"), 0o700))
	sn = open(t, root)
	require.Equal(t, []string{"1"}, names(t, filepath.Join(root, "snapshots")))
	require.Empty(t, names(t, filepath.Join(root, "roots")))
	require.Empty(t, names(t, filepath.Join(root, "layers")))
	require.Zero(t, mountsBelow(t, filepath.Join(root, "roots")))

	litter(t, root)
	require.NoError(t, sn.Cleanup(t.Context()))
	require.Equal(t, []string{"1"}, names(t, filepath.Join(root, "snapshots")))
	require.Empty(t, names(t, filepath.Join(root, "roots")))
}

// lazyImage is an image in a registry, and its archive in root.
func lazyImage(t *testing.T, root string) (*testutil.Image, string) {
	t.Helper()
	img, ref, _ := lazyImageAt(t, root)
	return img, ref
}

// lazyImageAt returns what takes the registry away, too.
func lazyImageAt(t *testing.T, root string) (_ *testutil.Image, ref string, away func()) {
	t.Helper()
	img := testutil.NewImage(t,
		testutil.Tar(t, testutil.File{Name: "low", Data: "of the lower layer"}, testutil.File{Name: "both", Data: "old"}),
		testutil.Tar(t, testutil.File{Name: "both", Data: "new"}))
	ref, away = publishImage(t, root, img)
	return img, ref, away
}

// publishImage puts the image into a registry of its own, and its archive into root.
func publishImage(t *testing.T, root string, img *testutil.Image) (ref string, away func()) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	host := strings.TrimPrefix(srv.URL, "http://")
	img.Push(t, host, "team/app")
	require.NoError(t, os.MkdirAll(filepath.Join(root, "archives"), 0o700))
	ref = host + "/team/app:1"
	img.WriteArchive(t, filepath.Join(root, "archives", "a.clip"), ref)
	return ref, srv.Close
}

// pull prepares the image's layers as containerd's unpacker does and returns
// the name of the topmost snapshot.
func pull(t *testing.T, sn *Snapshotter, img *testutil.Image, ref string) string {
	t.Helper()
	return pullWith(t.Context(), t, sn, img, ref)
}

func pullWith(ctx context.Context, t *testing.T, sn *Snapshotter, img *testutil.Image, ref string) string {
	t.Helper()
	parent := ""
	for _, chain := range identity.ChainIDs(append([]digest.Digest(nil), img.DiffIDs...)) {
		_, err := sn.Prepare(ctx, "extract "+chain.String(), parent, snapshots.WithLabels(map[string]string{
			snapshots.LabelSnapshotRef:                   chain.String(),
			"containerd.io/snapshot/cri.image-ref":       ref,
			"containerd.io/snapshot/cri.manifest-digest": img.Descriptor.Digest.String(),
		}))
		require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
		found := walk(t, sn, chain.String(), parent)
		require.Len(t, found, 1)
		require.Equal(t, snapshots.KindCommitted, found[0].Kind)
		require.Equal(t, "true", found[0].Labels[discover.LabelLazy])
		require.Equal(t, parent, found[0].Parent)
		require.Equal(t, chain.String(), found[0].Labels[snapshots.LabelSnapshotRef])
		parent = found[0].Name
	}
	return parent
}

func requireRead(t *testing.T, mounts []mount.Mount) {
	t.Helper()
	require.NoError(t, mount.WithTempMount(t.Context(), mounts, func(root string) error {
		for name, want := range map[string]string{"low": "of the lower layer", "both": "new"} {
			got, err := os.ReadFile(filepath.Join(root, name))
			require.NoError(t, err)
			require.Equal(t, want, string(got))
		}
		return nil
	}))
}

func TestLazySnapshots(t *testing.T) {
	for _, mode := range []root.Mode{root.File, root.Loop, root.FUSE} {
		t.Run(string(mode), func(t *testing.T) { testLazySnapshots(t, mode) })
	}
}

func testLazySnapshots(t *testing.T, mode root.Mode) {
	root := t.TempDir()
	img, ref := lazyImage(t, root)
	sn := openMode(t, root, mode)
	can, err := sn.able.known()
	require.NoError(t, err)
	require.Equal(t, mode, can.Mode)
	top := pull(t, sn, img, ref)
	require.Equal(t, top, pull(t, sn, img, ref), "pulled again")
	mounts, err := sn.Prepare(t.Context(), "container", top)
	require.NoError(t, err)
	requireRead(t, mounts)
	usage, err := sn.Usage(t.Context(), top)
	require.NoError(t, err)
	require.NotZero(t, usage.Size)
	require.NoError(t, sn.Close())
	require.Zero(t, mountsBelow(t, root))

	sn = openMode(t, root, mode)
	mounts, err = sn.Mounts(t.Context(), "container")
	require.NoError(t, err)
	requireRead(t, mounts)
	require.Len(t, names(t, filepath.Join(root, "layers")), 2)

	require.ErrorIs(t, sn.Remove(t.Context(), top), errdefs.ErrFailedPrecondition, "a container stands on it")
	require.NoError(t, sn.Remove(t.Context(), "container"))
	info, err := sn.Stat(t.Context(), top)
	require.NoError(t, err)
	require.NoError(t, sn.Remove(t.Context(), top))
	require.Len(t, names(t, filepath.Join(root, "layers")), 1, "the lower snapshot uses its layer")
	require.NoError(t, sn.Remove(t.Context(), info.Parent))
	for _, dir := range []string{"layers", "roots", "snapshots"} {
		require.Empty(t, names(t, filepath.Join(root, dir)), dir)
	}
	require.Zero(t, mountsBelow(t, root))
}

// requireComplete waits for all layers to be read without the daemon.
func requireComplete(t *testing.T, sn *Snapshotter, img *testutil.Image) {
	t.Helper()
	for _, diffID := range img.DiffIDs {
		require.Eventually(t, func() bool {
			l, _, release, err := sn.layerOf(diffID, root.File)
			require.NoError(t, err)
			release()
			return filepath.Dir(filepath.Dir(l.Device)) == filepath.Join(sn.dir, "layers")
		}, time.Minute, 10*time.Millisecond)
	}
}

// TestCompleteLayersAreDevices fills the layers and takes the registry away for
// good: what is mounted then needs nothing but the kernel.
func TestCompleteLayersAreDevices(t *testing.T) {
	root := t.TempDir()
	img, ref, away := lazyImageAt(t, root)
	sn, err := New(t.Context(), Options{Root: root, Fill: fill.Options{Workers: 2}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sn.Close()) })
	top := pull(t, sn, img, ref)
	requireComplete(t, sn, img)
	for _, state := range sn.filler.State() {
		require.Equal(t, state.Total, state.Done)
	}
	require.Len(t, sn.filler.State(), 2)
	away()
	mounts, err := sn.Prepare(t.Context(), "container", top)
	require.NoError(t, err)
	requireRead(t, mounts)
	require.NoError(t, sn.Close())

	sn = open(t, root)
	require.Eventually(t, func() bool { return len(sn.filler.State()) == 2 }, time.Minute, 10*time.Millisecond)
	mounts, err = sn.Mounts(t.Context(), "container")
	require.NoError(t, err)
	requireRead(t, mounts)
	require.NoError(t, sn.Remove(t.Context(), "container"))
	require.NoError(t, sn.Remove(t.Context(), top))
	require.Len(t, sn.filler.State(), 1)
}

// TestUsage adds up to what is on disk, whoever shares it.
func TestUsage(t *testing.T) {
	root := t.TempDir()
	img, ref := lazyImage(t, root)
	sn := open(t, root)
	top := pull(t, sn, img, ref)
	mounts, err := sn.Prepare(t.Context(), "container", top)
	require.NoError(t, err)
	requireRead(t, mounts)
	requireComplete(t, sn, img) // from now on nothing changes
	// Another chain with the same topmost layer.
	other := chain{ChainID: img.DiffIDs[1], Layers: img.DiffIDs[1:], Image: ref}
	sn.gate.RLock()
	_, err = sn.commitLazy(t.Context(), []lazySnapshot{{name: "other", chain: other}})
	sn.gate.RUnlock()
	require.NoError(t, err)

	var sum, layers int64 // what is said, what is there
	require.NoError(t, sn.Walk(t.Context(), func(ctx context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindCommitted {
			usage, err := sn.Usage(ctx, info.Name)
			require.NoError(t, err)
			require.Positive(t, usage.Size, info.Name)
			require.Positive(t, usage.Inodes, info.Name)
			sum += usage.Size
		}
		return nil
	}))
	for _, pattern := range []string{"layers/*", "snapshots/[124]"} { // 3 is the container
		dirs, err := filepath.Glob(filepath.Join(root, pattern))
		require.NoError(t, err)
		for _, dir := range dirs {
			du, err := fs.DiskUsage(t.Context(), dir)
			require.NoError(t, err)
			layers += du.Size
		}
	}
	st, err := os.Stat(sn.root("2", chain{}).Image())
	require.NoError(t, err)
	layers += st.Sys().(*syscall.Stat_t).Blocks * 512
	require.Equal(t, layers, sum)
	small, err := sn.Usage(t.Context(), "other")
	require.NoError(t, err)
	require.Less(t, small.Size, int64(16<<10), "its layer counts elsewhere")
}

// TestNoArchive unpacks, and says why.
func TestNoArchive(t *testing.T) {
	sn := open(t, t.TempDir())
	_, err := sn.Prepare(t.Context(), "extract", "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef:                   digest.FromString("chain").String(),
		"containerd.io/snapshot/cri.manifest-digest": digest.FromString("manifest").String(),
	}))
	require.NoError(t, err)
	info, err := sn.Stat(t.Context(), "extract")
	require.NoError(t, err)
	require.Contains(t, info.Labels[discover.LabelNotLazy], "not found")
	require.Empty(t, info.Labels[discover.LabelLazy])
	reason := info.Labels[discover.LabelNotLazy]
	require.NoError(t, sn.Commit(t.Context(), "layer", "extract", snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "now"})))
	info, err = sn.Stat(t.Context(), "layer")
	require.NoError(t, err)
	require.Equal(t, map[string]string{"containerd.io/gc.root": "now", discover.LabelNotLazy: reason}, info.Labels, "the reason outlasts the unpacking")
	require.Len(t, shorten(strings.Repeat("x", 5000)), 1003)
}

// TestRebase has containerd unpack layers without their parents, as it does for
// a snapshotter that says it can rebase.
func TestRebase(t *testing.T) {
	sn := open(t, t.TempDir())
	_, err := sn.Prepare(t.Context(), "extract", "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef:    digest.FromString("chain").String(),
		snapshots.LabelSnapshotDiffID: digest.FromString("second layer").String(),
	}))
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "rebase")
	for _, key := range []string{"lower", "upper"} {
		_, err = sn.Prepare(t.Context(), key, "")
		require.NoError(t, err)
	}
	require.NoError(t, sn.Commit(t.Context(), "base", "lower"))
	err = sn.Commit(t.Context(), "top", "upper", snapshots.WithParent("base"))
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	_, err = sn.Stat(t.Context(), "top")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

// TestNeverStaged prepares layers that are to be unpacked, on nothing, on an
// ordinary layer and on a lazy one. Since 2.4, containerd commits what it is
// given a read-only mount for without unpacking anything into it.
func TestNeverStaged(t *testing.T) {
	dir := t.TempDir()
	sn := open(t, dir)
	img, ref := lazyImage(t, dir)
	lazy := pull(t, sn, img, ref)
	_, err := sn.Prepare(t.Context(), "extract", "")
	require.NoError(t, err)
	require.NoError(t, sn.Commit(t.Context(), "ordinary", "extract"))
	for _, parent := range []string{"", "ordinary", lazy} {
		mounts, err := sn.Prepare(t.Context(), "on "+parent, parent, snapshots.WithLabels(map[string]string{
			snapshots.LabelSnapshotRef:                   digest.FromString("chain on " + parent).String(),
			"containerd.io/snapshot/cri.manifest-digest": digest.FromString("manifest").String(),
		}))
		require.NoError(t, err)
		require.False(t, mounts[len(mounts)-1].ReadOnly(), "on %q", parent)
		require.NoError(t, sn.Remove(t.Context(), "on "+parent))
	}
}

// TestMachineThatCannotMount unpacks everything, and says why: EROFS takes no
// file on tmpfs as its image.
func TestMachineThatCannotMount(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, (&mount.Mount{Type: "tmpfs", Source: "tmpfs"}).Mount(dir))
	t.Cleanup(func() { require.NoError(t, mount.UnmountAll(dir, 0)) })
	sn, err := New(t.Context(), Options{Root: dir, Mount: root.File})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sn.Close()) })
	_, err = sn.able.known()
	require.ErrorContains(t, err, "not on overlayfs or tmpfs")
	mounts, err := sn.Prepare(t.Context(), "extract", "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef:                   digest.FromString("chain").String(),
		"containerd.io/snapshot/cri.manifest-digest": digest.FromString("manifest").String(),
	}))
	require.NoError(t, err)
	require.Contains(t, mounts[0].Options, "rw")
	info, err := sn.Stat(t.Context(), "extract")
	require.NoError(t, err)
	require.Contains(t, info.Labels[discover.LabelNotLazy], "cannot mount lazy roots")
	require.Empty(t, names(t, filepath.Join(dir, "roots")), "the probe leaves nothing")
}

func TestRefs(t *testing.T) {
	a, b, c := digest.FromString("a"), digest.FromString("b"), digest.FromString("c")
	type step struct {
		add    []digest.Digest // drop if nil
		id     string
		unused []digest.Digest
		used   []digest.Digest
	}
	for name, steps := range map[string][]step{
		"one":           {{add: []digest.Digest{a, b}, id: "1", used: []digest.Digest{a, b}}, {id: "1", unused: []digest.Digest{a, b}}},
		"unknown":       {{id: "1"}},
		"dropped twice": {{add: []digest.Digest{a}, id: "1", used: []digest.Digest{a}}, {id: "1", unused: []digest.Digest{a}}, {id: "1"}},
		"shared": {
			{add: []digest.Digest{a}, id: "1", used: []digest.Digest{a}},
			{add: []digest.Digest{a, b}, id: "2", used: []digest.Digest{a, b}},
			{add: []digest.Digest{a, c}, id: "3", used: []digest.Digest{a, b, c}},
			{id: "1", used: []digest.Digest{a, b, c}},
			{id: "2", unused: []digest.Digest{b}, used: []digest.Digest{a, c}},
			{id: "3", unused: []digest.Digest{a, c}},
		},
		"same layer twice": {{add: []digest.Digest{a, a}, id: "1", used: []digest.Digest{a}}, {id: "1", unused: []digest.Digest{a}}},
	} {
		t.Run(name, func(t *testing.T) {
			var r refs
			for i, s := range steps {
				if s.add != nil {
					r.add(s.id, s.add)
				} else {
					require.Equal(t, s.unused, r.drop(s.id), "step %d", i)
				}
				for _, d := range []digest.Digest{a, b, c} {
					want := false
					for _, u := range s.used {
						want = want || u == d
					}
					require.Equal(t, want, r.used(d), "step %d", i)
				}
			}
		})
	}
}
