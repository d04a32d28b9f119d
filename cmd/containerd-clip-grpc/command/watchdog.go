package command

import (
	"context"
	"time"

	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/beam-cloud/containerd-clip/snapshotter/fuseconn"
)

// stuckAfter is the age of a request of the kernel from which on the daemon
// counts as stuck. Its reader got an error earlier than that, and only a new
// process frees what answers it.
const stuckAfter = fuseconn.AnswerTimeout + 30*time.Second

// feedWatchdog tells systemd that the daemon works, until ctx ends, if the unit
// has a WatchdogSec: systemd kills and starts again what it does not hear from.
func feedWatchdog(ctx context.Context, inFlight func() (int, time.Duration)) error {
	period, err := daemon.SdWatchdogEnabled(false)
	if err != nil || period == 0 {
		return err
	}
	go func() {
		tick := time.NewTicker(period / 3)
		defer tick.Stop()
		for stuck := false; ; {
			n, oldest := inFlight()
			switch {
			case oldest < stuckAfter:
				stuck = false
				if _, err := daemon.SdNotify(false, daemon.SdNotifyWatchdog); err != nil {
					log.G(ctx).WithError(err).Warn("cannot tell systemd's watchdog that the daemon works")
				}
			case !stuck:
				stuck = true
				log.G(ctx).WithField("requests", n).WithField("oldest", oldest).
					Error("reads of containers are stuck in the daemon; systemd's watchdog is to start it again")
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return nil
}
