package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
)

// service is the daemon as a service of a real systemd.
type service struct {
	*world
	systemd *harness.Systemd
	install func(version string) // replaces its program
}

// newService has the daemon with a configuration, and its unit as it is delivered with more settings.
func newService(t *testing.T, config, settings string) service {
	w := &world{T: t, ctx: t.Context(), lab: harness.ForTest(t)}
	systemd, err := w.lab.StartSystemd(w.ctx)
	require.NoError(t, err)
	w.registry, err = w.lab.StartRegistry(w.ctx)
	require.NoError(t, err)
	w.builder, err = w.lab.StartContainerd(w.ctx, "builder", nil)
	require.NoError(t, err)
	program, install := w.replaceable()
	w.daemon, err = systemd.StartDaemon(w.ctx, "daemon", program, config+"[fill]\nmode = 'off'\n", settings)
	require.NoError(t, err)
	w.worker, err = w.lab.StartContainerd(w.ctx, "worker", w.daemon)
	require.NoError(t, err)
	w.addSmall()
	return service{w, systemd, install}
}

func (s service) systemctl(args ...string) {
	s.Helper()
	_, err := s.systemd.Ctl(s.ctx, append(args, harness.Service)...)
	require.NoError(s, err)
}

func (s service) shows(property string) string {
	s.Helper()
	value, err := s.systemd.Show(s.ctx, property)
	require.NoError(s, err)
	return value
}

// restart has systemd restart the daemon from its program as it is now.
func (s service) restart() {
	s.Helper()
	s.systemctl("restart")
	var pids []int
	s.eventually("there is one daemon", func() bool {
		pids = s.processes("containerd-clip-grpc --config")
		return len(pids) == 1
	})
	s.requireRuns(pids[0], s.daemon.Program)
}

// kept is how many descriptors systemd has of the service.
func (s service) kept() int {
	s.Helper()
	n, err := strconv.Atoi(s.shows("NFileDescriptorStore"))
	require.NoError(s, err)
	return n
}

func (s service) version() int {
	s.Helper()
	r, err := s.systemd.Ctl(s.ctx, "--version")
	require.NoError(s, err)
	n, err := strconv.Atoi(strings.Fields(r.Stdout)[1])
	require.NoError(s, err)
	return n
}

// TestService has a real systemd kill, restart, stop and start the daemon below 20 busy containers.
func TestService(t *testing.T) {
	s := newService(t, "", "")
	r := newReaders(s.world)
	s.pull(s.worker, lazy, r.ref)
	r.start(20)
	if s.version() >= 254 {
		require.Positive(t, s.kept())
		require.Empty(t, s.keepers())
	} else {
		require.Zero(t, s.kept(), "it would not outlive a stop")
		groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", s.keeper()))
		require.NoError(t, err)
		require.Contains(t, string(groups), "/containerd-clip-keeper\n", "it is not in the service's")
	}
	r.requireShortPause("restart", s.restart)
	r.requireShortPause("upgrade", func() { s.install("1"); s.restart() })
	var away time.Duration
	for _, args := range [][]string{{"restart"}, {"kill", "--signal=KILL", "--kill-who=main"}, {"kill", "--signal=KILL"}, {"kill", "--signal=ABRT"}, {"restart"}} {
		dropCaches(t)
		before, began := s.shows("ExecMainPID"), time.Now()
		s.systemctl(args...)
		s.eventually("another process", func() bool { return s.shows("ExecMainPID") != before && s.shows("ActiveState") == "active" })
		away = max(away, time.Since(began))
	}
	r.requireGoOn()
	t.Logf("from what ended the daemon to its being ready again: at most %v", away.Round(time.Millisecond))

	s.systemctl("stop")
	require.Equal(t, "inactive", s.shows("ActiveState"))
	require.NotEmpty(t, harness.MountsUnder(s.daemon.Root), "the containers' root")
	s.systemctl("start")
	r.requireGoOn()
	r.end()
	s.requireGone(r.ref)
}

// TestServiceStore has systemd's store hold the connections, in whatever version.
func TestServiceStore(t *testing.T) {
	s := newService(t, "[mount]\nmode = 'fuse'\n", "Environment=FDSTORE=4096")
	r := newReaders(s.world)
	s.pull(s.worker, lazy, r.ref)
	r.start(3)
	require.Positive(t, s.kept())
	for range 5 {
		dropCaches(t)
		before := s.shows("ExecMainPID")
		s.systemctl("kill", "--signal=KILL")
		s.eventually("another process", func() bool { return s.shows("ExecMainPID") != before && s.shows("ActiveState") == "active" })
		s.systemctl("restart")
	}
	r.requireGoOn()
	require.Positive(t, s.kept())
	require.Empty(t, s.keepers())
	r.end()
	before := s.kept()
	s.removeImage(s.worker, r.ref)
	s.eventually("systemd lets go", func() bool { return s.kept() < before })
	s.requireGone(r.ref)
}

// TestServiceHangs has a daemon that is there and does nothing: systemd's watchdog starts another, and not while the
// daemon is heard from.
func TestServiceHangs(t *testing.T) {
	// The daemon says every five seconds that it is there, and a slow machine may keep it from that for a while.
	s := newService(t, "", "WatchdogSec=15s\nTimeoutAbortSec=1s")
	r := newReaders(s.world)
	s.pull(s.worker, lazy, r.ref)
	r.start(1)
	before, heard := s.shows("ExecMainPID"), s.shows("WatchdogTimestampMonotonic")
	for range 3 {
		s.eventually("the daemon is heard from", func() bool { return s.shows("WatchdogTimestampMonotonic") != heard })
		heard = s.shows("WatchdogTimestampMonotonic")
	}
	require.Equal(t, before, s.shows("ExecMainPID"), "it was heard from, and ended all the same")
	s.systemctl("kill", "--signal=STOP", "--kill-who=main")
	dropCaches(t)
	s.eventually("another process", func() bool { return s.shows("ExecMainPID") != before && s.shows("ActiveState") == "active" })
	r.requireGoOn()
	r.end()
	s.requireGone(r.ref)
}

// requireGone removes the image and stops the service, which leaves nothing.
func (s service) requireGone(ref string) {
	s.Helper()
	s.foundAgain(s.worker)
	s.removeImage(s.worker, ref)
	s.eventually("roots are removed", func() bool { return len(harness.MountsUnder(filepath.Join(s.daemon.Root, "roots"))) == 0 })
	s.systemctl("stop")
	require.Equal(s, "inactive", s.shows("ActiveState"), "%s", s.shows("Result"))
	s.eventually("the keeper ends", func() bool { return len(s.keepers()) == 0 })
	require.Empty(s, harness.MountsUnder(s.daemon.Root))
	require.Zero(s, s.kept())
}
