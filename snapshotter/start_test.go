package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// prepareFirst asks for the lowest layer of an image.
func prepareFirst(t *testing.T, sn *Snapshotter, img *testutil.Image, ref string) {
	t.Helper()
	_, err := sn.Prepare(t.Context(), "extract", "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef:             img.DiffIDs[0].String(),
		snapshots.LabelSnapshotDiffID:          img.DiffIDs[0].String(),
		snapshotters.TargetRefLabel:            ref,
		snapshotters.TargetManifestDigestLabel: img.Descriptor.Digest.String(),
		snapshotters.TargetImageLayersLabel:    img.Layers[0].Digest.String() + "," + img.Layers[1].Digest.String(),
	}))
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
}

// all returns the snapshots by name.
func all(t *testing.T, sn *Snapshotter) map[string]snapshots.Info {
	t.Helper()
	found := map[string]snapshots.Info{}
	require.NoError(t, sn.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		found[info.Name] = info
		return nil
	}))
	return found
}

// TestMadeTogether makes the snapshots of all layers when containerd asks for the
// first, and again what it has removed because it did not know it yet.
func TestMadeTogether(t *testing.T) {
	dir := t.TempDir()
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	prepareFirst(t, sn, img, ref)
	chainID := identity.ChainID(img.DiffIDs)
	low := lazyName(img.DiffIDs[0], "")
	high := lazyName(chainID, low)
	made := all(t, sn)
	require.Len(t, made, 2)
	require.Equal(t, low, made[high].Parent)
	require.Equal(t, snapshots.KindCommitted, made[high].Kind)
	require.Equal(t, map[string]string{
		snapshots.LabelSnapshotRef:             chainID.String(),
		snapshotters.TargetRefLabel:            ref,
		snapshotters.TargetManifestDigestLabel: img.Descriptor.Digest.String(),
		discover.LabelLazy:                     "true",
	}, made[high].Labels)
	require.NotEmpty(t, made[low].Labels[snapshotters.TargetImageLayersLabel])

	require.NoError(t, sn.Remove(t.Context(), high))
	require.Equal(t, high, pull(t, sn, img, ref))
	mounts, err := sn.Prepare(t.Context(), "container", high)
	require.NoError(t, err)
	requireRead(t, mounts)
}

// TestMadeAsFarAsAgreed leaves alone a layer of which containerd names another blob.
func TestMadeAsFarAsAgreed(t *testing.T) {
	dir := t.TempDir()
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	_, err := sn.Prepare(t.Context(), "extract", "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef:             img.DiffIDs[0].String(),
		snapshotters.TargetRefLabel:            ref,
		snapshotters.TargetManifestDigestLabel: img.Descriptor.Digest.String(),
		snapshotters.TargetImageLayersLabel:    img.Layers[0].Digest.String() + "," + img.DiffIDs[1].String(),
	}))
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	require.Len(t, all(t, sn), 1)
}

// TestCommitTogether makes all or nothing, and leaves alone what is there.
func TestCommitTogether(t *testing.T) {
	dir := t.TempDir()
	img, _ := lazyImage(t, dir)
	sn := open(t, dir)
	sn.gate.RLock()
	defer sn.gate.RUnlock()
	c := chain{ChainID: img.DiffIDs[0], Layers: img.DiffIDs[:1]}
	_, err := sn.commitLazy(t.Context(), []lazySnapshot{{name: "a", chain: c}, {name: "b", parent: "nobody", chain: c}})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.Empty(t, all(t, sn))
	require.Empty(t, names(t, filepath.Join(dir, "snapshots")))
	require.False(t, sn.refs.used(c.ChainID))

	ids, err := sn.commitLazy(t.Context(), []lazySnapshot{{name: "a", chain: c}})
	require.NoError(t, err)
	more, err := sn.commitLazy(t.Context(), []lazySnapshot{{name: "a", chain: c}, {name: "b", parent: "a", chain: c}})
	require.NoError(t, err)
	require.Len(t, more, 1)
	require.ElementsMatch(t, append(ids, more...), names(t, filepath.Join(dir, "snapshots")))
	require.Equal(t, "a", all(t, sn)["b"].Parent)
}

// TestRefused unpacks an image of which it knows that its layers make no root.
func TestRefused(t *testing.T) {
	dir := t.TempDir()
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	sn.refused[img.Descriptor.Digest] = tree.ErrInvalid
	mounts, err := sn.Prepare(t.Context(), "extract", "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef:             img.DiffIDs[0].String(),
		snapshotters.TargetRefLabel:            ref,
		snapshotters.TargetManifestDigestLabel: img.Descriptor.Digest.String(),
	}))
	require.NoError(t, err)
	require.NotEmpty(t, mounts)
	require.Contains(t, all(t, sn)["extract"].Labels[discover.LabelNotLazy], tree.ErrInvalid.Error())
	require.Empty(t, names(t, filepath.Join(dir, "layers")))
}

func TestStartFiles(t *testing.T) {
	file := func(size int64) *tree.Node { return &tree.Node{Mode: unix.S_IFREG | 0o755, Size: size} }
	dir := func(children ...tree.Dirent) *tree.Node { return &tree.Node{Mode: unix.S_IFDIR, Children: children} }
	loader, cache, passwd := file(1), file(2), file(3)
	app, python, large, script := file(10), file(11), file(mostOfFile+1), file(12)
	root := dir(
		tree.Dirent{Name: "etc", Node: dir(tree.Dirent{Name: "ld.so.cache", Node: cache}, tree.Dirent{Name: "passwd", Node: passwd})},
		tree.Dirent{Name: "lib64", Node: &tree.Node{Mode: unix.S_IFLNK, Target: "usr/lib64"}},
		tree.Dirent{Name: "srv", Node: dir(tree.Dirent{Name: "run.sh", Node: script})},
		tree.Dirent{Name: "usr", Node: dir(
			tree.Dirent{Name: "bin", Node: dir(tree.Dirent{Name: "app", Node: app}, tree.Dirent{Name: "large", Node: large}, tree.Dirent{Name: "python3", Node: python})},
			tree.Dirent{Name: "lib64", Node: dir(tree.Dirent{Name: "ld-linux-x86-64.so.2", Node: loader})})},
	)
	common := []*tree.Node{loader, cache, passwd}
	path := []string{"HOME=/", "PATH=/nowhere:/usr/bin"}
	for name, c := range map[string]struct {
		config ocispec.ImageConfig
		want   *tree.Node
	}{
		"nothing":             {},
		"absolute":            {ocispec.ImageConfig{Entrypoint: []string{"/usr/bin/app", "x"}, Cmd: []string{"python3"}}, app},
		"of PATH":             {ocispec.ImageConfig{Cmd: []string{"python3", "-c"}, Env: path}, python},
		"without PATH":        {ocispec.ImageConfig{Cmd: []string{"python3"}}, nil},
		"relative":            {ocispec.ImageConfig{Entrypoint: []string{"./run.sh"}, WorkingDir: "/srv"}, script},
		"too large":           {ocispec.ImageConfig{Entrypoint: []string{"large"}, Env: path}, nil},
		"a directory":         {ocispec.ImageConfig{Entrypoint: []string{"/etc"}}, nil},
		"far back in PATH":    {ocispec.ImageConfig{Entrypoint: []string{"app"}, Env: []string{"PATH=" + strings.Repeat("/x:", mostDirs-1) + "/usr/bin:/usr/bin"}}, app},
		"too far back":        {ocispec.ImageConfig{Entrypoint: []string{"app"}, Env: []string{"PATH=" + strings.Repeat("/x:", mostDirs) + "/usr/bin"}}, nil},
		"not there":           {ocispec.ImageConfig{Entrypoint: []string{"/usr/bin/none"}}, nil},
		"fetched without it":  {ocispec.ImageConfig{Entrypoint: []string{"/etc/passwd"}}, nil},
		"an empty entrypoint": {ocispec.ImageConfig{Entrypoint: []string{""}, Env: path}, nil},
	} {
		want := common
		if c.want != nil {
			want = append(common[:len(common):len(common)], c.want)
		}
		got := startFiles(testutil.JSON(t, ocispec.Image{Config: c.config}), root)
		require.Len(t, got, len(want), name)
		for i := range want {
			require.Same(t, want[i], got[i], name)
		}
	}
	require.Len(t, startFiles([]byte("no JSON"), root), len(common))
}

// TestStartIsFetched has what every start reads as soon as a container is made, and
// nothing else; a pull alone fetches nothing.
func TestStartIsFetched(t *testing.T) {
	for name, prefetch := range map[string]bool{"on": true, "off": false} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			img := testutil.NewImage(t,
				testutil.Tar(t, testutil.File{Name: "other", Data: noise(4 << 20)}),
				testutil.Tar(t, testutil.File{Name: "etc/passwd", Data: "root:x:0:0::/:/bin/sh\n"}))
			ref, _ := publishImage(t, dir, img)
			sn, err := New(t.Context(), Options{Root: dir, Prefetch: prefetch, Fill: fill.Options{Workers: 1, ListsOnly: true}})
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, sn.Close()) })
			top := pull(t, sn, img, ref)
			low, err := sn.layers.Layer(img.DiffIDs[0])
			require.NoError(t, err)
			high, err := sn.layers.Layer(img.DiffIDs[1])
			require.NoError(t, err)
			require.Never(t, func() bool { return high.Fetched() > 0 }, 200*time.Millisecond, 20*time.Millisecond)
			_, err = sn.Prepare(t.Context(), "container", top)
			require.NoError(t, err)
			if prefetch {
				require.Eventually(t, func() bool { return high.Fetched() == high.Size() }, time.Minute, 10*time.Millisecond)
			} else {
				time.Sleep(200 * time.Millisecond)
				require.Zero(t, high.Fetched())
			}
			require.Zero(t, low.Fetched())
		})
	}
}

// TestBuiltEarly builds the root of an archive that is still coming, which becomes
// that of the snapshot, or nobody's.
func TestBuiltEarly(t *testing.T) {
	dir := t.TempDir()
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	a, err := archive.OpenFile(filepath.Join(dir, "archives", "a.clip"))
	require.NoError(t, err)
	defer a.Close()

	forget := sn.mergeEarly(a)
	is, err := sn.merge(a)
	require.NoError(t, err)
	require.NotNil(t, is.root.Lookup("/low"))
	<-is.ahead.done
	require.Equal(t, []string{filepath.Base(is.ahead.dir)}, names(t, filepath.Join(dir, earlyDir)))
	require.NoError(t, sn.Cleanup(t.Context()), "which finds no garbage")
	require.Len(t, names(t, filepath.Join(dir, earlyDir)), 1)
	forget()
	require.Empty(t, sn.early)
	require.Empty(t, names(t, filepath.Join(dir, earlyDir)))

	forget = sn.mergeEarly(a)
	is, err = sn.merge(a)
	require.NoError(t, err)
	top := pull(t, sn, img, ref) // finds the same archive by itself
	c, err := sn.chain("2")
	require.NoError(t, err)
	built := sn.root("2", c)
	sn.background.Wait()
	require.NoError(t, os.RemoveAll(built.Dir))
	sn.buildAhead(t.Context(), "2", c, is, root.File)
	forget()
	sn.background.Wait()
	require.Equal(t, []string{"2"}, names(t, filepath.Join(dir, "roots")))
	require.NoDirExists(t, is.ahead.dir)
	mounts, err := sn.Prepare(t.Context(), "container", top)
	require.NoError(t, err)
	requireRead(t, mounts)
}

// TestRepairBuildsNoRoot has repairs, which need what is in an archive and no root of it.
func TestRepairBuildsNoRoot(t *testing.T) {
	dir := t.TempDir()
	img, ref := lazyImage(t, dir)
	sn := open(t, dir)
	pull(t, sn, img, ref)
	c, err := sn.chain("2")
	require.NoError(t, err)
	c.Link = linkArchive(t, filepath.Join(dir, "archives", "a.clip"), img, ref)
	image := discover.Image{Ref: ref, Manifest: c.Manifest, Link: c.Link}
	for name, repair := range map[string]func() error{
		"layers": func() error { return sn.repair(t.Context(), c) },
		"chain":  func() error { _, err := sn.fetchChain(t.Context(), "2", c); return err },
	} {
		require.NoError(t, repair(), name)
		require.Empty(t, sn.early, name)
		require.Never(t, func() bool {
			built, _ := filepath.Glob(filepath.Join(dir, earlyDir, "*")) // the pattern is right
			return len(built) > 0
		}, 200*time.Millisecond, 10*time.Millisecond, name)
		sn.finder.Forget(image)
	}
	_, release, err := sn.finder.FindEarly(t.Context(), image, sn.mergeEarly)
	require.NoError(t, err)
	release()
	require.Len(t, sn.early, 1, "that archive comes in parts, and a pull would build its root")
}

// linkArchive puts the archive at path into the registry of ref, in parts, and
// returns what the image would name it by.
func linkArchive(t *testing.T, path string, img *testutil.Image, ref string) digest.Digest {
	t.Helper()
	a, err := archive.OpenFile(path)
	require.NoError(t, err)
	defer a.Close()
	blob, parts, err := a.Compress()
	require.NoError(t, err)
	desc := ocispec.Descriptor{MediaType: archive.MediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob)),
		Annotations: map[string]string{archive.AnnotationParts: string(testutil.JSON(t, parts))}}
	raw := testutil.JSON(t, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: archive.ArtifactType, Subject: &img.Descriptor,
		Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{desc},
	})
	host, _, _ := strings.Cut(ref, "/")
	testutil.PutBlob(t, host, "team/app", desc.Digest, blob)
	testutil.PutBlob(t, host, "team/app", ocispec.DescriptorEmptyJSON.Digest, ocispec.DescriptorEmptyJSON.Data)
	link := digest.FromBytes(raw)
	testutil.PutManifest(t, host, "team/app", link.String(), ocispec.MediaTypeImageManifest, raw)
	return link
}
