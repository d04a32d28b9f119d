package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// containerdUnit is what containerd's own unit says, as far as it matters to others.
const containerdUnit = `[Unit]
Description=containerd
[Service]
Type=notify
ExecStart=/usr/local/bin/containerd
Delegate=yes
KillMode=process
Restart=always
`

const installer = "example.com/containerd-clip-installer:dev"

// node is a machine with systemd and containerd, and what the DaemonSet's pods run.
type node struct {
	*world
	systemd *harness.Systemd
	payload string // what the installer's image has for a node
}

func newNode(t *testing.T) node {
	w := &world{T: t, ctx: t.Context(), lab: harness.ForTest(t)}
	n := node{world: w, payload: w.lab.Path("image", "payload")}
	var err error
	n.systemd, err = w.lab.StartSystemd(w.ctx)
	require.NoError(t, err)
	w.registry, err = w.lab.StartRegistry(w.ctx)
	require.NoError(t, err)
	w.builder, err = w.lab.StartContainerd(w.ctx, "builder", nil)
	require.NoError(t, err)
	w.addSmall()
	for _, program := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
		path, err := w.lab.Look(program)
		require.NoError(t, err)
		require.NoError(t, os.Symlink(path, w.lab.Path("node/usr/local/bin", program)))
	}
	require.NoError(t, n.systemd.StartService(w.ctx, "containerd.service", containerdUnit, ""))
	n.buildInstaller()
	return n
}

// buildInstaller builds the installer's image on an image with a shell, for what is downloaded elsewhere.
func (n node) buildInstaller() {
	n.Helper()
	installed, err := harness.Installed()
	require.NoError(n, err)
	top, err := harness.Top()
	require.NoError(n, err)
	dir := filepath.Dir(n.payload)
	// Not the lab's: Go keeps at home what it has compiled.
	out, err := exec.CommandContext(n.ctx, "make", "-s", "-C", top, "image-files", "BUILT="+installed.Product, "IMAGE="+dir).CombinedOutput()
	require.NoError(n, err, "%s", out)
	b, err := n.lab.StartBuildkit(n.ctx, "buildkit", n.builder, eager, n.registry)
	require.NoError(n, err)
	_, err = b.BuildWith(n.ctx, dir, "type=image,name="+installer+",push=false", "--local", "dockerfile="+filepath.Join(top, "packaging"),
		"--opt", "context:debian:12-slim=docker-image://"+n.ref(images.SmallName))
	require.NoError(n, err)
}

// runInstaller runs the pod of the DaemonSet: privileged, with the node's processes and its root.
func (n node) runInstaller(flags ...string) (harness.Result, error) {
	return n.builder.RunContainerWith(n.ctx, append(flags, "--privileged", "--with-ns", fmt.Sprintf("pid:/proc/%d/ns/pid", n.systemd.Pid()),
		"--mount", "type=bind,src="+n.lab.Path("node")+",dst=/host,options=rbind:rw"), eager, installer, "installer")
}

func (n node) install() string {
	n.Helper()
	result, err := n.printed(func() (harness.Result, error) { return n.runInstaller() })
	require.NoError(n, err)
	return result.Stdout
}

// installUntil has the pod end before it runs a command on the node.
func (n node) installUntil(command string) {
	n.Helper()
	script := "#!/bin/sh\n[ \"$*\" != '" + command + "' ] || exit 1\nexec nsenter --target 1 --mount --uts --ipc --net -- \"$@\"\n"
	writeProgram(n, n.lab.Path("node/on-host"), []byte(script))
	_, err := n.runInstaller("--env", "ON_HOST=/host/on-host")
	require.Error(n, err)
}

func (n node) on(program string, args ...string) string {
	n.Helper()
	result, err := n.systemd.Run(n.ctx, program, args...)
	require.NoError(n, err)
	return result.Stdout
}

// prints has ctr on the node run a command that prints something.
func (n node) prints(args ...string) string {
	n.Helper()
	result, err := n.printed(func() (harness.Result, error) { return n.systemd.Run(n.ctx, "ctr", args...) })
	require.NoError(n, err)
	return result.Stdout
}

func (n node) shows(service, property string) string {
	n.Helper()
	return strings.TrimSpace(n.on("systemctl", "show", "--value", "--property", property, service))
}

// files are those of ours that the node has.
func (n node) files() (names []string) {
	n.Helper()
	text := n.on("find", "/usr/local", "/etc/containerd", "/var/lib", "/run", "-path", "*clip*", "-print")
	return strings.Fields(text)
}

// TestNode has the image of the DaemonSet install onto a node, upgrade it, and be taken from it, with a systemd and a
// containerd that do what they are told.
//
// It runs alone: the node's mount namespace would keep what other tests have mounted when it begins.
func TestNode(t *testing.T) {
	n := newNode(t)
	n.index(images.SmallName)
	ref := n.ref(images.SmallName)
	require.NotContains(t, n.on("ctr", "plugins", "ls"), " clip ")

	n.installUntil("systemctl restart containerd.service")
	require.NotContains(t, n.on("ctr", "plugins", "ls"), " clip ")
	require.Contains(t, n.install(), "containerd-clip is on this node")
	require.Equal(t, "active", n.shows(harness.Service, "ActiveState"))
	require.Equal(t, "enabled", n.shows(harness.Service, "UnitFileState"))
	require.Regexp(t, `io\.containerd\.snapshotter\.v1 +clip +.*ok`, n.on("ctr", "plugins", "ls"))
	require.Regexp(t, `(?s)cri.v1.images'\]\s+snapshotter = 'clip'`, n.on("containerd", "config", "dump"))
	n.on("clipctl", "doctor")

	n.registry.Reset()
	n.on("ctr", "image", "pull", "--plain-http", "--snapshotter", lazy, ref)
	require.Empty(t, n.registry.Requests().Gets(n.layers(images.SmallName)...))
	n.on("ctr", "run", "--cpu-shares", "0", "--detach", "--snapshotter", lazy, ref, "web", "sleep", "10000")
	daemon, containerd := n.shows(harness.Service, "ExecMainPID"), n.shows("containerd.service", "ExecMainPID")

	n.install()
	require.Equal(t, daemon, n.shows(harness.Service, "ExecMainPID"), "nothing has changed")
	require.NoError(t, os.Truncate(n.lab.Path("node/usr/local/bin/clipctl"), 0))
	n.installUntil("systemctl restart containerd-clip-grpc.service")
	require.Equal(t, daemon, n.shows(harness.Service, "ExecMainPID"), "that of the old version")
	n.install()
	require.NotEqual(t, daemon, n.shows(harness.Service, "ExecMainPID"), "a new version")
	require.Equal(t, containerd, n.shows("containerd.service", "ExecMainPID"), "which containerd does not see")
	require.Equal(t, "hello from clip\n", n.prints("task", "exec", "--exec-id", "e", "web", "sh", "/app/run.sh"))

	_, err := n.systemd.Run(n.ctx, "containerd-clip-uninstall")
	require.ErrorContains(t, err, "remove them first")
	require.Equal(t, "hello from clip\n", n.prints("task", "exec", "--exec-id", "f", "web", "sh", "/app/run.sh"))
	n.on("ctr", "task", "rm", "--force", "web")
	n.on("ctr", "container", "rm", "web")
	n.on("ctr", "image", "rm", "--sync", ref)
	n.on("containerd-clip-uninstall")
	require.Empty(t, n.files())
	require.NotContains(t, n.on("containerd", "config", "dump"), "clip")
	require.NotContains(t, n.on("ctr", "plugins", "ls"), " clip ")
	n.on("ctr", "image", "pull", "--plain-http", ref)
	require.Equal(t, "hello from clip\n", n.prints("run", "--cpu-shares", "0", "--rm", ref, "ordinary", "sh", "/app/run.sh"))
}
