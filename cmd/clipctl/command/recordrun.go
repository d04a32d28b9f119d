package command

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
)

// snapshotterName is what containerd's configuration calls the daemon.
const snapshotterName = "clip"

// killAfter is how long a command that is to end may take.
const killAfter = 5 * time.Second

// runRecorded runs args in a container of the image that has a root of its own,
// for the period at most, and returns what was read of that root. What the
// command prints goes to stderr.
func runRecorded(ctx context.Context, daemon grpc.ClientConnInterface, client *containerd.Client, image containerd.Image, args []string, period time.Duration, stderr io.Writer) (doc record.Document, err error) {
	id := "clipctl-record-" + rand.Text()
	container, err := client.NewContainer(ctx, id,
		containerd.WithImage(image),
		containerd.WithSnapshotter(snapshotterName),
		containerd.WithNewSnapshot(id, image, snapshots.WithLabels(map[string]string{discover.LabelRecord: id})),
		containerd.WithNewSpec(oci.WithImageConfigArgs(image, args)),
	)
	if errdefs.IsNotFound(err) {
		return doc, fmt.Errorf("preparing a container (was the image pulled with \"ctr image pull --snapshotter %s %s\"?): %w", snapshotterName, image.Name(), err)
	}
	if err != nil {
		return doc, fmt.Errorf("preparing a container: %w", err)
	}
	// Ctrl-C must not leave a container behind.
	clean := context.WithoutCancel(ctx)
	defer func() {
		err = errors.Join(err, container.Delete(clean, containerd.WithSnapshotCleanup), collect(clean, client))
	}()
	task, err := container.NewTask(ctx, cio.NewCreator(cio.WithStreams(nil, stderr, stderr)))
	if err != nil {
		return doc, fmt.Errorf("starting a container: %w", err)
	}
	defer func() {
		_, derr := task.Delete(clean, containerd.WithProcessKill)
		err = errors.Join(err, derr)
	}()
	exited, err := task.Wait(clean)
	if err != nil {
		return doc, err
	}
	if err := task.Start(ctx); err != nil {
		return doc, fmt.Errorf("starting the command: %w", err)
	}
	if err := await(ctx, task, exited, period); err != nil {
		return doc, err
	}
	doc, err = record.Get(ctx, daemon, id)
	if err != nil {
		return doc, fmt.Errorf("asking the daemon what was read (is %s lazy? see clipctl status): %w", image.Name(), err)
	}
	return doc, nil
}

// collect has containerd remove what is no longer used: the root that was
// recorded stays mounted until then. Ending a lease is how one asks for it.
func collect(ctx context.Context, client *containerd.Client) error {
	lease, err := client.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour))
	if err != nil {
		return err
	}
	return client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete)
}

// await waits until the command has ended by itself, without an error, or the
// period has passed, and ends it then.
func await(ctx context.Context, task containerd.Task, exited <-chan containerd.ExitStatus, period time.Duration) error {
	select {
	case status := <-exited:
		if err := status.Error(); err != nil {
			return err
		}
		if code := status.ExitCode(); code != 0 {
			return fmt.Errorf("the command failed with exit code %d: nothing is recorded", code)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(period):
	}
	if err := task.Kill(ctx, unix.SIGTERM); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	select {
	case <-exited:
	case <-time.After(killAfter): // deleting the task kills it
	}
	return nil
}
