package snapshotter

import (
	"context"
	"errors"
	"flag"
	"net"
	"os"
	"path/filepath"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// TestMain sets the flag without which containerd's suite skips what needs root.
func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.root", "true"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// suiteName tells the suite that directories of lower layers cannot be renamed.
const suiteName = "overlayfs"

func TestConformance(t *testing.T) {
	testsuite.SnapshotterSuite(t, suiteName, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		sn, err := New(ctx, Options{Root: root})
		if err != nil {
			return nil, nil, err
		}
		return sn, sn.Close, nil
	})
}

// TestConformanceOverGRPC runs the suite as containerd sees the snapshotter.
func TestConformanceOverGRPC(t *testing.T) {
	testsuite.SnapshotterSuite(t, suiteName, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		sn, err := New(ctx, Options{Root: root})
		if err != nil {
			return nil, nil, err
		}
		remote, stop, err := serve(sn, filepath.Join(filepath.Dir(root), "sock"))
		if err != nil {
			return nil, nil, errors.Join(err, sn.Close())
		}
		return remote, func() error { return errors.Join(stop(), sn.Close()) }, nil
	})
}

// serve returns sn as seen through a socket.
func serve(sn snapshots.Snapshotter, socket string) (snapshots.Snapshotter, func() error, error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		server.Stop()
		return nil, nil, errors.Join(err, <-ended)
	}
	stop := func() error {
		err := conn.Close()
		server.Stop()
		return errors.Join(err, <-ended)
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "clip"), stop, nil
}
