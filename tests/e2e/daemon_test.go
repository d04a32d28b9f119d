package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestDefaultConfig starts a daemon with the configuration that it prints as its default.
func TestDefaultConfig(t *testing.T) {
	t.Parallel()
	lab := harness.ForTest(t)
	printed, err := lab.Run(t.Context(), "containerd-clip-grpc", "config", "default")
	require.NoError(t, err)
	require.Contains(t, printed.Stdout, "/var/lib/containerd-clip-grpc")
	daemon, err := lab.StartDaemon(t.Context(), "daemon", printed.Stdout)
	require.NoError(t, err)
	require.DirExists(t, filepath.Join(daemon.Root, "archives"), "the flags come before the file")
}

// TestBadConfig starts daemons that cannot start: they say why, and end.
func TestBadConfig(t *testing.T) {
	t.Parallel()
	lab := harness.ForTest(t)
	running, err := lab.StartDaemon(t.Context(), "running", "")
	require.NoError(t, err)
	for name, c := range map[string]struct {
		config string
		args   []string
		says   string
	}{
		"not TOML":         {config: "root = [", says: "config.toml"},
		"unknown key":      {config: "rooot = '/x'", says: "rooot"},
		"no such file":     {args: []string{"--config", "/no/such/file"}, says: "/no/such/file"},
		"bad level":        {args: []string{"--log-level", "chatty"}, says: "chatty"},
		"relative root":    {args: []string{"--root", "state"}, says: "state"},
		"root in use":      {args: []string{"--root", running.Root}, says: running.Root},
		"socket in use":    {args: []string{"--address", running.Socket}, says: running.Socket},
		"root is a file":   {args: []string{"--root", running.Config}, says: running.Config},
		"unknown argument": {args: []string{"serve"}, says: "serve"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "config.toml")
			require.NoError(t, os.WriteFile(file, []byte(c.config), 0o600))
			args := append([]string{"--config", file, "--root", filepath.Join(dir, "root"), "--address", filepath.Join(dir, "s")}, c.args...)
			result, err := lab.Run(t.Context(), "containerd-clip-grpc", args...)
			require.Error(t, err)
			require.Positive(t, result.Code)
			requireClear(t, result.Stderr, c.says)
			require.Empty(t, harness.MountsUnder(dir))
		})
	}
	require.True(t, running.Running())
}

// TestTwoDaemons has two workers on one machine.
func TestTwoDaemons(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, fillLate)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	daemon, err := w.lab.StartDaemon(w.ctx, "daemon2", fillLate)
	require.NoError(t, err)
	worker, err := w.lab.StartContainerd(w.ctx, "worker2", daemon)
	require.NoError(t, err)
	for _, c := range []*harness.Containerd{w.worker, worker} {
		require.Empty(t, w.pull(c, lazy, ref).Gets(w.layers(images.SmallName)...))
		require.Equal(t, "hello from clip\n", w.run(c, lazy, ref, "sh", "/app/run.sh"))
	}
	require.NoError(t, w.daemon.Stop())
	require.Equal(t, "hello from clip\n", w.run(worker, lazy, ref, "sh", "/app/run.sh"))
}

// TestDaemonRestart stops and starts the daemon, and kills it, between two containers. It comes back without the
// registry, and with what it had fetched.
func TestDaemonRestart(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*harness.Daemon) error{
		"stopped": func(d *harness.Daemon) error { return d.Stop() },
		"killed":  func(d *harness.Daemon) error { d.Kill(); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			ref := w.ref(images.SmallName)
			w.index(images.SmallName)
			w.pull(w.worker, lazy, ref)
			require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
			require.NoError(t, end(w.daemon))
			require.NoError(t, w.registry.SwitchOff())
			require.NoError(t, w.lab.RestartDaemon(w.ctx, w.daemon))
			require.NoError(t, w.registry.SwitchOn())
			w.runAfterRestart(ref)
			stock := w.stock()
			w.pull(stock, eager, ref)
			requireSameRoot(w, stock, ref)
		})
	}
}

// reboot leaves of the worker, which has one container, what a power cut would, and starts it again: what is on disk, but
// for what is below /run elsewhere. Nothing runs, and nothing is mounted.
func (w *world) reboot(container string) {
	w.Helper()
	task := w.pid(container)
	w.daemon.Kill()
	w.worker.Kill()
	pids := append(w.processes("-address "+w.worker.Socket), task) // shims, which do not get to clean up
	for _, pid := range append(pids, w.keepers()...) {
		require.NoError(w, unix.Kill(pid, unix.SIGKILL))
	}
	for _, dir := range []string{w.lab.Path("worker"), w.daemon.Root} {
		for _, point := range slices.Backward(harness.MountsUnder(dir)) {
			require.NoError(w, unix.Unmount(point, unix.MNT_DETACH))
		}
	}
	for _, run := range []string{w.lab.Path("worker", "state"), w.lab.Path("worker", "runc"), w.worker.Socket, w.daemon.Socket} {
		require.NoError(w, os.RemoveAll(run))
	}
	w.eventually("no keeper", func() bool { return len(w.keepers()) == 0 })
	dropCaches(w.T)
	require.NoError(w, w.lab.RestartDaemon(w.ctx, w.daemon))
	require.NoError(w, w.lab.RestartContainerd(w.ctx, w.worker))
}

// requireSurvivesReboot starts a container again after a power cut: it has its image, and what it wrote.
func (w *world) requireSurvivesReboot(ref string) {
	w.Helper()
	const id = "survivor"
	root, roots := func() string { return fmt.Sprintf("/proc/%d/root", w.pid(id)) }, filepath.Join(w.daemon.Root, "roots")
	require.NoError(w, w.worker.StartContainer(w.ctx, lazy, ref, id, "sleep", "1000"))
	want, err := sumOf(filepath.Join(root(), noise))
	require.NoError(w, err)
	require.NoError(w, os.WriteFile(filepath.Join(root(), "written"), []byte("by a container"), 0o600))
	w.reboot(id)
	require.Empty(w, harness.MountsUnder(roots))
	w.ctr(w.worker, "task", "start", "--detach", "--fifo-dir", w.lab.Path("worker", "fifo"), id)
	require.Len(w, harness.MountsUnder(roots), 1)
	got, err := sumOf(filepath.Join(root(), noise))
	require.NoError(w, err)
	require.Equal(w, want, got)
	text, err := os.ReadFile(filepath.Join(root(), "written"))
	require.NoError(w, err)
	require.Equal(w, "by a container", string(text))
	require.NoError(w, w.worker.RemoveContainer(w.ctx, id))
}

// TestNamespaceFlag indexes an image of another namespace than the default one.
func TestNamespaceFlag(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := namespaces.WithNamespace(w.ctx, "other")
	w.ctrIn(ctx, w.builder, "image", "import", "--no-unpack", w.lab.Path("small.tar"))
	file := w.lab.Path("x.clip")
	w.ctr(w.builder, "image", "rm", images.BaseName)
	args := []string{"-a", w.builder.Socket, "index", images.BaseName, "-o", file}
	result, err := w.lab.Run(w.ctx, "clipctl", args...)
	require.Error(t, err)
	requireClear(t, result.Stderr, images.BaseName)
	_, err = w.lab.Run(w.ctx, "clipctl", append([]string{"-n", "other"}, args...)...)
	require.NoError(t, err)
	require.FileExists(t, file)
}

// TestProgress shows progress on a terminal and lines elsewhere.
func TestProgress(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	args := []string{"index", "oci:" + w.layout.Dir + ":busybox", "--storage-ref", w.ref(images.SmallName), "-o", w.lab.Path("x.clip")}
	result, err := w.builder.Clipctl(w.ctx, args...)
	require.NoError(t, err)
	for _, layer := range w.layers(images.SmallName) {
		require.Contains(t, result.Stderr, layer)
	}
	require.NotContains(t, result.Output(), "\x1b", "no escape sequences in a file")

	options, err := harness.Installed()
	require.NoError(t, err)
	words := append([]string{filepath.Join(options.Product, "clipctl")}, append(args, "--cache-dir", w.lab.Path("script-cache"))...)
	screen, err := exec.CommandContext(w.ctx, "script", "--quiet", "--return", "--command", strings.Join(words, " "), w.lab.Path("typescript")).CombinedOutput()
	require.NoError(t, err, string(screen))
	require.Contains(t, string(screen), "\x1b", "a terminal is drawn on:\n%s", screen)
	require.Contains(t, string(screen), "x.clip")
}

// TestFullDisk writes an archive where there is no room, and where nothing can be written.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for name, c := range map[string]struct {
		flags   uintptr
		options string
		says    string
	}{
		"full":      {options: "size=16k", says: "no space left on device"},
		"read-only": {flags: unix.MS_RDONLY, says: "read-only file system"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := w.lab.Path(name)
			require.NoError(t, os.Mkdir(dir, 0o700))
			require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", c.flags, c.options))
			result, err := w.builder.Clipctl(w.ctx, "index", w.ref(images.SmallName), "-o", filepath.Join(dir, "x.clip"))
			require.Error(t, err)
			requireClear(t, result.Stderr, c.says, dir)
			require.Empty(t, filesIn(t, dir))
		})
	}
}
