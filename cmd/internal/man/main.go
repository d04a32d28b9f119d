// Command man writes the manual pages of our programs below a directory: man1 and man8.
package main

import (
	"fmt"
	"os"
	"path/filepath"
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
	os.Clearenv()            // some defaults come from it
	epoch := time.Unix(0, 0) // the same sources make the same pages
	for cmd, section := range map[*cobra.Command]string{clipctl.New(): "1", daemon.New(): "8"} {
		cmd.InitDefaultCompletionCmd() // unless it wants none
		cmd.DisableAutoGenTag = true
		header := &doc.GenManHeader{Section: section, Source: "containerd-clip", Manual: "containerd-clip", Date: &epoch}
		pages := filepath.Join(dir, "man"+section)
		if err := os.MkdirAll(pages, 0o755); err != nil {
			return err
		}
		if err := doc.GenManTree(cmd, header, pages); err != nil {
			return err
		}
	}
	return nil
}
