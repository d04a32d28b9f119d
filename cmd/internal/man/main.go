// Command man writes the manual pages of our programs into a directory.
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	clipctl "github.com/beam-cloud/containerd-clip/cmd/clipctl/command"
	daemon "github.com/beam-cloud/containerd-clip/cmd/containerd-clip-grpc/command"
)

func main() {
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "man:", err)
		os.Exit(1)
	}
}

func write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	os.Clearenv()            // some defaults come from it
	epoch := time.Unix(0, 0) // the same sources make the same pages
	for cmd, section := range map[*cobra.Command]string{clipctl.New(): "1", daemon.New(): "8"} {
		cmd.InitDefaultCompletionCmd() // unless it wants none
		cmd.DisableAutoGenTag = true
		header := &doc.GenManHeader{Section: section, Source: "containerd-clip", Manual: "containerd-clip", Date: &epoch}
		if err := doc.GenManTree(cmd, header, dir); err != nil {
			return err
		}
	}
	return nil
}
