package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	containerdimages "github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// writes are the requests that change a registry.
func writes(rs harness.Requests) harness.Requests {
	return slices.DeleteFunc(slices.Clone(rs), func(r harness.Request) bool {
		return r.Method == http.MethodGet || r.Method == http.MethodHead
	})
}

// TestPublish pushes an archive, and again, and gets it back. What the registry lacks of the image is said before
// anything is written.
func TestPublish(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref, file := w.ref(images.SmallName), w.lab.Path("app.clip")
	_, err := w.builder.Clipctl(w.ctx, "index", ref, "-o", file)
	require.NoError(t, err)
	lost := w.layers(images.SmallName)[1]
	require.NoError(t, os.Rename(w.registry.BlobPath(lost), w.lab.Path("lost")))
	for _, args := range [][]string{{"push", file}, {"index", ref, "--push"}} {
		w.registry.Reset()
		result, err := w.builder.Clipctl(w.ctx, args...)
		require.Error(t, err)
		requireClear(t, result.Stderr, lost, w.registry.Host(), "push the image again")
		require.Empty(t, writes(w.registry.Requests()))
	}
	require.NoError(t, os.Rename(w.lab.Path("lost"), w.registry.BlobPath(lost)))

	_, err = w.builder.Clipctl(w.ctx, "pull-archive", ref)
	require.Error(t, err, "there is none yet")
	first, err := w.builder.Clipctl(w.ctx, "push", file)
	require.NoError(t, err)
	before, err := w.registry.StoredBytes()
	require.NoError(t, err)
	w.registry.Reset()
	second, err := w.builder.Clipctl(w.ctx, "push", file)
	require.NoError(t, err)
	require.Equal(t, first.Stdout, second.Stdout)
	after, err := w.registry.StoredBytes()
	require.NoError(t, err)
	require.Equal(t, before, after)
	for _, r := range writes(w.registry.Requests()) {
		require.Contains(t, r.Path, "/manifests/", "no blob is uploaded again")
	}

	fetched := w.lab.Path("fetched.clip")
	_, err = w.builder.Clipctl(w.ctx, "pull-archive", ref, "-o", fetched)
	require.NoError(t, err)
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	got, err := os.ReadFile(fetched)
	require.NoError(t, err)
	require.Equal(t, want, got)
}

// TestKeptArchive has an archive in containerd's store: it stays with its image, moves with it, and goes with it.
func TestKeptArchive(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, fillLate)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	w.pull(w.worker, lazy, ref)
	blobs := func() (found []string) {
		for line := range strings.Lines(w.ctr(w.worker, "content", "ls", "-q")) {
			found = append(found, strings.TrimSpace(line))
		}
		return found
	}
	before := blobs()
	result, err := w.worker.Clipctl(w.ctx, "push", ref)
	require.Error(t, err)
	requireClear(t, result.Stderr, ref, "pull-archive")
	_, err = w.worker.Clipctl(w.ctx, "pull-archive", ref)
	require.NoError(t, err)
	kept := slices.DeleteFunc(blobs(), func(d string) bool { return slices.Contains(before, d) })
	require.Len(t, kept, 3, "manifest, archive, empty config")
	w.ctr(w.worker, "content", "prune", "references")
	require.Subset(t, blobs(), kept)

	// A copy of image and archive, made without indexing anything.
	elsewhere := w.registry.Ref("elsewhere/copy:1")
	_, err = w.worker.Clipctl(w.ctx, "content", "ensure", ref)
	require.NoError(t, err)
	w.ctr(w.worker, "image", "tag", ref, elsewhere)
	result, err = w.worker.Clipctl(w.ctx, "push", elsewhere)
	require.Error(t, err)
	requireClear(t, result.Stderr, elsewhere[:strings.LastIndex(elsewhere, ":")], "push the image first")
	w.ctr(w.worker, "image", "push", elsewhere)
	result, err = w.worker.Clipctl(w.ctx, "push", elsewhere)
	require.NoError(t, err)
	require.Contains(t, result.Stdout, elsewhere)

	w.removeImage(w.worker, ref)
	require.Subset(t, blobs(), kept, "the copy is the same image")
	w.removeImage(w.worker, elsewhere)
	w.eventually("the archive is collected", func() bool {
		now := blobs()
		return !slices.ContainsFunc(kept, func(d string) bool { return slices.Contains(now, d) })
	})
	require.Empty(t, w.pull(w.worker, lazy, elsewhere).Gets(w.layers(images.SmallName)...))
}

// TestConvert makes an image that names its archive. It is pushed and pulled by ctr alone: with the snapshotter it is
// lazy, though nobody looks for referrers; without, it is an image like any other and its archive stays where it is.
func TestConvert(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, fillLate+"[discover]\nreferrers = false\n")
	w.publish(images.PlatformName)
	src, dst := w.ref(images.SmallName), w.registry.Ref("team/converted:1")
	_, err := w.builder.Clipctl(w.ctx, "convert", src, dst)
	require.NoError(t, err)
	before, after := w.manifest(w.builder, src), w.manifest(w.builder, dst)
	require.Equal(t, before.Config.Digest, after.Config.Digest)
	var archives []string
	for i, l := range after.Layers {
		require.Equal(t, before.Layers[i].Digest, l.Digest)
		archives = append(archives, l.Annotations[archive.AnnotationLink])
	}
	require.Len(t, slices.Compact(archives), 1)
	w.removeImage(w.builder, w.ref(images.SiblingName)) // and what nobody refers to
	w.ctr(w.builder, "image", "push", dst)
	children, err := containerdimages.Children(w.ctx, w.builder.Client().ContentStore(), w.image(w.builder, dst).Target)
	require.NoError(t, err)
	require.Len(t, children, 2)
	require.Equal(t, archives[0], children[1].Digest.String())
	require.Equal(t, archive.ArtifactType, children[1].ArtifactType)
	require.Equal(t, &ocispec.Platform{OS: "unknown", Architecture: "unknown"}, children[1].Platform)

	layers := w.layers(images.SmallName)
	require.Empty(t, w.pull(w.worker, lazy, dst).Gets(layers...))
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, dst, "sh", "/app/run.sh"))
	w.removeImage(w.worker, dst)
	require.Len(t, w.pull(w.worker, lazy, src).Gets(layers...), len(layers), "it is the link that makes it lazy")

	stock := w.stock()
	requests := w.pull(stock, eager, dst)
	require.Len(t, requests.Gets(layers...), len(layers))
	artifact, err := containerdimages.Manifest(w.ctx, w.builder.Client().ContentStore(), children[1], nil)
	require.NoError(t, err)
	require.Empty(t, requests.Gets(artifact.Layers[0].Digest.String()), "nobody needs the archive")
	require.Equal(t, "hello from clip\n", w.run(stock, eager, dst, "sh", "/app/run.sh"))
	w.pull(w.worker, lazy, dst)
	requireSameRoot(w, stock, dst)

	// All platforms, with an archive for each; and again, which changes nothing.
	all := w.registry.Ref("team/all:1")
	for range 2 {
		result, err := w.builder.Clipctl(w.ctx, "convert", w.ref(images.PlatformName), all, "--all-platforms")
		require.NoError(t, err)
		require.Contains(t, result.Stdout, w.image(w.builder, all).Target.Digest.String())
		require.Contains(t, result.Stdout, "2 platforms")
		w.ctr(w.builder, "image", "push", all)
	}
	require.Empty(t, w.pull(w.worker, lazy, all).Gets(w.layers(images.PlatformName)...))
	w.ctr(stock, "image", "pull", "--all-platforms", all) // a copy of everything: archives, too
	children, err = containerdimages.Children(w.ctx, stock.Client().ContentStore(), w.image(stock, all).Target)
	require.NoError(t, err)
	require.Len(t, children, 4)
	for _, d := range children {
		_, err := stock.Client().ContentStore().Info(w.ctx, d.Digest)
		require.NoError(t, err)
	}

	// An archive that is there is taken as it is.
	file, named := w.lab.Path("app.clip"), w.registry.Ref("team/named:1")
	_, err = w.builder.Clipctl(w.ctx, "index", src, "-o", file)
	require.NoError(t, err)
	_, err = w.builder.Clipctl(w.ctx, "convert", src, named, "--archive", file)
	require.NoError(t, err)
	result, err := w.builder.Clipctl(w.ctx, "push", file)
	require.NoError(t, err)
	require.Contains(t, result.Stdout, w.manifest(w.builder, named).Layers[0].Annotations[archive.AnnotationLink])

	result, err = w.builder.Clipctl(w.ctx, "convert", src, dst, "--platform", "linux/s390x")
	require.Error(t, err)
	requireClear(t, result.Stderr, src, "linux/s390x")
	require.Equal(t, after, w.manifest(w.builder, dst))
}

// startS3 starts an S3 server for which all programs have credentials. The options are for URLs of its buckets.
func (w *world) startS3() (s3 *harness.S3, options string) {
	w.Helper()
	require.NoError(w, os.MkdirAll(w.lab.Path("home", ".aws"), 0o700))
	w.writeS3Keys(harness.S3SecretKey)
	s3, err := w.lab.StartS3(w.ctx)
	require.NoError(w, err)
	return s3, "?region=" + harness.S3Region + "&use_path_style=true&endpoint=" + s3.Endpoint()
}

func (w *world) writeS3Keys(secret string) {
	w.Helper()
	credentials := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", harness.S3AccessKey, secret)
	require.NoError(w, os.WriteFile(w.lab.Path("home", ".aws", "credentials"), []byte(credentials), 0o600))
}

// discoverIn has the daemon look for archives in two places instead of the registry.
func (w *world) discoverIn(first, second string) {
	w.Helper()
	require.NoError(w, w.daemon.Stop())
	config := fmt.Sprintf("[discover]\nreferrers = false\nsources = [%q, %q]\n[fill]\nmode = 'off'\n", first, second)
	require.NoError(w, os.WriteFile(w.daemon.Config, []byte(config), 0o600))
	require.NoError(w, w.lab.RestartDaemon(w.ctx, w.daemon))
	w.foundAgain(w.worker)
}

// TestBuckets keeps archives in a bucket of a real S3 server and in a directory. The snapshotter finds them there by the
// same URL, under names made by the same template; the registry is asked for no archive.
func TestBuckets(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s3, options := w.startS3()
	require.NoError(t, s3.MakeBucket("archives"))
	inS3 := "s3://archives/by-name/{{.Path}}/{{.Tag}}.clip" + options
	inFiles := "file://" + w.lab.Path("archives")
	w.discoverIn(inS3, inFiles)

	for name, to := range map[string]string{images.SmallName: inS3, images.SiblingName: inFiles} {
		w.registry.Reset()
		for range 2 {
			result, err := w.builder.Clipctl(w.ctx, "index", w.ref(name), "--to", to)
			require.NoError(t, err)
			require.Contains(t, result.Stdout, to)
		}
		require.Empty(t, w.registry.Requests())
		require.Empty(t, w.pull(w.worker, lazy, w.ref(name)).Gets(w.layers(name)...), "%s", w.daemon.Log())
		require.Equal(t, "hello\n", w.run(w.worker, lazy, w.ref(name), "echo", "hello"))
	}
	require.Empty(t, w.doctor(w.worker, w.ref(images.SmallName), w.ref(images.SiblingName)), "it looks where the daemon does")
	require.Contains(t, w.doctor(w.worker, w.ref(images.BaseName))["archive"].Found, "none")
	require.FileExists(t, filepath.Join(s3.Root, "archives/by-name/small/busybox/1.clip"))
	stored, err := filepath.Glob(w.lab.Path("archives", "*"))
	require.NoError(t, err)
	require.Equal(t, []string{w.lab.Path("archives", strings.Replace(w.subject(w.ref(images.SiblingName), runtime.GOARCH).Digest.String(), ":", "-", 1)+".clip")}, stored)
	for _, name := range []string{images.SmallName, images.SiblingName} {
		w.removeImage(w.worker, w.ref(name))
	}
	require.Len(t, w.pull(w.worker, lazy, w.ref(images.BaseName)).Gets(w.layers(images.BaseName)...), len(w.layers(images.BaseName)), "it is in neither")
	require.NotContains(t, w.daemon.Log(), "a source of archives is passed over")

	// One object by its name; and what cannot be.
	_, err = w.worker.Clipctl(w.ctx, "load", "s3://archives/by-name/small/busybox/1.clip"+options)
	require.NoError(t, err)
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, w.ref(images.SmallName), "sh", "/app/run.sh"))
	file := w.lab.Path("app.clip")
	_, err = w.builder.Clipctl(w.ctx, "index", w.ref(images.SmallName), "-o", file)
	require.NoError(t, err)
	for _, c := range []struct{ args, says []string }{
		{[]string{"load", "s3://none/a.clip" + options}, []string{"s3://none", "NoSuchBucket"}},
		{[]string{"push", file, "--to", "ftp://host"}, []string{"ftp://host", "s3, gs, azblob and file"}},
		{[]string{"load", "s3://archives/by-name/none.clip" + options}, []string{"none.clip"}},
		{[]string{"load", inS3}, []string{"name one archive"}},
	} {
		result, err := w.worker.Clipctl(w.ctx, c.args...)
		require.Error(t, err)
		requireClear(t, result.Stderr, c.says...)
		require.NotContains(t, result.Output(), harness.S3SecretKey)
	}
	_, err = w.builder.Clipctl(w.ctx, "push", file, "--to", "s3://archives/pushed.clip"+options)
	require.NoError(t, err)
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	got, err := os.ReadFile(filepath.Join(s3.Root, "archives/pushed.clip"))
	require.NoError(t, err)
	require.Equal(t, want, got)

	// A source that refuses the keys is named in the log, without them.
	w.writeS3Keys(secret)
	w.discoverIn(inS3, inFiles)
	w.pull(w.worker, lazy, w.ref(images.SiblingName))
	require.Contains(t, w.daemon.Log(), "a source of archives is passed over")
	requireNoSecret(t, "the daemon", w.daemon.Log())
	require.NotContains(t, w.daemon.Log(), harness.S3SecretKey)
}
