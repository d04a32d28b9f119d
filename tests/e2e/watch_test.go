package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	containerdimages "github.com/containerd/containerd/v2/core/images"
	ctdarchive "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/core/leases"
	transferarchive "github.com/containerd/containerd/v2/core/transfer/archive"
	transferimage "github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

const (
	labelArchive = "cloud.beam.clip/archive.linux/" + runtime.GOARCH
	labelFile    = "cloud.beam.clip/file.linux/" + runtime.GOARCH
	labelStored  = "cloud.beam.clip/stored.linux/" + runtime.GOARCH
	labelError   = "cloud.beam.clip/error"
	labelRetry   = "cloud.beam.clip/retry"
)

// watched is a world whose builder is watched: what is called auto/* in the registry is pushed to it, and
// example.com/kept/* is kept, for the registry's kept/*.
type watched struct {
	*world
	watcher   *harness.Daemon
	directory string
}

func newWatched(t *testing.T) *watched {
	w := &watched{world: newWorldWith(t, "[fill]\nmode = 'off'\n")}
	w.startWatcher(fmt.Sprintf(`
[[watch.rules]]
names = [%q]
action = "push"

[[watch.rules]]
names = ["example.com/kept/*"]
action = "index"
storage_ref = "%s/{{.Path}}:{{.Tag}}"

[[watch.rules]]
names = ["example.com/labelled/*"]
labels = {clip = "auto"}
action = "index"
`, w.registry.Ref("auto/*"), w.registry.Host()))
	return w
}

// startWatcher has a daemon watch the builder by rules.
func (w *watched) startWatcher(rules string) {
	w.Helper()
	var err error
	w.watcher, err = w.lab.StartDaemon(w.ctx, "watcher", w.watchConfig()+rules)
	require.NoError(w, err)
}

// watchConfig is a daemon's configuration that lacks the rules.
func (w *watched) watchConfig() string {
	w.directory = w.lab.Path("kept")
	return fmt.Sprintf(`
[metrics]
address = "unix://%s"
[watch]
containerd = %q
namespaces = ["default", "second"]
directory = %q
cache_dir = %q
`, w.lab.Path("watch-metrics"), w.builder.Socket, w.directory, w.lab.Path("watch-cache"))
}

// label is a label of a builder's image; empty if there is no such label or image.
func (w *watched) label(ref, label string) string {
	image, err := w.builder.Client().ImageService().Get(w.ctx, ref)
	if err != nil {
		return ""
	}
	return image.Labels[label]
}

// requireArchive waits until an image is labelled with its archive in the registry, and returns the label.
func (w *watched) requireArchive(ref string) string {
	w.Helper()
	return w.requireLabel(ref, labelArchive)
}

// requireLabel waits until an image has a label that says where its archive is, and returns it.
func (w *watched) requireLabel(ref, label string) string {
	w.Helper()
	w.eventually("an archive of "+ref, func() bool { return w.label(ref, label) != "" })
	require.Empty(w, w.label(ref, labelError))
	require.Empty(w, w.label(ref, labelRetry))
	return w.label(ref, label)
}

// requireKept waits for an archive in a file, and checks what it is of.
func (w *watched) requireKept(ref, storageRef string) {
	w.Helper()
	file := w.requireLabel(ref, labelFile)
	require.Equal(w, w.directory, filepath.Dir(file))
	a, err := archive.OpenFile(file)
	require.NoError(w, err)
	defer a.Close()
	require.Equal(w, w.subject(ref, runtime.GOARCH).Digest, a.Info().Descriptor.Digest)
	require.Equal(w, storageRef, a.Info().StorageRef)
}

// requireLazy pulls an image on the worker: its archive is in the registry.
func (w *watched) requireLazy(ref string) {
	w.Helper()
	var layers []string
	for _, l := range w.manifest(w.builder, ref).Layers {
		layers = append(layers, l.Digest.String())
	}
	require.Empty(w, w.pull(w.worker, lazy, ref).Gets(layers...))
}

// indexed counts how often an image was indexed under a name.
func (w *watched) indexed(ref string) (n int) {
	for line := range strings.Lines(w.watcher.Log()) {
		if strings.Contains(line, indexing) && strings.Contains(line, ref) {
			n++
		}
	}
	return n
}

// TestWatchBuildkit builds, and nothing more: the archive is in the registry, and a worker runs the image lazily.
func TestWatchBuildkit(t *testing.T) {
	t.Parallel()
	w := newWatched(t)
	base := w.ref(images.SmallName)
	dir := w.dockerfile("FROM " + base + "\nRUN echo built > /app/name\nCOPY Dockerfile /opaque/\n")
	built := w.registry.Ref("auto/built:1")
	b, err := w.lab.StartBuildkit(w.ctx, "buildkit", w.builder, eager, w.registry)
	require.NoError(t, err)
	_, err = b.BuildWith(w.ctx, dir, "type=image,name="+built+",push=true")
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(w.requireArchive(built), "sha256:"))
	w.requireLazy(built)
	require.Equal(t, "hello from built\n", w.run(w.worker, lazy, built, "sh", "/app/run.sh"))

	// The OCI worker's images are in no containerd. nerdctl has it write a tar and loads that.
	oci, err := w.lab.StartBuildkitOCI(w.ctx, "buildkit-oci", w.registry)
	require.NoError(t, err)
	for path, load := range map[string]func(*os.File){"kept/imported:1": w.importAsNerdctl, "kept/transferred:1": w.transferAsNerdctl} {
		name, file := "example.com/"+path, w.lab.Path("built.tar")
		_, err = oci.BuildWith(w.ctx, dir, "type=docker,name="+name+",dest="+file)
		require.NoError(t, err)
		f, err := os.Open(file)
		require.NoError(t, err)
		defer f.Close()
		load(f)
		w.requireKept(name, w.registry.Ref(path))
	}
}

// importAsNerdctl loads a tar as "nerdctl load" and "nerdctl build" have long done: through the client.
func (w *watched) importAsNerdctl(f *os.File) {
	w.Helper()
	client, platform := w.builder.Client(), platforms.DefaultStrict()
	imported, err := client.Import(w.ctx, f, containerd.WithDigestRef(ctdarchive.DigestTranslator(eager)),
		containerd.WithSkipDigestRef(func(name string) bool { return name != "" }), containerd.WithImportPlatform(platform))
	require.NoError(w, err)
	require.Len(w, imported, 1)
	require.NoError(w, containerd.NewImageWithPlatform(client, imported[0], platform).Unpack(w.ctx, eager))
}

// transferAsNerdctl loads a tar as they do of late: through containerd's transfer service.
func (w *watched) transferAsNerdctl(f *os.File) {
	w.Helper()
	platform := platforms.DefaultSpec()
	store := transferimage.NewStore("", transferimage.WithPlatforms(platform), transferimage.WithUnpack(platform, eager),
		transferimage.WithDigestRef("import", true, true), transferimage.WithNamedPrefix("import-"+time.Now().Format(time.DateOnly), true))
	require.NoError(w, w.builder.Client().Transfer(w.ctx, transferarchive.NewImageImportStream(f, ""), store))
}

// TestWatchImages has images come in every other way.
func TestWatchImages(t *testing.T) {
	t.Parallel()
	w := newWatched(t)
	client := w.builder.Client()

	// A tag, and then a push: it is indexed before, and pushed after.
	pushed := w.registry.Ref("auto/app:1")
	w.ctr(w.builder, "image", "tag", images.SmallName, pushed)
	w.eventually("the reason", func() bool { return w.label(pushed, labelError) != "" })
	require.Contains(t, w.label(pushed, labelError), "push the image first")
	require.NotEmpty(t, w.label(pushed, labelRetry))
	w.ctr(w.builder, "image", "push", pushed)
	id := w.requireArchive(pushed)
	require.Equal(t, 1, w.indexed(pushed), "indexed once, however often pushing failed")
	left, err := filepath.Glob(filepath.Join(w.directory, "unpushed", "*"))
	require.NoError(t, err)
	require.Empty(t, left)
	w.requireLazy(pushed)
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, pushed, "sh", "/app/run.sh"))

	// More names of it in that repository are no more work.
	second := w.registry.Ref("auto/app:2")
	before := w.indexed("auto/app")
	w.ctr(w.builder, "image", "tag", pushed, second)
	require.Equal(t, id, w.requireArchive(second))
	w.ctr(w.builder, "image", "label", second, "other=label")
	w.ctr(w.builder, "image", "tag", "--force", pushed, second)
	require.Equal(t, id, w.requireArchive(second))
	require.Equal(t, before, w.indexed("auto/app"))

	// Nor is another pull of it, which takes the labels away.
	w.ctr(w.builder, "image", "pull", pushed)
	require.Equal(t, id, w.requireArchive(pushed))
	require.Equal(t, before, w.indexed("auto/app"))

	// A name that moves is another image.
	w.ctr(w.builder, "image", "tag", "--force", w.ref(images.SiblingName), second)
	w.ctr(w.builder, "image", "push", second)
	w.eventually("another archive", func() bool { l := w.label(second, labelArchive); return l != "" && l != id })
	w.requireLazy(second)

	// Pull and import, in another namespace too.
	w.ctr(w.builder, "image", "rm", w.ref(images.BaseName))
	pulledRef := w.registry.Ref("auto/pulled:1")
	w.ctr(w.builder, "image", "tag", images.BaseName, pulledRef)
	w.ctr(w.builder, "image", "push", pulledRef)
	ctx := namespaces.WithNamespace(w.ctx, "second")
	w.ctrIn(ctx, w.builder, "image", "pull", pulledRef)
	w.eventually("an archive", func() bool {
		image, err := client.ImageService().Get(ctx, pulledRef)
		return err == nil && image.Labels[labelArchive] != ""
	})
	w.requireArchive(pulledRef)
	require.Equal(t, 1, w.indexed(pulledRef), "once for both namespaces")
	const kept = "example.com/kept/imported:1"
	file := w.lab.Path("one.tar")
	_, err = w.builder.Clipctl(w.ctx, "export", images.SmallName, file, "--name", kept)
	require.NoError(t, err)
	w.ctr(w.builder, "image", "import", file)
	w.requireKept(kept, w.registry.Ref("kept/imported:1"))

	// What is imported again has its archive, even if something else goes while it has no label.
	old, err := os.Stat(w.label(kept, labelFile))
	require.NoError(t, err)
	child := watchers(t, w.watcher.Pid())
	require.Len(t, child, 1)
	require.NoError(t, unix.Kill(child[0], unix.SIGSTOP)) // else it may have labelled the image again before anybody looks
	w.ctr(w.builder, "image", "tag", images.ZstdName, "example.com/other:1")
	w.ctr(w.builder, "image", "rm", "example.com/other:1")
	w.ctr(w.builder, "image", "import", "--no-unpack", file)
	require.Empty(t, w.label(kept, labelFile), "the import takes the labels away")
	require.NoError(t, unix.Kill(child[0], unix.SIGCONT))
	w.requireKept(kept, w.registry.Ref("kept/imported:1"))
	require.Equal(t, 1, w.indexed(kept))
	now, err := os.Stat(w.label(kept, labelFile))
	require.NoError(t, err)
	require.True(t, os.SameFile(old, now))

	// What no rule names is left alone; a label may be what names it.
	const labelled = "example.com/labelled/app:1"
	w.ctr(w.builder, "image", "tag", images.ZstdName, labelled)
	w.ctr(w.builder, "image", "tag", images.ZstdName, "example.com/kept/last:1")
	w.requireKept("example.com/kept/last:1", w.registry.Ref("kept/last:1"))
	require.Empty(t, w.label(labelled, labelFile))
	w.ctr(w.builder, "image", "label", labelled, "clip=auto")
	w.requireKept(labelled, labelled)
	w.requireKept("example.com/kept/last:1", w.registry.Ref("kept/last:1"))
	require.Empty(t, w.label(images.ZstdName, labelFile))

	// An archive goes with its image, and nobody else's.
	gone, stays := w.label(kept, labelFile), w.label(labelled, labelFile)
	mine := filepath.Join(w.directory, "mine.clip")
	require.NoError(t, os.WriteFile(mine, nil, 0o600))
	w.ctr(w.builder, "image", "rm", kept)
	w.eventually("the archive is removed", func() bool { _, err := os.Stat(gone); return os.IsNotExist(err) })
	require.FileExists(t, stays)
	require.FileExists(t, mine)

	status, err := w.builder.Clipctl(w.ctx, "status", "--clip-address", w.watcher.Socket)
	require.NoError(t, err)
	require.Regexp(t, "auto/app:1 .*"+id[:19], status.Stdout)
	// The daemon asks the process that indexes, and shows its metrics without those when it is slow to answer.
	for _, name := range []string{`clip_index_duration_seconds_count{outcome="indexed"}`, "clip_index_bytes_total", `clip_index_layers_total{outcome="cached"}`} {
		w.eventually(name, func() bool { return !slices.Contains([]string{"", "0"}, w.metrics(w.lab.Path("watch-metrics"))[name]) })
	}
}

// TestWatchAlone has a machine that only builds: neither a daemon nor a containerd that knows of the snapshotter. The
// status has what became of the images there, and says when it is something else that a daemon is missing for.
func TestWatchAlone(t *testing.T) {
	t.Parallel()
	w := &watched{world: &world{T: t, ctx: t.Context(), lab: harness.ForTest(t)}}
	var err error
	w.builder, err = w.lab.StartContainerd(w.ctx, "builder", nil)
	require.NoError(t, err)
	w.watcher, err = w.lab.StartWatcher(w.ctx, "watcher", w.watchConfig()+`
[[watch.rules]]
names = ["example.com/kept/*"]
action = "index"

[[watch.rules]]
names = ["example.com/failing/*"]
action = "index"
platforms = ["windows/amd64"]
`)
	require.NoError(t, err)
	type said struct {
		Daemon, Cache              *struct{}
		Images, Containers, Layers []struct{}
		Indexed                    []struct{ Namespace, Image, Indexed, What string }
	}
	status := func(address string, flags ...string) string {
		result, err := w.builder.Clipctl(w.ctx, append([]string{"status", "--clip-address", address}, flags...)...)
		require.NoError(t, err)
		require.Empty(t, result.Stderr)
		return result.Stdout
	}
	require.Contains(t, status(w.watcher.Socket), "no daemon", "before there is an image")

	layout, err := images.Small(w.lab.Path("small"))
	require.NoError(t, err)
	file := w.lab.Path("small.tar")
	require.NoError(t, layout.WriteTar(file))
	w.ctr(w.builder, "image", "import", "--no-unpack", "--all-platforms", file)
	const kept, failing = "example.com/kept/app:1", "example.com/failing/app:1"
	w.ctr(w.builder, "image", "tag", images.SmallName, kept)
	w.ctr(w.builder, "image", "tag", images.SmallName, failing)
	w.requireKept(kept, kept)
	w.eventually("the reason", func() bool { return w.label(failing, labelError) != "" })
	daemon, err := w.lab.StartDaemon(w.ctx, "daemon", "")
	require.NoError(t, err)
	for head, address := range map[string]string{"no daemon": w.watcher.Socket, "daemon [0-9]+ since": daemon.Socket} {
		text := status(address)
		require.Regexp(t, "^"+head, text)
		require.Regexp(t, `default +`+kept+` +yes +linux/`+runtime.GOARCH+` `+w.label(kept, labelFile), text)
		require.Regexp(t, `default +`+failing+` +retry .*no manifest for platform windows/amd64`, text)
		var v said
		require.NoError(t, json.Unmarshal([]byte(status(address, "--json")), &v))
		require.Equal(t, address == daemon.Socket, v.Daemon != nil && v.Cache != nil)
		require.Len(t, v.Indexed, 2)
		require.Empty(t, append(append(v.Images, v.Containers...), v.Layers...))
	}

	worker, err := w.lab.StartContainerd(w.ctx, "worker", daemon)
	require.NoError(t, err)
	require.NoError(t, daemon.Stop())
	result, err := worker.Clipctl(w.ctx, "status")
	require.Error(t, err, "a worker needs its daemon")
	require.Contains(t, result.Stderr, daemon.Socket)
}

// TestWatchBuckets has archives go to a bucket that is made late, and to a directory beside registry and file. Workers
// find them by the same URLs, and what became of them is in the status.
func TestWatchBuckets(t *testing.T) {
	t.Parallel()
	w := &watched{world: newWorld(t)}
	s3, options := w.startS3()
	inS3, inFiles := "s3://archives/{{.Path}}/{{.Manifest}}.clip"+options, "file://"+w.lab.Path("objects")+"/{{.Path}}-{{.Tag}}.clip"
	w.discoverIn(inS3, inFiles)
	w.startWatcher(fmt.Sprintf(`
[[watch.rules]]
names = [%q]
to = %q

[[watch.rules]]
names = ["example.com/all/*"]
action = "both"
storage_ref = "%s/{{.Path}}:{{.Tag}}"
to = %q

[[watch.rules]]
names = [%q]
platforms = ["all"]
to = %q

[[watch.rules]]
names = ["example.com/one-name/*"]
platforms = ["linux/amd64", "linux/arm64"]
to = %q
`, w.registry.Ref("stored/*"), inS3, w.registry.Host(), inFiles, images.PlatformName, inS3, inFiles))

	stored := w.registry.Ref("stored/app:1")
	w.ctr(w.builder, "image", "tag", images.SmallName, stored)
	w.ctr(w.builder, "image", "push", stored)
	w.eventually("the reason", func() bool { return strings.Contains(w.label(stored, labelError), "NoSuchBucket") })
	status := func() string {
		result, err := w.builder.Clipctl(w.ctx, "status", "--clip-address", w.watcher.Socket)
		require.NoError(t, err)
		return result.Stdout
	}
	require.Regexp(t, "stored/app:1 +retry .*s3://archives.*NoSuchBucket", status())
	require.NoError(t, s3.MakeBucket("archives"))
	url := w.requireLabel(stored, labelStored)
	require.Equal(t, "s3://archives/stored/app/"+strings.Replace(w.subject(stored, runtime.GOARCH).Digest.String(), ":", "-", 1)+".clip", url)
	require.Empty(t, w.label(stored, labelArchive)+w.label(stored, labelFile))
	require.Regexp(t, "stored/app:1 +yes +linux/"+runtime.GOARCH+" "+url, status())
	require.Equal(t, 1, w.indexed("stored/app"), "indexed once, however often storing failed")
	w.eventually("no archive that waits, of another image either", func() bool {
		left, err := filepath.Glob(filepath.Join(w.directory, "unpushed", "*"))
		require.NoError(t, err)
		return len(left) == 0
	})
	w.requireLazy(stored)
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, stored, "sh", "/app/run.sh"))
	_, err := w.builder.Clipctl(w.ctx, "inspect", filepath.Join(s3.Root, strings.TrimPrefix(url, "s3://")))
	require.NoError(t, err)
	again := w.registry.Ref("stored/app:2")
	w.ctr(w.builder, "image", "tag", stored, again)
	require.Equal(t, url, w.requireLabel(again, labelStored))
	require.Equal(t, 1, w.indexed("stored/app"), "the object is the same")

	// All places at once.
	const first, second = "all/app:1", "all/other:1"
	for name, of := range map[string]string{first: images.SiblingName, second: images.BaseName} {
		w.ctr(w.builder, "image", "tag", of, w.registry.Ref(name))
		w.ctr(w.builder, "image", "push", w.registry.Ref(name))
		w.ctr(w.builder, "image", "tag", of, "example.com/"+name)
		object := w.lab.Path("objects", strings.Replace(name, ":", "-", 1)+".clip")
		require.Equal(t, "file://"+object, w.requireLabel("example.com/"+name, labelStored))
		require.FileExists(t, object)
		w.requireKept("example.com/"+name, w.registry.Ref(name))
		require.Equal(t, []string{w.requireArchive("example.com/" + name)}, w.referrers(w.registry.Ref(name), runtime.GOARCH))
		w.requireLazy(w.registry.Ref(name))
	}

	// An object for each platform, or a reason that nobody tries again.
	for _, arch := range []string{"amd64", "arm64"} {
		url := w.requireLabel(images.PlatformName, "cloud.beam.clip/stored.linux/"+arch)
		a, err := archive.OpenFile(filepath.Join(s3.Root, strings.TrimPrefix(url, "s3://")))
		require.NoError(t, err)
		require.Equal(t, w.subject(images.PlatformName, arch).Digest, a.Info().Descriptor.Digest)
		require.NoError(t, a.Close())
	}
	const one = "example.com/one-name/app:1"
	w.ctr(w.builder, "image", "tag", images.PlatformName, one)
	w.eventually("the reason", func() bool { return strings.Contains(w.label(one, labelError), "{{.Manifest}}") })
	require.Empty(t, w.label(one, labelRetry))

	// An image that moves takes the object's name with it, and back.
	const moving = "example.com/one-name/moving:1"
	for _, of := range []string{images.SmallName, w.ref(images.BaseName), images.SmallName} {
		w.ctr(w.builder, "image", "tag", "--force", of, moving)
		w.eventually("its object", func() bool {
			a, err := archive.OpenFile(w.lab.Path("objects", "one-name", "moving-1.clip"))
			if err != nil {
				return false
			}
			defer a.Close()
			return a.Info().Descriptor.Digest == w.subject(of, runtime.GOARCH).Digest
		})
	}

	// What is kept stays as long as its image; what was never published goes after a while.
	gone, stays := w.label("example.com/"+second, labelFile), w.label("example.com/"+first, labelFile)
	fresh := filepath.Join(w.directory, "unpushed", "fresh-"+strings.Repeat("0", 32)+".clip")
	old := strings.Replace(fresh, "fresh", "old", 1)
	for _, file := range []string{fresh, old} {
		require.NoError(t, os.WriteFile(file, nil, 0o600))
	}
	require.NoError(t, os.Chtimes(old, time.Time{}, time.Now().Add(-time.Hour)))
	w.ctr(w.builder, "image", "rm", "example.com/"+second)
	for _, file := range []string{gone, old} {
		w.eventually("the archive is removed", func() bool { _, err := os.Stat(file); return os.IsNotExist(err) })
	}
	require.FileExists(t, stays)
	require.FileExists(t, fresh)
	require.FileExists(t, w.lab.Path("objects", "all", "other-1.clip"), "objects are for others to remove")
}

// TestWatchIncomplete has an image in the store before its layers are, as BuildKit publishes it.
func TestWatchIncomplete(t *testing.T) {
	t.Parallel()
	w := newWatched(t)
	client := w.builder.Client()
	ctx, done, err := client.WithLease(w.ctx, leases.WithRandomID())
	require.NoError(t, err)
	defer func() { require.NoError(t, done(ctx)) }()
	layer := w.manifest(w.builder, images.SiblingName).Layers[3]
	b, err := content.ReadBlob(ctx, client.ContentStore(), layer)
	require.NoError(t, err)
	require.NoError(t, client.ContentStore().Delete(ctx, layer.Digest))
	const name = "example.com/kept/early:1"
	_, err = client.ImageService().Create(ctx, containerdimages.Image{Name: name, Target: w.image(w.builder, images.SiblingName).Target})
	require.NoError(t, err)
	w.eventually("the reason", func() bool { return strings.Contains(w.label(name, labelError), layer.Digest.String()) })
	require.Zero(t, w.indexed(name))
	require.NoError(t, content.WriteBlob(ctx, client.ContentStore(), "late", strings.NewReader(string(b)), layer))
	require.Equal(t, layer.Digest, digest.FromBytes(b))
	w.requireKept(name, w.registry.Ref("kept/early:1"))
	require.Equal(t, 1, w.indexed(name))
}

// TestWatchInterrupted has registry, watcher and containerd away, by turns. What was missed is made up for.
func TestWatchInterrupted(t *testing.T) {
	t.Parallel()
	w := newWatched(t)
	first := w.registry.Ref("auto/first:1")
	w.ctr(w.builder, "image", "tag", images.SmallName, first)
	w.ctr(w.builder, "image", "push", first)
	w.requireArchive(first)
	require.NoError(t, w.registry.SwitchOff())
	w.ctr(w.builder, "image", "label", first, "cloud.beam.clip/target=")
	w.eventually("the reason", func() bool { return w.label(first, labelError) != "" })
	require.Empty(t, w.label(first, labelArchive))
	require.NoError(t, w.watcher.Stop())
	const missed = "example.com/kept/missed:1"
	w.ctr(w.builder, "image", "tag", images.SmallName, missed)
	require.NoError(t, w.lab.RestartDaemon(w.ctx, w.watcher))
	require.NoError(t, w.registry.SwitchOn())
	w.requireKept(missed, w.registry.Ref("kept/missed:1"))
	w.requireArchive(first)
	require.Equal(t, 2, w.indexed(first), "once more as somebody wanted it, and not again to push it")

	// It does not run when containerd is back, and so nobody tells it of this.
	child := watchers(t, w.watcher.Pid())
	require.Len(t, child, 1)
	require.NoError(t, unix.Kill(child[0], unix.SIGSTOP))
	w.builder.Kill()
	require.NoError(t, w.lab.RestartContainerd(w.ctx, w.builder))
	const unseen = "example.com/kept/unseen:1"
	w.ctr(w.builder, "image", "tag", w.ref(images.BaseName), unseen)
	require.NoError(t, unix.Kill(child[0], unix.SIGCONT))
	w.requireKept(unseen, w.registry.Ref("kept/unseen:1"))
	const after = "example.com/kept/after:1"
	w.ctr(w.builder, "image", "tag", w.ref(images.SiblingName), after)
	w.requireKept(after, w.registry.Ref("kept/after:1"))
	require.Equal(t, 2, w.indexed(first), "what is done is not done again")
}
