package command

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/plugin/publish"
)

func newPushCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "push FILE",
		Short:   "Push an archive to the repository that its storage reference names",
		Example: "  clipctl push app.clip",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPush(cmd.Context(), args[0], cmd.OutOrStdout())
		},
	}
}

func runPush(ctx context.Context, path string, stdout io.Writer) error {
	a, err := archive.OpenFile(path)
	if err != nil {
		return err
	}
	ref := a.Info().StorageRef
	a.Close()
	id, n, err := publish.Push(ctx, path, ref)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "pushed %s\tfor %s\t%s\n", id, ref, size(n))
	return nil
}
