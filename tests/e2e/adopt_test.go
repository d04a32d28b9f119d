package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestUpstreamArchive runs an image of which CLIP itself made the archive: the first pull streams each layer once and
// indexes it, with everything that CLIP's own index has wrong, and what was streamed is not fetched again. Pulled again
// later, the image is as lazy as any.
func TestUpstreamArchive(t *testing.T) {
	t.Parallel()
	for name, storage := range map[string]string{"its own reference": "", "another storage reference": "registry.example.com/team/app:1"} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.publish(images.DockerName)
			ref, layers := w.ref(images.DockerName), w.layers(images.DockerName)
			archives := filepath.Join(w.daemon.Root, "archives")
			theirs := filepath.Join(archives, "theirs.clip")
			made := filepath.Join(archives, ".indexed", w.subject(ref, "").Digest.Encoded()+".clip")
			require.NoError(t, clip.SetLogLevel("disabled"))
			require.NoError(t, clip.CreateFromOCIImage(w.ctx, clip.CreateFromOCIImageOptions{
				ImageRef: ref, StorageImageRef: storage, OutputPath: theirs,
			}))

			pulled := w.pull(w.worker, lazy, ref)
			for _, l := range layers {
				require.Len(t, pulled.Gets(l), 1, "each layer is streamed once:\n%s", pulled)
			}
			require.Contains(t, w.daemon.Log(), "indexed the layers of an archive that CLIP wrote")
			require.FileExists(t, made)
			w.registry.Reset()
			require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
			w.run(w.worker, lazy, ref, "sh", "-c", "find / -xdev -type f -exec cat {} \\; | sha256sum")
			require.Empty(t, w.registry.Requests(), "what was streamed is here")

			w.removeImage(w.worker, ref)
			w.eventually("no layers", func() bool {
				left, err := os.ReadDir(filepath.Join(w.daemon.Root, "layers"))
				return err == nil && len(left) == 0
			})
			require.Empty(t, w.pull(w.worker, lazy, ref).Gets(layers...), "the next pull finds the indexes")
			w.registry.Reset()
			require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
			fetched := w.registry.Requests().Gets(layers...)
			require.NotEmpty(t, fetched)
			for _, r := range fetched {
				require.NotEmpty(t, r.Range, "reads are spans: %s", r)
			}
			stock := w.stock()
			w.pull(stock, eager, ref)
			requireSameRoot(w, stock, ref)

			require.NoError(t, os.Remove(theirs))
			require.NoError(t, w.daemon.Stop())
			require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
			w.foundAgain(w.worker)
			w.eventually("what was made goes with it", func() bool {
				_, err := os.Stat(made)
				return os.IsNotExist(err)
			})
			require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"), "the image does not need it")
		})
	}
}

// TestUpstreamShared has CLIP's archives of two images with a layer in common. It is streamed once, whichever image comes
// first, readers of both are served without a request, and so they are by another daemon.
func TestUpstreamShared(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	require.NoError(t, clip.SetLogLevel("disabled"))
	for _, name := range []string{images.PauseName, images.DockerName} {
		w.publish(name)
		w.upstreamArchive(w.ref(name), filepath.Join(w.daemon.Root, "archives", images.ShortName(name)+".clip"))
	}
	first, second := w.ref(images.PauseName), w.ref(images.DockerName)
	shared, all := w.layers(images.PauseName), w.layers(images.DockerName)
	require.Equal(t, shared, all[:1])
	require.Len(t, w.pull(w.worker, lazy, first).Gets(shared...), 1)
	pulled := w.pull(w.worker, lazy, second)
	require.Empty(t, pulled.Gets(shared...), "the other image brought it")
	for _, l := range all[1:] {
		require.Len(t, pulled.Gets(l), 1, "each layer is streamed once:\n%s", pulled)
	}
	read := func() {
		w.Helper()
		w.registry.Reset()
		for _, ref := range []string{first, second} {
			w.run(w.worker, lazy, ref, "sh", "-c", "find / -xdev -type f -exec cat {} + | md5sum")
		}
		require.Empty(t, w.registry.Requests(), "all of it is here")
	}
	read()
	require.NoError(t, w.daemon.Stop())
	require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
	w.foundAgain(w.worker)
	read()
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, second, "sh", "/app/run.sh"))
	stock := w.stock()
	w.pull(stock, eager, second)
	requireSameRoot(w, stock, second)

	// The image that brought the layer goes; the other one keeps it.
	w.removeImage(w.worker, first)
	w.registry.Reset()
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, second, "sh", "/app/run.sh"))
	require.Empty(t, w.registry.Requests())
}

// upstreamArchive has CLIP itself make the archive of an image.
func (w *world) upstreamArchive(ref, path string) {
	w.Helper()
	require.NoError(w, clip.SetLogLevel("disabled"))
	require.NoError(w, clip.CreateFromOCIImage(w.ctx, clip.CreateFromOCIImageOptions{ImageRef: ref, OutputPath: path}))
}

// TestLoadUpstream makes images out of archives that CLIP wrote: what is not in them comes from the registry, each layer
// once, and the image is the one that was built.
func TestLoadUpstream(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publish(images.DockerName)
	ref, layers, file := w.ref(images.DockerName), w.layers(images.DockerName), w.lab.Path("theirs.clip")
	w.upstreamArchive(ref, file)
	w.registry.Reset()
	result, err := w.worker.Clipctl(w.ctx, "load", file)
	require.NoError(t, err)
	require.Contains(t, result.Stdout, ref)
	requests := w.registry.Requests()
	for _, l := range layers {
		require.Len(t, requests.Gets(l), 1, "each layer is streamed once:\n%s", requests)
	}
	require.Equal(t, w.image(w.builder, ref).Target.Digest, w.image(w.worker, ref).Target.Digest)
	require.Equal(t, w.image(w.builder, ref).Target.MediaType, w.image(w.worker, ref).Target.MediaType)
	require.Equal(t, w.manifest(w.builder, ref), w.manifest(w.worker, ref))
	w.registry.Reset()
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	require.NoError(t, w.daemon.Stop())
	require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
	w.foundAgain(w.worker)
	w.ctr(w.worker, "content", "prune", "references")
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	require.Empty(t, w.registry.Requests())
	left, err := filepath.Glob(filepath.Join(w.daemon.Root, "archives", "*.clip"))
	require.NoError(t, err)
	require.Empty(t, left)
	w.removeImage(w.worker, ref)
	w.eventually("no snapshots", func() bool { return len(w.snapshots(w.ctx, w.worker, lazy)) == 0 })

	// It may be somewhere else than the archive says, or nowhere.
	elsewhere := w.lab.Path("elsewhere.clip")
	require.NoError(t, clip.CreateFromOCIImage(w.ctx, clip.CreateFromOCIImageOptions{
		ImageRef: ref, StorageImageRef: "127.0.0.1:1/team/app:1", OutputPath: elsewhere,
	}))
	_, err = w.worker.Clipctl(w.ctx, "load", elsewhere, "--from", ref, "--name", "example.com/mine:1")
	require.NoError(t, err)
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, "example.com/mine:1", "sh", "/app/run.sh"))
	w.removeImage(w.worker, "example.com/mine:1")
	info := w.upstreamInfo(file)
	metadata, err := clip.NewClipArchiver().ExtractMetadata(file)
	require.NoError(t, err)
	info.Layers = info.Layers[:2]
	other := w.lab.Path("other.clip")
	require.NoError(t, clip.NewClipArchiver().CreateRemoteArchive(info, metadata, other))
	for path, says := range map[string][]string{
		elsewhere: {"127.0.0.1:1/team/app", "connection refused", "--from"},
		other:     {"other layers", other, ref},
	} {
		result, err := w.worker.Clipctl(w.ctx, "load", path)
		require.Error(t, err)
		requireClear(t, result.Stderr, says...)
	}
	require.NotContains(t, w.ctr(w.worker, "image", "ls", "-q"), "team/app")

	_, err = w.worker.Clipctl(w.ctx, "load", file)
	require.NoError(t, err)
	stock := w.stock()
	w.pull(stock, eager, ref)
	requireSameRoot(w, stock, ref)
}

// TestUpstreamArchiveUnusable falls back to unpacking when CLIP's archive cannot be made use of, and says why.
func TestUpstreamArchiveUnusable(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publish(images.DockerName)
	ref := w.ref(images.DockerName)
	path := filepath.Join(w.daemon.Root, "archives", "theirs.clip")
	require.NoError(t, clip.SetLogLevel("disabled"))
	require.NoError(t, clip.CreateFromOCIImage(w.ctx, clip.CreateFromOCIImageOptions{ImageRef: ref, OutputPath: path}))
	metadata, err := clip.NewClipArchiver().ExtractMetadata(path)
	require.NoError(t, err)
	info := w.upstreamInfo(path)
	info.Layers[0], info.Layers[1] = info.Layers[1], info.Layers[0]
	require.NoError(t, clip.NewClipArchiver().CreateRemoteArchive(info, metadata, path))

	w.pull(w.worker, lazy, ref)
	w.requireReason(ref, "it lists other layers than the image's manifest")
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))

	// One from a newer program: log, label and status say so, and what to do.
	const newer, remedy = "format version 2", "upgrade containerd-clip, or index the image again with this version"
	require.NoError(t, os.Remove(path))
	require.NoError(t, w.daemon.Stop()) // it remembers the failure for a minute
	require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
	w.foundAgain(w.worker)
	w.removeImage(w.worker, ref)
	w.eventually("no snapshots", func() bool { return len(w.snapshots(w.ctx, w.worker, lazy)) == 0 })
	b, err := os.ReadFile(w.archive(ref))
	require.NoError(t, err)
	b[len(b)-64+8]++ // the version in the footer
	require.NoError(t, os.WriteFile(path, b, 0o600))
	w.pull(w.worker, lazy, ref)
	w.requireReason(ref, newer)
	w.requireReason(ref, remedy)
	status, err := w.worker.Clipctl(w.ctx, "status")
	require.NoError(t, err)
	require.Regexp(t, "no .*"+newer+".*"+remedy, status.Stdout)
	labels := w.ctr(w.worker, "snapshots", "--snapshotter", lazy, "info", w.chainID(w.worker, ref))
	require.Contains(t, labels, discover.LabelNotLazy)
	require.Contains(t, labels, remedy)
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
}

// TestEngineCLIP has CLIP's own indexer index an image of the local store, without the registry. What it writes works in
// CLIP and here.
func TestEngineCLIP(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publish(images.DockerName)
	ref, layers := w.ref(images.DockerName), w.layers(images.DockerName)
	file := filepath.Join(w.daemon.Root, "archives", "theirs.clip")
	w.registry.Reset()
	result, err := w.builder.Clipctl(w.ctx, "index", ref, "--engine", "clip", "-o", file)
	require.NoError(t, err)
	require.Empty(t, w.registry.Requests(), "the registry is not asked")
	require.Contains(t, result.Stdout, file)
	for i, l := range layers {
		require.Regexp(t, fmt.Sprintf("layer %d/%d %s .* indexed", i+1, len(layers), l), result.Stderr)
	}
	require.Equal(t, ref, w.upstreamInfo(file).ImageMetadata.Name)

	o := clip.MountOptions{ArchivePath: file, MountPoint: w.mountPoint(), CachePath: t.TempDir()}
	mountUpstream(t, o)
	name, err := os.ReadFile(filepath.Join(o.MountPoint, "app/name"))
	require.NoError(t, err)
	require.Equal(t, "clip\n", string(name))

	w.pull(w.worker, lazy, ref)
	require.Contains(t, w.daemon.Log(), "indexed the layers of an archive that CLIP wrote")
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))

	_, err = w.builder.Clipctl(w.ctx, "index", w.ref(images.SmallName), "--engine", "clip", "-o", w.lab.Path("no.clip"))
	require.ErrorContains(t, err, "reads gzip layers only", "one layer is not compressed")
	require.NoFileExists(t, w.lab.Path("no.clip"))
}

// TestEngineCLIPPlatforms has CLIP's own indexer index every platform of an image: an archive each, which works in CLIP
// and here where the image does.
func TestEngineCLIPPlatforms(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publish(images.GzipName)
	ref := w.ref(images.GzipName)
	at := filepath.Join(w.daemon.Root, "archives", "theirs")
	result, err := w.builder.Clipctl(w.ctx, "index", ref, "--engine", "clip", "--all-platforms", "-o", at+".clip")
	require.NoError(t, err)
	require.NoFileExists(t, at+".clip")
	for arch, own := range map[string]string{"amd64": "/app/run.sh", "arm64": "/foreign"} {
		file := at + "-linux-" + arch + ".clip"
		require.Contains(t, result.Stdout, file)
		info := w.upstreamInfo(file)
		require.Equal(t, w.subject(ref, arch).Digest.String(), info.ImageMetadata.Digest)
		require.Equal(t, arch, info.ImageMetadata.Architecture)
		require.Equal(t, ref, info.ImageMetadata.Name)
		m, err := clip.NewClipArchiver().ExtractMetadata(file)
		require.NoError(t, err)
		for _, name := range []string{"/app/run.sh", "/foreign", "/bin/busybox"} {
			require.Equal(t, name == own || name == "/bin/busybox", m.Get(name) != nil, "%s of %s", name, arch)
		}
		if arch == runtime.GOARCH {
			o := clip.MountOptions{ArchivePath: file, MountPoint: w.mountPoint(), CachePath: t.TempDir()}
			mountUpstream(t, o)
			_, err := os.ReadFile(filepath.Join(o.MountPoint, own))
			require.NoError(t, err)
		}
	}
	if runtime.GOARCH == "amd64" {
		w.pull(w.worker, lazy, ref)
		require.Contains(t, w.daemon.Log(), "indexed the layers of an archive that CLIP wrote")
		require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	}

	// What CLIP cannot index leaves no file.
	none := w.lab.Path("none")
	w.publish(images.PlatformName)
	failed, err := w.builder.Clipctl(w.ctx, "index", w.ref(images.PlatformName), "--engine", "clip", "--all-platforms", "-o", none+".clip")
	require.Error(t, err)
	requireClear(t, failed.Stderr, images.PlatformName[len("example.com/"):], "reads gzip layers only")
	left, err := filepath.Glob(none + "*")
	require.NoError(t, err)
	require.Empty(t, left)
}
