package e2e

import (
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	containerdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// requireLayout has go-containerregistry read a layout, and checks all blobs: it would take every layer for gzip.
func requireLayout(t *testing.T, dir string) {
	t.Helper()
	p, err := layout.FromPath(dir)
	require.NoError(t, err)
	x, err := p.ImageIndex()
	require.NoError(t, err)
	require.NoError(t, validate.Index(x, validate.Fast))
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	require.NoError(t, err)
	for _, file := range blobs {
		b, err := os.ReadFile(file)
		require.NoError(t, err)
		require.Equal(t, filepath.Base(file), digest.FromBytes(b).Encoded())
	}
}

// TestExport writes images out of containerd's store into one layout and into tars. Others can use them: containerd
// imports the tars, BuildKit builds from the layout, and we index both. Nobody asks the registry.
func TestExport(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	dir, file := w.lab.Path("layout"), w.lab.Path("image.tar")
	w.registry.Reset()
	for _, name := range []string{images.SmallName, images.SiblingName} {
		_, err := w.builder.Clipctl(w.ctx, "export", w.ref(name), dir)
		require.NoError(t, err)
	}
	requireLayout(t, dir)
	w.requireShared(w.builder, dir)
	_, err := w.builder.Clipctl(w.ctx, "export", ref, file)
	require.NoError(t, err)

	stock := w.stock()
	w.ctr(stock, "image", "import", file)
	require.Equal(t, "hello from clip\n", w.run(stock, eager, ref, "sh", "/app/run.sh"))
	require.Equal(t, w.manifest(w.builder, ref), w.manifest(stock, ref))

	const built = "example.com/built/app:1"
	b, err := w.lab.StartBuildkit(w.ctx, "buildkit", stock, eager, w.registry)
	require.NoError(t, err)
	dockerfile := w.dockerfile("FROM base\nRUN echo built > /app/name\n")
	_, err = b.BuildWith(w.ctx, dockerfile, "type=image,name="+built, "--oci-layout", "base="+dir,
		"--opt", "context:base=oci-layout://base@"+w.subject(ref, runtime.GOARCH).Digest.String())
	require.NoError(t, err)
	require.Equal(t, "hello from built\n", w.run(stock, eager, built, "sh", "/app/run.sh"))

	var archives []string
	for _, source := range []string{ref, "oci:" + dir + ":" + ref, "oci-archive:" + file} {
		out := w.lab.Path("a.clip")
		_, err := w.builder.Clipctl(w.ctx, "index", source, "--storage-ref", ref, "-o", out)
		require.NoError(t, err)
		b, err := os.ReadFile(out)
		require.NoError(t, err)
		archives = append(archives, digest.FromBytes(b).String())
	}
	require.Equal(t, archives[0], archives[1])
	require.Equal(t, archives[0], archives[2])
	require.Empty(t, w.registry.Requests())
}

// TestExportToTools has skopeo and crane copy what was exported to a registry: one image of several in a layout, a tar,
// and an image for two platforms. The digests stay, and the registry, which checks blobs, has all of them.
func TestExportToTools(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publish(images.PlatformName)
	small, both := w.ref(images.SmallName), w.ref(images.PlatformName)
	shared, single, multi, file := w.lab.Path("shared"), w.lab.Path("single"), w.lab.Path("multi"), w.lab.Path("image.tar")
	for _, args := range [][]string{
		{small, shared}, {w.ref(images.SiblingName), shared, "--name", "example.com/sibling:2"},
		{small, single}, {both, multi, "--all-platforms"}, {small, file},
	} {
		_, err := w.builder.Clipctl(w.ctx, append([]string{"export"}, args...)...)
		require.NoError(t, err)
	}
	skopeo := func(args ...string) []string {
		return append([]string{"skopeo", "--insecure-policy", "copy", "--preserve-digests", "--dest-tls-verify=false"}, args...)
	}
	one, all := w.subject(small, runtime.GOARCH).Digest.String(), w.image(w.builder, both).Target.Digest.String()
	for to, c := range map[string]struct {
		command []string
		want    string
	}{
		"skopeo/shared:1": {skopeo("oci:" + shared + ":1"), one},
		"skopeo/file:1":   {skopeo("oci-archive:" + file + ":1"), one},
		"skopeo/multi:1":  {skopeo("--all", "oci:"+multi), all},
		"crane/single:1":  {[]string{"crane", "push", single}, one},
		"crane/multi:1":   {[]string{"crane", "push", multi}, all},
	} {
		ref := w.registry.Ref(to)
		dst := ref
		if c.command[0] == "skopeo" {
			dst = "docker://" + ref
		}
		_, err := w.lab.Run(w.ctx, c.command[0], append(c.command[1:], dst)...)
		require.NoError(t, err)
		got, err := w.lab.Run(w.ctx, "crane", "digest", ref)
		require.NoError(t, err)
		require.Equal(t, c.want, strings.TrimSpace(got.Stdout), to)
		_, err = w.lab.Run(w.ctx, "crane", "validate", "--fast", "--remote", ref) // else it takes every layer for gzip
		require.NoError(t, err)
	}

	stock := w.stock()
	ref := w.registry.Ref("skopeo/shared:1")
	w.pull(stock, eager, ref)
	require.Equal(t, "hello from clip\n", w.run(stock, eager, ref, "sh", "/app/run.sh"))
}

// dockerfile makes a build context of a Dockerfile alone.
func (w *world) dockerfile(text string) string {
	w.Helper()
	dir, err := os.MkdirTemp(w.lab.Dir, "context-")
	require.NoError(w, err)
	require.NoError(w, os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644))
	return dir
}

// image is an image record of a containerd.
func (w *world) image(c *harness.Containerd, ref string) containerdimages.Image {
	w.Helper()
	image, err := c.Client().ImageService().Get(w.ctx, ref)
	require.NoError(w, err)
	return image
}

// TestExportClones exports on a file system that can clone files: what is exported takes no room, and whoever writes to
// it spoils nothing. With --copy it takes room.
func TestExportClones(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	dir, image := w.lab.Path("xfs"), w.lab.Path("xfs.img")
	require.NoError(t, os.Mkdir(dir, 0o755))
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 512<<20))
	for _, args := range [][]string{{"mkfs.xfs", "-q", "-m", "reflink=1", image}, {"mount", "-o", "loop", image, dir}} {
		_, err := w.lab.Run(w.ctx, args[0], args[1:]...)
		require.NoError(t, err)
	}
	store, clones, copies := filepath.Join(dir, "store"), filepath.Join(dir, "clones"), filepath.Join(dir, "copies")
	_, err := w.builder.Clipctl(w.ctx, "export", images.SmallName, store)
	require.NoError(t, err)
	used := func() int64 {
		var st unix.Statfs_t
		unix.Sync()
		require.NoError(t, unix.Statfs(dir, &st))
		return int64(st.Blocks-st.Bfree) * st.Bsize
	}
	size, before := w.size(images.SmallName), used()
	result, err := w.builder.Clipctl(w.ctx, "export", "oci:"+store, clones)
	require.NoError(t, err)
	require.Contains(t, result.Stdout, "7 shared")
	requireLayout(t, clones)
	require.Less(t, used()-before, size/2, "it shares what is there")
	blob := strings.Replace(w.layers(images.SmallName)[0], ":", "/", 1)
	var a, b unix.Stat_t
	require.NoError(t, unix.Stat(filepath.Join(store, "blobs", blob), &a))
	require.NoError(t, unix.Stat(filepath.Join(clones, "blobs", blob), &b))
	require.NotEqual(t, a.Ino, b.Ino, "it is no link")

	before = used()
	result, err = w.builder.Clipctl(w.ctx, "export", "oci:"+store, copies, "--copy")
	require.NoError(t, err)
	require.Contains(t, result.Stdout, "0 shared")
	require.Greater(t, used()-before, size/2)
}

// requireShared has the layers of the small image in a layout be links to a containerd's files, or clones of them.
func (w *world) requireShared(c *harness.Containerd, dir string) {
	w.Helper()
	for _, l := range w.layers(images.SmallName) {
		var a, b unix.Stat_t
		require.NoError(w, unix.Stat(c.ContentPath(l), &a))
		require.NoError(w, unix.Stat(filepath.Join(dir, "blobs", strings.Replace(l, ":", "/", 1)), &b))
		require.Equal(w, a.Size, b.Size)
		if a.Ino != b.Ino {
			requireClones(w.T, w.lab.Dir)
		}
	}
}

// requireClones fails where files cannot be cloned: blobs must be hard links then.
func requireClones(t *testing.T, dir string) {
	t.Helper()
	src, err := os.CreateTemp(dir, "src")
	require.NoError(t, err)
	defer src.Close()
	dst, err := os.CreateTemp(dir, "dst")
	require.NoError(t, err)
	defer dst.Close()
	require.NoError(t, unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())), "blobs are neither clones nor links")
}

// TestExportPlatforms exports one of two platforms, with no blob of the other, and both.
func TestExportPlatforms(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publish(images.PlatformName)
	ref := w.ref(images.PlatformName)
	target := w.image(w.builder, ref).Target.Digest
	blobs := map[string][]string{"--all-platforms": {target.Encoded()}}
	for _, arch := range []string{"amd64", "arm64"} {
		subject := w.subject(ref, arch)
		m, err := containerdimages.Manifest(w.ctx, w.builder.Client().ContentStore(), subject, platforms.All)
		require.NoError(t, err)
		all := []string{subject.Digest.Encoded(), m.Config.Digest.Encoded()}
		for _, l := range m.Layers {
			all = append(all, l.Digest.Encoded())
		}
		blobs["--platform=linux/"+arch] = all
		blobs["--all-platforms"] = append(blobs["--all-platforms"], all...)
	}
	for platform, want := range map[string]digest.Digest{
		"--platform=linux/arm64": w.subject(ref, "arm64").Digest,
		"--platform=linux/amd64": w.subject(ref, "amd64").Digest,
		"--all-platforms":        target,
	} {
		dir := filepath.Clean(w.lab.Path("layout" + platform[2:]))
		result, err := w.builder.Clipctl(w.ctx, "export", ref, dir, platform)
		require.NoError(t, err)
		require.Contains(t, result.Stdout, want.String())
		requireLayout(t, dir)
		entries, err := os.ReadDir(filepath.Join(dir, "blobs", "sha256"))
		require.NoError(t, err)
		var found []string
		for _, e := range entries {
			found = append(found, e.Name())
		}
		slices.Sort(blobs[platform])
		require.Equal(t, slices.Compact(blobs[platform]), found, platform) // platforms may share a layer
	}
}

// TestContentEnsure pulls lazily, and then does what needs the layers: it is refused with the remedy, and works after
// the remedy.
func TestContentEnsure(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, fillLate)
	ref, layers := w.ref(images.SmallName), w.layers(images.SmallName)
	w.index(images.SmallName)
	require.Empty(t, w.pull(w.worker, lazy, ref).Gets(layers...))
	dir, file := w.lab.Path("layout"), w.lab.Path("image.tar")
	result, err := w.worker.Clipctl(w.ctx, "export", ref, dir)
	require.Error(t, err)
	requireClear(t, result.Stderr, append(layers, "clipctl content ensure")...)
	require.NoDirExists(t, dir)
	_, err = w.worker.Ctr(w.ctx, "image", "export", file, ref)
	require.Error(t, err)
	// A registry that has the layers would take them from another repository of its own.
	empty, err := w.lab.StartAnotherRegistry(w.ctx, "empty")
	require.NoError(t, err)
	elsewhere := empty.Ref("elsewhere/copy:1")
	w.ctr(w.worker, "image", "tag", ref, elsewhere)
	_, err = w.worker.Ctr(w.ctx, "image", "push", elsewhere)
	require.Error(t, err)
	require.NoFileExists(t, empty.BlobPath(layers[0]))

	// The tag moves on: what is fetched is the image that was pulled.
	w.ctr(w.builder, "image", "tag", "--force", images.BaseName, ref)
	w.ctr(w.builder, "image", "push", ref)
	w.registry.Reset()
	result, err = w.worker.Clipctl(w.ctx, "content", "ensure", ref)
	require.NoError(t, err)
	require.Len(t, w.registry.Requests().Gets(layers...), len(layers))
	require.Contains(t, result.Stdout, "0 layers were there")
	w.registry.Reset()
	result, err = w.worker.Clipctl(w.ctx, "content", "ensure", ref)
	require.NoError(t, err)
	require.Contains(t, result.Stdout, "0 blobs fetched")
	require.Empty(t, w.registry.Requests())

	_, err = w.worker.Clipctl(w.ctx, "export", ref, dir)
	require.NoError(t, err)
	requireLayout(t, dir)
	w.exportTar(w.ctx, w.worker, file, ref)
	w.ctr(w.worker, "image", "push", elsewhere)
	for _, l := range layers {
		require.FileExists(t, empty.BlobPath(l))
	}
	stock := w.stock()
	w.pull(stock, eager, elsewhere)
	require.Equal(t, "hello from clip\n", w.run(stock, eager, elsewhere, "sh", "/app/run.sh"))
	require.Equal(t, "hello from clip\n", w.run(w.worker, eager, ref, "sh", "/app/run.sh"))

	// What was fetched belongs to the image: collected with it, and not before.
	w.removeImage(w.worker, elsewhere)
	for _, l := range layers {
		require.FileExists(t, w.worker.ContentPath(l))
	}
	result, err = w.worker.Clipctl(w.ctx, "content", "ensure", "example.com/none:1")
	require.Error(t, err)
	requireClear(t, result.Stderr, "example.com/none:1")

	// One platform of two: what is fetched is what this one needs.
	w.publish(images.PlatformName)
	w.index(images.PlatformName)
	both, needed := w.ref(images.PlatformName), w.layers(images.PlatformName)
	w.removeImage(w.worker, ref) // which has the same layers
	require.Empty(t, w.pull(w.worker, lazy, both).Gets(needed...))
	_, err = w.worker.Ctr(w.ctx, "image", "export", file, both)
	require.Error(t, err)
	_, err = w.worker.Clipctl(w.ctx, "content", "ensure", both)
	require.NoError(t, err)
	other, err := containerdimages.Manifest(w.ctx, w.builder.Client().ContentStore(), w.subject(both, "arm64"), platforms.All)
	require.NoError(t, err)
	require.Len(t, w.registry.Requests().Gets(needed...), len(needed))
	require.Empty(t, w.registry.Requests().Gets(other.Layers[len(other.Layers)-1].Digest.String()))
	w.exportTar(w.ctx, w.worker, file, both)
	pushed := empty.Ref("elsewhere/platform:1")
	w.ctr(w.worker, "image", "tag", both, pushed)
	w.ctr(w.worker, "image", "push", "--local", "--platform", "linux/"+runtime.GOARCH, pushed) // alone: a registry refuses an index that it has not all of
	w.ctr(stock, "image", "import", file)
	require.Equal(t, "hello from clip\n", w.run(stock, eager, both, "sh", "/app/run.sh"))
	w.pull(stock, eager, pushed)
	require.Equal(t, "hello from clip\n", w.run(stock, eager, pushed, "sh", "/app/run.sh"))
}
