package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/plugin/export"
)

type exportOptions struct {
	platforms platformFlags
	name      string
	copy      bool
}

func newExportCommand(g *globals) *cobra.Command {
	var o exportOptions
	cmd := &cobra.Command{
		Use:   "export IMAGE DIR|FILE.tar",
		Short: "Write an image of the local store as an OCI layout",
		Long: `Write an image as an OCI layout: into the directory DIR, to the images that
are in it already, or as a new tar FILE.tar.

Blobs in DIR share their data with containerd's store where both are on one
file system: they are clones, or else hard links, which must not be written to.
--copy copies them.

IMAGE is what "clipctl index" takes.`,
		Example: `  clipctl export registry.example.com/team/app:1 ./layout
  clipctl export registry.example.com/team/app:1 app.tar --platform linux/arm64`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runExport(cmd.Context(), g, args[0], args[1], o, cmd.OutOrStdout())
		},
	}
	o.platforms.add(cmd, "export")
	cmd.Flags().StringVar(&o.name, "name", "", "name of the image in the layout (default: its own)")
	cmd.Flags().BoolVar(&o.copy, "copy", false, "copy blobs where they could share their data with the store, and check them")
	return cmd
}

func runExport(ctx context.Context, g *globals, image, target string, o exportOptions, stdout io.Writer) error {
	selection, err := o.platforms.selection()
	if err != nil {
		return err
	}
	ctx, source, done, err := openSource(ctx, g, image)
	if err != nil {
		return err
	}
	defer done()
	start := time.Now()
	write := export.WriteLayout
	if isTar(target) {
		write = export.WriteTar
	}
	w, err := write(ctx, source, target, export.WriteOptions{Platforms: selection, Name: o.name, Copy: o.copy})
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s\t%s\t%d blobs\t%s\t%d shared, %d there before\t%.1fs\n",
		target, w.Target.Digest, w.Blobs, size(w.Bytes), w.Shared, w.Had, time.Since(start).Seconds())
	return nil
}

// isTar says whether target is to be a tar, not a directory.
func isTar(target string) bool {
	st, err := os.Stat(target)
	return strings.HasSuffix(target, ".tar") && (err != nil || !st.IsDir())
}
