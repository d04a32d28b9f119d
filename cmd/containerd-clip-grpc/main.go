// Command containerd-clip-grpc is the lazy snapshotter daemon that containerd
// talks to as a proxy plugin.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/cmd/containerd-clip-grpc/command"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := command.New().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "containerd-clip-grpc:", err)
		os.Exit(1)
	}
}
