// Command containerd is containerd with our plugins compiled in: the export
// (image store -> OCI layout and archive, inside containerd) and the lazy
// snapshotter. All else is as in containerd's own command.
package main

import (
	"context"
	"fmt"
	"os"

	_ "github.com/containerd/containerd/v2/cmd/containerd/builtins"
	"github.com/containerd/containerd/v2/cmd/containerd/command"

	_ "github.com/beam-cloud/containerd-clip/plugin"
	_ "github.com/beam-cloud/containerd-clip/plugin/lazy"
)

func main() {
	if err := command.App().Run(context.Background(), os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "containerd:", err)
		os.Exit(1)
	}
}
