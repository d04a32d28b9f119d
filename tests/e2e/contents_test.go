package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/beam-cloud/clip/pkg/storage"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
	"github.com/beam-cloud/containerd-clip/tests/internal/rootdiff"
)

// clipctl runs clipctl without any daemon, with the credentials of the lab's buckets.
func clipctl(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	cmd := clipctlCommand(t, args...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	err = cmd.Run()
	return out.String(), said.String(), err
}

func clipctlCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	installed, err := harness.Installed()
	require.NoError(t, err)
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), filepath.Join(installed.Product, "clipctl"), args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(),
		"AWS_ACCESS_KEY_ID=" + harness.S3AccessKey, "AWS_SECRET_ACCESS_KEY=" + harness.S3SecretKey}
	return cmd
}

func mustClipctl(t *testing.T, args ...string) string {
	t.Helper()
	stdout, stderr, err := clipctl(t, args...)
	require.NoError(t, err, stderr)
	return stdout
}

// mountContents runs `clipctl mount` until the test ends.
func mountContents(t *testing.T, file string, args ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	cmd := clipctlCommand(t, append([]string{"mount", file, dir}, args...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
		defer time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() }).Stop()
		require.NoError(t, cmd.Wait(), said.String())
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, entries, "it is unmounted")
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err, said.String())
	require.Equal(t, "mounted on "+dir+"\n", line)
	return dir
}

// sourceDir is a root to make an archive of CLIP's first version of.
func sourceDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"bin", "etc", "proc", "sys", "dev", "run", "tmp", "data/deep/er"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	program, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err)
	noise := make([]byte, 3<<20+1)
	_, _ = rand.NewChaCha8([32]byte{'v', '1'}).Read(noise) // it never fails
	for name, f := range map[string]struct {
		mode    os.FileMode
		content string
	}{
		"bin/busybox": {0o755, string(program)}, "etc/name": {0o640, "version one\n"}, "data/empty": {0o600, ""},
		"data/deep/er/noise": {0o444, string(noise)}, "data/sp ace": {0o644, " "}, "data/a.b": {0o644, "sorts before data/a/"},
	} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(f.content), 0o600))
		require.NoError(t, os.Chmod(path, f.mode))
	}
	require.NoError(t, os.Symlink("busybox", filepath.Join(dir, "bin/sh")))
	require.NoError(t, os.Symlink("busybox", filepath.Join(dir, "bin/cat")))
	require.NoError(t, os.Symlink("/etc/name", filepath.Join(dir, "data/link")))
	return dir
}

// requireContents checks every command on an archive of dir.
func requireContents(t *testing.T, kind, file, dir string) {
	t.Helper()
	var d struct {
		Kind  string
		Files int
	}
	require.NoError(t, json.Unmarshal([]byte(mustClipctl(t, "inspect", file)), &d))
	want, err := rootdiff.Read(dir)
	require.NoError(t, err)
	require.Equal(t, kind, d.Kind)
	require.Equal(t, len(want), d.Files)

	listed := mustClipctl(t, "ls", file)
	require.Equal(t, len(want), strings.Count(listed, "\n"))
	require.Regexp(t, `(?m)^-rw-r----- 0:0 +12 \S+ \S+ /etc/name$`, listed)
	require.Regexp(t, `(?m)^Lrwxrwxrwx 0:0 +7 \S+ \S+ /bin/sh -> busybox$`, listed)
	require.Equal(t, 2, strings.Count(mustClipctl(t, "ls", file, "/data/deep/er"), "\n"))
	require.Equal(t, "version one\n", mustClipctl(t, "cat", file, "/etc/name"))
	require.Equal(t, "version one\n", mustClipctl(t, "cat", file, "data/link"), "links are followed")
	require.Empty(t, mustClipctl(t, "cat", file, "/data/empty"))
	_, stderr, err := clipctl(t, "cat", file, "/etc/none")
	require.Error(t, err)
	require.Contains(t, stderr, "/etc/none in "+file+": not found")
	_, stderr, err = clipctl(t, "cat", file, "/etc")
	require.Error(t, err)
	require.Contains(t, stderr, "/etc is not a regular file")

	got, err := rootdiff.Read(mountContents(t, file))
	require.NoError(t, err)
	for _, tree := range []rootdiff.Tree{want, got} {
		for name, e := range tree {
			e.Mtime.Nsec = 0
			tree[name] = e
		}
	}
	require.Empty(t, rootdiff.Diff(want, got, time.Now().Add(time.Hour)))
}

// TestDataArchive shows, mounts and runs an archive of CLIP's first version that holds its data.
func TestDataArchive(t *testing.T) {
	t.Parallel()
	w := &world{T: t, ctx: t.Context(), lab: harness.ForTest(t)}
	dir, file := sourceDir(t), w.lab.Path("data.clip")
	require.NoError(t, clip.SetLogLevel("disabled"))
	require.NoError(t, clip.CreateArchive(clip.CreateOptions{InputPath: dir, OutputPath: file}))
	requireContents(t, "data", file, dir)
	w.requireRunsOn(mountContents(t, file))
}

// requireRunsOn runs a container on a directory.
func (w *world) requireRunsOn(root string) {
	w.Helper()
	stock := w.stock()
	result, err := w.printed(func() (harness.Result, error) {
		return stock.Ctr(w.ctx, "run", "--rm", "--runc-root", w.lab.Path("runc"), "--fifo-dir", w.lab.Path("fifo"),
			"--read-only", "--rootfs", root, "on-a-mount", "/bin/sh", "-c", "/bin/cat /etc/name")
	})
	require.NoError(w, err)
	require.Equal(w, "version one\n", result.Stdout)
}

// TestS3Archive does the same with an archive that has its data in a bucket.
func TestS3Archive(t *testing.T) {
	w := &world{T: t, ctx: t.Context(), lab: harness.ForTest(t)}
	s3, err := w.lab.StartS3(w.ctx)
	require.NoError(t, err)
	require.NoError(t, s3.MakeBucket("archives"))
	t.Setenv("AWS_CA_BUNDLE", "") // CLIP's HTTP client cannot take one
	dir, file := sourceDir(t), w.lab.Path("s3.clip")
	w.uploadArchive(s3, dir, file, "team/app.clip")
	before := s3.Requests().Sent()
	mustClipctl(t, "ls", file)
	require.Equal(t, before, s3.Requests().Sent(), "listing asks nobody")
	mustClipctl(t, "cat", file, "/etc/name")
	require.Less(t, s3.Requests().Sent()-before, int64(10_000), "a file is fetched alone")
	requireContents(t, "s3", file, dir)
	w.requireRunsOn(mountContents(t, file, "--cache-dir", t.TempDir()))

	cmd := clipctlCommand(t, "cat", file, "/etc/name")
	cmd.Env = append(cmd.Env, "AWS_SECRET_ACCESS_KEY=wrong")
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "cannot access bucket <archives>")
}

// uploadArchive makes an archive of dir whose data is the object key in the bucket "archives".
func (w *world) uploadArchive(s3 *harness.S3, dir, file, key string) {
	w.Helper()
	require.NoError(w, clip.SetLogLevel("disabled"))
	require.NoError(w, clip.CreateAndUploadArchive(w.ctx, clip.CreateOptions{
		InputPath: dir, OutputPath: file,
		Credentials: storage.ClipStorageCredentials{S3: &storage.S3ClipStorageCredentials{AccessKey: harness.S3AccessKey, SecretKey: harness.S3SecretKey}},
	}, &common.S3StorageInfo{Bucket: "archives", Key: key, Region: harness.S3Region, Endpoint: s3.Endpoint(), ForcePathStyle: true}))
}

// TestS3CacheDir mounts archives whose objects have the same size and base name, and one whose object was replaced, with
// one cache directory: none reads what was kept of another.
func TestS3CacheDir(t *testing.T) {
	w := &world{T: t, ctx: t.Context(), lab: harness.ForTest(t)}
	s3, err := w.lab.StartS3(w.ctx)
	require.NoError(t, err)
	require.NoError(t, s3.MakeBucket("archives"))
	t.Setenv("AWS_CA_BUNDLE", "") // CLIP's HTTP client cannot take one
	cache, kept := t.TempDir(), map[string]bool{}
	file := func(i int) string { return w.lab.Path(fmt.Sprintf("s3-%d.clip", i)) }
	count := func(method, key string) (n int) {
		for _, r := range s3.Requests() {
			if r.Method == method && r.Path == "/archives/"+key {
				n++
			}
		}
		return n
	}
	read := func(i int, key string) (content string, before int) {
		heads := count("HEAD", key)
		root := mountContents(t, file(i), "--cache-dir", cache)
		w.eventually("CLIP asks for the object's size, and trusts a file that has it", func() bool { return count("HEAD", key) > heads })
		before = count("GET", key)
		b, err := os.ReadFile(filepath.Join(root, "name"))
		require.NoError(t, err)
		return string(b), before
	}
	keys := []string{"a/app.clip", "b/app.clip", "a/app.clip"}
	for i, key := range keys {
		dir := t.TempDir()
		content := fmt.Sprintf("content %d\n", i)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "name"), []byte(content), 0o600))
		w.uploadArchive(s3, dir, file(i), key)
		got, before := read(i, key)
		require.Equal(t, content, got)
		// A request is counted when it has ended, which may be after the file was read, and before CLIP asks by itself.
		require.Eventually(t, func() bool { return count("GET", key) > before }, 20*time.Second, 10*time.Millisecond)

		object, err := os.ReadFile(filepath.Join(s3.Root, "archives", key))
		require.NoError(t, err)
		files, err := os.ReadDir(cache)
		require.NoError(t, err)
		require.Len(t, files, i+1, "an archive has a file of its own")
		for _, f := range files {
			if !kept[f.Name()] { // CLIP itself fetches the object after half a minute
				kept[f.Name()] = true
				require.NoError(t, os.WriteFile(filepath.Join(cache, f.Name()), object, 0o600))
			}
		}
	}
	for i, key := range keys {
		w.eventually("what is in the cache is read from there", func() bool {
			got, before := read(i, key)
			require.Equal(t, fmt.Sprintf("content %d\n", i), got)
			return count("GET", key) == before
		})
	}
}

// TestImageArchives shows archives of images: with layer indexes, and CLIP's own.
func TestImageArchives(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publish(images.DockerName)
	ref, layers := w.ref(images.DockerName), w.layers(images.DockerName)
	ours, theirs := w.archive(ref), w.lab.Path("theirs.clip")
	require.NoError(t, clip.SetLogLevel("disabled"))
	require.NoError(t, clip.CreateFromOCIImage(w.ctx, clip.CreateFromOCIImageOptions{ImageRef: ref, OutputPath: theirs}))
	stock := w.stock()
	w.pull(stock, eager, ref)
	root := w.view(stock, eager, ref)
	want, err := rootdiff.Read(root)
	require.NoError(t, err)

	w.registry.Reset()
	for kind, file := range map[string]string{"indexed": ours, "oci": theirs} {
		var d struct {
			Kind, StorageRef string
			Manifest         struct{ Digest string }
			Layers           []struct{ Digest, DiffID string }
			Files            int
		}
		require.NoError(t, json.Unmarshal([]byte(mustClipctl(t, "inspect", file)), &d))
		require.Equal(t, kind, d.Kind)
		require.Equal(t, ref, d.StorageRef)
		require.Equal(t, w.subject(ref, "").Digest.String(), d.Manifest.Digest)
		require.Len(t, d.Layers, len(layers))
		for i, l := range d.Layers {
			require.Equal(t, layers[i], l.Digest)
			require.NotEmpty(t, l.DiffID)
		}
	}
	listed := mustClipctl(t, "ls", ours)
	require.Equal(t, len(want), strings.Count(listed, "\n"))
	require.Regexp(t, `(?m)^urwxr-xr-x 1000:100 +7 2024-05-06 07:08:09 /data/setuid$`, listed)
	require.Regexp(t, `(?m)^Dcrw-rw-rw- 0:0 +1,3 \S+ \S+ /data/null$`, listed)
	require.Contains(t, listed, `"/names/new\nline"`)
	require.Empty(t, w.registry.Requests(), "nothing of this asks the registry")

	require.Equal(t, "clip\n", mustClipctl(t, "cat", ours, "/app/alias"))
	for _, r := range w.registry.Requests().Gets(layers...) {
		require.NotEmpty(t, r.Range, "%s", r)
	}
	content, err := os.ReadFile(filepath.Join(root, "sizes/noise-3M+1"))
	require.NoError(t, err)
	require.True(t, mustClipctl(t, "cat", ours, "/sizes/noise-3M+1") == string(content))
	cache := t.TempDir()
	for range 2 {
		w.registry.Reset()
		require.Equal(t, "clip\n", mustClipctl(t, "cat", theirs, "/app/name", "--cache-dir", cache))
	}
	require.Empty(t, w.registry.Requests().Gets(layers...), "it is in the cache")

	w.registry.Reset()
	mounted, err := rootdiff.Read(mountContents(t, ours))
	require.NoError(t, err)
	require.Empty(t, rootdiff.Diff(want, mounted, w.start), "a mount of ours is the image's root, whole")
	for _, r := range w.registry.Requests().Gets(layers...) {
		require.NotEmpty(t, r.Range, "%s", r)
	}
	name, err := os.ReadFile(filepath.Join(mountContents(t, theirs), "app/name"))
	require.NoError(t, err)
	require.Equal(t, "clip\n", string(name))
}
