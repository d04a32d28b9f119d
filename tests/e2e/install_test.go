package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestSetup tells a containerd that ran without the snapshotter about it, and takes that back while images that it
// pulled are there: containerd goes on as if nothing had been.
func TestSetup(t *testing.T) {
	t.Parallel()
	w := workerlessWorld(t, "")
	w.addSmall()
	w.index(images.SmallName)
	var err error
	w.worker, err = w.lab.StartContainerd(w.ctx, "worker", nil)
	require.NoError(t, err)
	ref := w.ref(images.SmallName)
	setup := func(args ...string) {
		t.Helper()
		_, err := w.worker.Clipctl(w.ctx, append([]string{"setup", "--containerd-config", w.lab.Path("worker", "config.toml"),
			"--clip-root", w.daemon.Root, "--clip-address", w.daemon.Socket}, args...)...)
		require.NoError(t, err)
		require.NoError(t, w.worker.Stop())
		require.NoError(t, w.lab.RestartContainerd(w.ctx, w.worker))
	}
	setup()
	require.Empty(t, w.pull(w.worker, lazy, ref).Gets(w.layers(images.SmallName)...))
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))

	require.NoError(t, w.daemon.Stop())
	setup("--remove")
	require.NotContains(t, w.ctr(w.worker, "plugins", "ls"), " clip ")
	w.pull(w.worker, eager, ref)
	require.Equal(t, "hello from clip\n", w.run(w.worker, eager, ref, "sh", "/app/run.sh"))
	w.removeImage(w.worker, ref)
	w.eventually("no snapshots", func() bool { return len(w.snapshots(w.ctx, w.worker, eager)) == 0 })
}

// machine is a root with what the package's scripts need: a shell, containerd, and dpkg's files.
type machine struct {
	*testing.T
	root string
	said string // to the standard error of the last command
}

func newMachine(t *testing.T, containerdConfig string) *machine {
	t.Helper()
	installed, err := harness.Installed()
	require.NoError(t, err)
	m := &machine{T: t, root: t.TempDir()}
	for _, dir := range []string{"bin", "dev", "usr/bin", "tmp", "etc/containerd", "var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers"} {
		require.NoError(t, os.MkdirAll(m.path(dir), 0o755))
	}
	for from, to := range map[string]string{"/bin/busybox": "bin/busybox", filepath.Join(installed.Parts, "containerd"): "usr/bin/containerd"} {
		b, err := os.ReadFile(from)
		require.NoError(t, err)
		writeProgram(t, m.path(to), b)
	}
	for _, applet := range []string{"sh", "grep", "rm"} {
		require.NoError(t, os.Symlink("busybox", m.path("bin", applet)))
	}
	require.NoError(t, os.WriteFile(m.path("var/lib/dpkg/status"), nil, 0o644))
	require.NoError(t, os.WriteFile(m.path("dev/null"), nil, 0o666)) // good enough to write to
	require.NoError(t, os.WriteFile(m.path("etc/containerd/config.toml"), []byte(containerdConfig), 0o644))
	return m
}

func (m *machine) path(elem ...string) string {
	return filepath.Join(append([]string{m.root}, elem...)...)
}

func (m *machine) command(name string, args ...string) string {
	m.Helper()
	var out, said bytes.Buffer
	cmd := exec.CommandContext(m.Context(), name, args...)
	cmd.Env = append(os.Environ(), "DEB_COMPRESSION=none")
	cmd.Stdout, cmd.Stderr = &out, &said
	require.NoError(m, cmd.Run(), "%s %s: %s%s", name, args, &out, &said)
	m.said = said.String()
	return out.String()
}

// dpkg runs dpkg on the machine, and inside runs a program in it.
func (m *machine) dpkg(args ...string) string {
	m.Helper()
	return m.command("dpkg", append([]string{"--root=" + m.root, "--force-depends"}, args...)...)
}

func (m *machine) inside(args ...string) string {
	m.Helper()
	return m.command("chroot", append([]string{m.root}, args...)...)
}

// clipFiles are the names of all files of ours.
func (m *machine) clipFiles() (names []string) {
	m.Helper()
	require.NoError(m, filepath.WalkDir(m.root, func(path string, d os.DirEntry, err error) error {
		if err == nil && strings.Contains(d.Name(), "clip") && !strings.HasPrefix(path, m.path("var/lib/dpkg")) {
			names = append(names, strings.TrimPrefix(path, m.root))
		}
		return err
	}))
	return names
}

// requireCompletion says that shells find what completes clipctl where they look for it, below share.
func (m *machine) requireCompletion(share, zsh string) {
	m.Helper()
	for file, says := range map[string]string{
		"bash-completion/completions/clipctl":    "complete -o default -F __start_clipctl clipctl",
		filepath.Join(zsh, "_clipctl"):           "#compdef clipctl",
		"fish/vendor_completions.d/clipctl.fish": "complete -c clipctl",
	} {
		b, err := os.ReadFile(m.path(share, file))
		require.NoError(m, err)
		require.Contains(m, string(b), says, file)
	}
}

// withSystemd gives the machine a systemctl that does nothing, and returns what was asked of it since the last call.
func (m *machine) withSystemd() (asked func() []string) {
	m.Helper()
	require.NoError(m, os.MkdirAll(m.path("run/systemd/system"), 0o755))
	log := m.path("systemctl.log")
	writeProgram(m, m.path("bin/systemctl"), []byte("#!/bin/sh\necho $* >>/systemctl.log\n"))
	return func() []string {
		text, err := os.ReadFile(log)
		require.NoError(m, err)
		require.NoError(m, os.Remove(log))
		return strings.Split(strings.TrimSpace(strings.ReplaceAll(string(text), "containerd-clip-grpc.service", "it")), "\n")
	}
}

// requireRefusal has the package not be removed while roots are mounted, wherever they are.
func (m *machine) requireRefusal(asked func() []string) {
	m.Helper()
	require.NoError(m, os.Mkdir(m.path("proc"), 0o755))
	for _, mounted := range []string{"/srv/clip/roots/7/image /srv/clip/roots/7/mnt erofs ro 0 0\n", "clip /srv/clip/roots/12/mnt fuse.clip ro 0 0\n"} {
		require.NoError(m, os.WriteFile(m.path("proc/mounts"), []byte(mounted), 0o644))
		out, err := exec.CommandContext(m.Context(), "dpkg", "--root="+m.root, "--force-depends", "-r", "containerd-clip").CombinedOutput()
		require.Error(m, err)
		require.Contains(m, string(out), "remove them first")
		require.Equal(m, []string{"stop it", "start it"}, asked()[:2])
		require.FileExists(m, m.path("etc/containerd/conf.d/50-clip.toml"))
	}
	require.NoError(m, os.WriteFile(m.path("proc/mounts"), []byte("/dev/sda /srv/roots/7/mnt ext4 rw 0 0\n"), 0o644))
}

// TestPackage installs, upgrades, removes and purges the Debian package in a root of its own: containerd's configuration
// is right when it is there, and what it was when it is gone.
func TestPackage(t *testing.T) {
	t.Parallel()
	installed, err := harness.Installed()
	require.NoError(t, err)
	top, err := harness.Top()
	require.NoError(t, err)
	const config = "version = 3\n[debug]\n  level = \"warn\"\n"
	m := newMachine(t, config)
	arch := strings.TrimSpace(m.command("dpkg", "--print-architecture"))
	buildFor := func(arch, version string) string {
		file := filepath.Join(t.TempDir(), "clip.deb")
		m.command(filepath.Join(top, "packaging/deb"), installed.Product, arch, version, file)
		return file
	}
	build := func(version string) string { return buildFor(arch, version) }
	require.Equal(t, "riscv64\n", m.command("dpkg-deb", "--field", buildFor("riscv64", "1.0"), "Architecture"), "whatever this machine is")
	before := m.inside("containerd", "config", "dump")
	require.NotContains(t, before, "proxy_plugins.clip")

	first := build("1.0")
	one, err := os.ReadFile(first)
	require.NoError(t, err)
	other, err := os.ReadFile(build("1.0"))
	require.NoError(t, err)
	require.True(t, bytes.Equal(one, other), "the same input makes the same bytes")
	asked := m.withSystemd()
	m.dpkg("-i", first)
	require.Equal(t, []string{"enable --quiet it", "daemon-reload", "restart it"}, asked())
	require.Contains(t, m.said, `imports = ["/etc/containerd/conf.d/*.toml"]`, "it says what is left to do")
	require.Contains(t, m.inside("containerd-clip-grpc", "--help"), "snapshotter")
	unit, err := os.ReadFile(m.path("usr/lib/systemd/system/containerd-clip-grpc.service"))
	require.NoError(t, err)
	require.Contains(t, string(unit), "ExecStart=/usr/bin/containerd-clip-grpc")
	require.FileExists(t, m.path("etc/containerd/conf.d/50-clip.toml"))
	m.requireCompletion("usr/share", "zsh/vendor-completions")
	m.inside("clipctl", "setup", "--add-import")
	require.Contains(t, m.inside("containerd", "config", "dump"), "proxy_plugins.clip")

	require.Contains(t, m.dpkg("-i", build("1.1")), "50-clip.toml is as it should be")
	require.Contains(t, m.inside("containerd", "config", "dump"), "proxy_plugins.clip", "an upgrade leaves it alone")

	require.Equal(t, []string{"daemon-reload", "enable --quiet it", "daemon-reload", "restart it"}, asked(), "it is not stopped")
	m.requireRefusal(asked)

	state := m.path("var/lib/containerd-clip-grpc")
	require.NoError(t, os.MkdirAll(state, 0o700))
	m.dpkg("-r", "containerd-clip")
	require.Equal(t, []string{"stop it", "disable --quiet it", "daemon-reload"}, asked())
	require.Equal(t, []string{"/var/lib/containerd-clip-grpc"}, m.clipFiles())
	require.Equal(t, before, m.inside("containerd", "config", "dump"))
	now, err := os.ReadFile(m.path("etc/containerd/config.toml"))
	require.NoError(t, err)
	require.Equal(t, config, string(now))
	m.dpkg("-P", "containerd-clip")
	require.Empty(t, m.clipFiles())
}
