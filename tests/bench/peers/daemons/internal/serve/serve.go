// Package serve runs a peer's snapshotter as a daemon with the flags that its own daemon has.
package serve

import (
	"context"
	"flag"
	"io"
	stdlog "log"
	"net"
	"os/signal"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// Main parses the flags, has open make the snapshotter from a configuration file and a directory, and serves it until
// SIGTERM or SIGINT. A configuration file of "" is none.
func Main(open func(ctx context.Context, config, root string) (snapshots.Snapshotter, error)) {
	address := flag.String("address", "", "`socket` to listen on")
	config := flag.String("config", "", "configuration `file`")
	root := flag.String("root", "", "`directory` of the snapshots")
	level := flag.String("log-level", "info", "`level` of the log")
	flag.Parse()
	if err := log.SetLevel(*level); err != nil {
		log.L.Fatal(err)
	}
	stdlog.SetOutput(io.Discard) // go-fuse says there what the daemons show at level debug
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	s, err := open(ctx, *config, *root)
	if err != nil {
		log.L.WithError(err).Fatal("making the snapshotter")
	}
	if err := serve(ctx, *address, s); err != nil {
		log.L.WithError(err).Fatal("serving")
	}
	if err := s.Close(); err != nil { // it unmounts
		log.L.WithError(err).Fatal("closing the snapshotter")
	}
}

func serve(ctx context.Context, address string, s snapshots.Snapshotter) error {
	l, err := net.Listen("unix", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	context.AfterFunc(ctx, server.Stop)
	return server.Serve(l)
}
