// Package e2e tests the product as its users run it: its two programs, a stock containerd with ctr and runc on either
// side, and a registry that counts what it is asked.
//
// Every test has processes, roots, sockets and mounts of its own (package harness) and leaves none behind. All need
// root; what is missing fails them in CI and skips them elsewhere.
package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	testimages "github.com/beam-cloud/containerd-clip/tests/internal/images"
)

const (
	lazy  = "clip"
	eager = "overlayfs"

	// fillLate puts off what a daemon completes in the background, which begins half a minute after a pull, until tests are
	// over: on a slow machine it would be among the requests that they count.
	fillLate = "[fill]\ndelay = '1h'\n"

	notLazy  = "unpacking the layer instead of reading it lazily"
	indexing = "indexing from local OCI layout with remote storage reference"
)

// world is a build side and a run side with a registry between them.
type world struct {
	*testing.T
	ctx      context.Context
	lab      *harness.Lab
	registry *harness.Registry
	builder  *harness.Containerd // no daemon
	daemon   *harness.Daemon
	worker   *harness.Containerd // with the daemon
	layout   *testimages.Layout  // of the small images; nil in a world of the demo image
	start    time.Time           // everything in the images is older
}

// newWorld has the small images in the builder's store and in the registry, under the same names in both.
func newWorld(t *testing.T) *world { return newWorldWith(t, "") }

// newWorldWith has a daemon with a configuration, in which LAB stands for the lab's directory.
func newWorldWith(t *testing.T, config string) *world {
	w := emptyWorld(t, config)
	w.addSmall()
	return w
}

// addSmall puts the small images into the builder's store and the registry.
func (w *world) addSmall() {
	w.Helper()
	layout, err := testimages.Small(w.lab.Path("small"))
	require.NoError(w, err)
	file := w.lab.Path("small.tar")
	require.NoError(w, layout.WriteTar(file))
	w.layout = layout
	w.ctr(w.builder, "image", "import", "--no-unpack", "--all-platforms", file)
	for _, name := range []string{testimages.SmallName, testimages.SiblingName, testimages.BaseName} {
		w.publish(name)
	}
	w.start = time.Now()
}

// newDemoWorld has the demo image instead, which takes some minutes to make.
func newDemoWorld(t *testing.T) *world {
	w := worldIn(t, harness.ForTestWithin(t, 2*harness.Limit), fillLate)
	top, err := harness.Top()
	require.NoError(t, err)
	file, err := testimages.Demo(w.ctx, filepath.Join(top, ".cache", "images"))
	require.NoError(t, err)
	w.ctr(w.builder, "image", "import", "--no-unpack", file)
	w.publish(testimages.DemoName)
	w.start = time.Now()
	return w
}

func emptyWorld(t *testing.T, config string) *world { return worldIn(t, harness.ForTest(t), config) }

func worldIn(t *testing.T, lab *harness.Lab, config string) *world {
	w := workerlessWorldIn(t, lab, config)
	var err error
	w.worker, err = w.lab.StartContainerd(w.ctx, "worker", w.daemon)
	require.NoError(t, err)
	return w
}

// workerlessWorld has no containerd beside the daemon yet.
func workerlessWorld(t *testing.T, config string) *world {
	return workerlessWorldIn(t, harness.ForTest(t), config)
}

func workerlessWorldIn(t *testing.T, lab *harness.Lab, config string) *world {
	w := &world{T: t, ctx: t.Context(), lab: lab}
	var err error
	w.registry, err = w.lab.StartRegistry(w.ctx)
	require.NoError(t, err)
	w.builder, err = w.lab.StartContainerd(w.ctx, "builder", nil)
	require.NoError(t, err)
	w.daemon, err = w.lab.StartDaemon(w.ctx, "daemon", strings.ReplaceAll(config, "LAB", w.lab.Dir))
	require.NoError(t, err)
	return w
}

// ref is an image's name in the registry.
func (w *world) ref(name string) string {
	_, path, _ := strings.Cut(name, "/")
	return w.registry.Ref(path)
}

// publish tags an image with its name in the registry and pushes it, as any image is.
func (w *world) publish(name string, pushArgs ...string) {
	w.Helper()
	w.ctr(w.builder, "image", "tag", name, w.ref(name))
	w.ctr(w.builder, append(append([]string{"image", "push"}, pushArgs...), w.ref(name))...)
}

// index makes an image's archive and pushes it.
func (w *world) index(name string, args ...string) harness.Result {
	w.Helper()
	result, err := w.builder.Clipctl(w.ctx, append([]string{"index", w.ref(name), "--push"}, args...)...)
	require.NoError(w, err)
	return result
}

func (w *world) ctr(c *harness.Containerd, args ...string) string {
	w.Helper()
	return w.ctrIn(w.ctx, c, args...)
}

func (w *world) ctrIn(ctx context.Context, c *harness.Containerd, args ...string) string {
	w.Helper()
	result, err := c.Ctr(ctx, args...)
	require.NoError(w, err)
	return result.Stdout
}

// pull pulls and returns what that asked the registry.
func (w *world) pull(c *harness.Containerd, snapshotter, ref string) harness.Requests {
	w.Helper()
	w.registry.Reset()
	w.ctr(c, "image", "pull", "--snapshotter", snapshotter, ref)
	return w.registry.Requests()
}

// run runs a command that prints something in a new container, and returns its output.
func (w *world) run(c *harness.Containerd, snapshotter, ref string, command ...string) string {
	w.Helper()
	result, err := w.printed(func() (harness.Result, error) {
		return c.RunContainer(w.ctx, snapshotter, ref, "e2e-run", command...)
	})
	require.NoError(w, err)
	return result.Stdout
}

// exec runs a command that prints something in a container that is running, and returns its output.
func (w *world) exec(c *harness.Containerd, id string, command ...string) string {
	w.Helper()
	result, err := w.printed(func() (harness.Result, error) {
		return c.Ctr(w.ctx, append([]string{"task", "exec", "--exec-id", fmt.Sprint("e", time.Now().UnixNano()), id}, command...)...)
	})
	require.NoError(w, err)
	return result.Stdout
}

// printed has ctr run a command that prints something. As soon as a task has ended, ctr closes what it copies the output
// from (containerd 2.4, cio's cancel): of one run in a thousand on a busy machine nothing is left. Then it is run again.
func (w *world) printed(run func() (harness.Result, error)) (result harness.Result, err error) {
	w.Helper()
	for range 5 {
		if result, err = run(); err != nil || result.Stdout != "" {
			break
		}
		w.Log("ctr has no output, and runs the command again")
	}
	return result, err
}

// printedAndFailed is printed for a command that fails. If it is ctr that fails, that says so.
func (w *world) printedAndFailed(run func() (harness.Result, error)) (result harness.Result, err error) {
	w.Helper()
	result, _ = w.printed(func() (r harness.Result, ctrFailed error) {
		r, err = run()
		if strings.Contains(r.Stderr, "ctr: ") {
			ctrFailed = err
		}
		return r, ctrFailed
	})
	return result, err
}

// exportTar has ctr write an image into a tar. Nobody in ctr waits until all that containerd sent is written (containerd
// 2.4, ImageExportStream.MarshalAny): on a busy machine it may end before, and well. Then it is run again.
func (w *world) exportTar(ctx context.Context, c *harness.Containerd, file, ref string) {
	w.Helper()
	for range 5 {
		w.ctrIn(ctx, c, "image", "export", file, ref)
		b, err := os.ReadFile(file)
		require.NoError(w, err)
		if bytes.HasSuffix(b, make([]byte, 1024)) { // as a tar ends
			return
		}
		w.Logf("ctr has written %d bytes, and not the end of the tar; it writes it again", len(b))
	}
	w.Fatalf("ctr does not write all of %s", ref)
}

// pid is the process of a container of the worker's.
func (w *world) pid(id string) int {
	w.Helper()
	container, err := w.worker.Client().LoadContainer(w.ctx, id)
	require.NoError(w, err)
	task, err := container.Task(w.ctx, nil)
	require.NoError(w, err)
	return int(task.Pid())
}

// manifest reads the manifest of an image that a containerd has.
func (w *world) manifest(c *harness.Containerd, ref string) ocispec.Manifest {
	w.Helper()
	image, err := c.Client().GetImage(w.ctx, ref)
	require.NoError(w, err)
	m, err := images.Manifest(w.ctx, c.Client().ContentStore(), image.Target(), platforms.Default())
	require.NoError(w, err)
	return m
}

// layers are the digests of an image's layers.
func (w *world) layers(name string) (digests []string) {
	w.Helper()
	for _, l := range w.manifest(w.builder, w.ref(name)).Layers {
		digests = append(digests, l.Digest.String())
	}
	return digests
}

// size is the number of bytes of an image's layers.
func (w *world) size(name string) (n int64) {
	w.Helper()
	for _, l := range w.manifest(w.builder, w.ref(name)).Layers {
		n += l.Size
	}
	return n
}

// view mounts an unpacked image's root read-only until the test ends.
func (w *world) view(c *harness.Containerd, snapshotter, ref string) string {
	w.Helper()
	return w.viewChain(c, snapshotter, w.chainID(c, ref))
}

// chainID is what an image's root is called by the snapshotters of a containerd.
func (w *world) chainID(c *harness.Containerd, ref string) string {
	w.Helper()
	image, err := c.Client().GetImage(w.ctx, ref)
	require.NoError(w, err)
	diffIDs, err := image.RootFS(w.ctx)
	require.NoError(w, err)
	return identity.ChainID(diffIDs).String()
}

func (w *world) viewChain(c *harness.Containerd, snapshotter, chainID string) string {
	w.Helper()
	dir, err := os.MkdirTemp(w.lab.Dir, "view-")
	require.NoError(w, err)
	key := filepath.Base(dir)
	// Without a lease containerd collects the view at the next opportunity.
	ctx, done, err := c.Client().WithLease(context.WithoutCancel(w.ctx))
	require.NoError(w, err)
	service := c.Client().SnapshotService(snapshotter)
	mounts, err := service.View(ctx, key, chainID)
	require.NoError(w, err)
	require.NoError(w, mount.All(mounts, dir))
	w.Cleanup(func() {
		require.NoError(w, mount.UnmountAll(dir, 0))
		require.NoError(w, service.Remove(ctx, key))
		require.NoError(w, done(ctx))
	})
	return dir
}

// eventually waits for what happens in the background, such as garbage collection.
func (w *world) eventually(what string, check func() bool) {
	w.Helper()
	require.Eventually(w, check, 2*time.Minute, 50*time.Millisecond, what)
}

// soon waits for what could wait for good, such as a read of a file system of ours: two minutes. f does not end the test.
func (w *world) soon(what string, f func()) {
	w.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f()
	}()
	select {
	case <-ended:
	case <-time.After(2 * time.Minute):
		w.Fatalf("%s: not within two minutes; what waits in the kernel:\n%s", what, w.blocked())
	}
}

// foundAgain waits for a containerd to reach a daemon that was away. If it tried in between, it dials again only after a
// while, and all that needs the snapshotter fails until then.
func (w *world) foundAgain(c *harness.Containerd) {
	w.Helper()
	service := c.Client().SnapshotService(lazy)
	w.eventually("containerd has found the daemon again", func() bool {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(w.ctx), 10*time.Second)
		defer cancel()
		seen := false
		err := service.Walk(ctx, func(context.Context, snapshots.Info) error { seen = true; return nil })
		if err != nil || seen {
			return err == nil
		}
		// Without snapshots containerd asks nobody.
		if _, err := service.Prepare(ctx, "e2e-found-again", ""); err != nil {
			return false
		}
		return service.Remove(ctx, "e2e-found-again") == nil
	})
}

// setConfig writes the configuration that the daemon has from its next start on.
func (w *world) setConfig(config string) {
	w.Helper()
	require.NoError(w, os.WriteFile(w.daemon.Config, []byte(config), 0o600))
}

// runAfterRestart runs images.SmallName on a daemon that was away.
func (w *world) runAfterRestart(ref string) {
	w.Helper()
	w.foundAgain(w.worker)
	require.Equal(w, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
}

// writeProgram writes a program in a process of its own. While this one has a file open for writing, so has each child
// that another test starts, until that runs its own program; and meanwhile nobody can run the file: it is busy.
func writeProgram(t testing.TB, path string, content []byte) {
	t.Helper()
	cmd := exec.Command("install", "-m", "755", "/dev/stdin", path)
	cmd.Stdin = bytes.NewReader(content)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// removeImage removes an image, and has containerd collect what nobody needs any more.
func (w *world) removeImage(c *harness.Containerd, ref string) {
	w.Helper()
	w.ctr(c, "image", "rm", "--sync", ref)
}

// snapshots are the keys of a snapshotter's snapshots in the context's namespace.
func (w *world) snapshots(ctx context.Context, c *harness.Containerd, snapshotter string) []string {
	w.Helper()
	text := w.ctrIn(ctx, c, "snapshots", "--snapshotter", snapshotter, "ls")
	var keys []string
	for line := range strings.Lines(text) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[0] != "KEY" {
			keys = append(keys, fields[0])
		}
	}
	return keys
}

// subject describes the manifest of the builder's image for an architecture.
func (w *world) subject(ref, arch string) ocispec.Descriptor {
	w.Helper()
	image, err := w.builder.Client().GetImage(w.ctx, ref)
	require.NoError(w, err)
	if images.IsManifestType(image.Target().MediaType) {
		return image.Target()
	}
	children, err := images.Children(w.ctx, w.builder.Client().ContentStore(), image.Target())
	require.NoError(w, err)
	for _, d := range children {
		if d.Platform != nil && d.Platform.Architecture == arch {
			return d
		}
	}
	require.Fail(w, "no manifest for "+arch)
	return ocispec.Descriptor{}
}

// requireReason finds in the daemon's log why an image is not lazy.
func (w *world) requireReason(ref, reason string) {
	w.Helper()
	for line := range strings.Lines(w.daemon.Log()) {
		if strings.Contains(line, notLazy) && strings.Contains(line, ref) && strings.Contains(line, reason) {
			return
		}
	}
	require.Fail(w, "no reason in the log", "want %q, %q and %q in one line of:\n%s", notLazy, ref, reason, w.daemon.Log())
}
