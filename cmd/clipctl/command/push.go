package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/plugin/bucket"
	"github.com/beam-cloud/containerd-clip/plugin/publish"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
)

// toFlag says what a flag --to is for.
const toFlag = "bucket or directory to put the archive in: s3://, gs://, azblob:// or file:///, with a template of its name (see docs/operating.md)"

func newPushCommand(g *globals) *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use:   "push FILE|IMAGE",
		Short: "Push an archive to the repository of its image, or to a bucket",
		Long: `Push the archive in FILE to the repository that its storage reference names, or
the archive that containerd's store has of IMAGE (see clipctl pull-archive) to the
repository of that name. The image must be there, with all its layers. With --to
the archive goes to a bucket or directory instead.`,
		Example: `  clipctl push app.clip
  clipctl push app.clip --to file:///srv/archives`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPush(cmd.Context(), g, args[0], to, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&to, "to", "", toFlag)
	return cmd
}

func runPush(ctx context.Context, g *globals, what, to string, stdout io.Writer) error {
	path, ref, cleanup := what, "", func() {}
	a, err := archive.OpenFile(what)
	switch {
	case err == nil:
		ref = a.Info().StorageRef
		a.Close()
	case errors.Is(err, fs.ErrNotExist) && isReference(what):
		if path, cleanup, err = keptArchive(ctx, g, what); err != nil {
			return err
		}
		ref = what
	default:
		return err
	}
	defer cleanup()
	if to != "" {
		return putArchive(ctx, path, to, stdout)
	}
	id, n, err := publish.Push(ctx, path, ref)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "pushed %s\tfor %s\t%s\n", id, ref, size(n))
	return nil
}

// putArchive stores an archive in the location to.
func putArchive(ctx context.Context, path, to string, stdout io.Writer) error {
	l, err := bucket.Parse(to)
	if err != nil {
		return err
	}
	defer l.Close()
	a, err := archive.OpenFile(path)
	if err != nil {
		return err
	}
	defer a.Close()
	info := a.Info()
	name, err := l.Put(ctx, path, info.StorageRef, info.Descriptor.Digest)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "stored %s\tin %s\tfor %s\n", name, to, info.StorageRef)
	return err
}

// isReference says whether an argument can be an image's name.
func isReference(s string) bool { return archive.CheckStorageRef(s) == nil }

// keptArchive writes the archive that containerd's store has of an image to a
// file, which is there until cleanup.
func keptArchive(ctx context.Context, g *globals, name string) (path string, cleanup func(), err error) {
	ctx, client, err := g.connect(ctx)
	if err != nil {
		return "", nil, fmt.Errorf("there is no file %s, and no image: %w", name, err)
	}
	defer client.Close()
	image, err := client.GetImage(ctx, name)
	if err != nil {
		return "", nil, fmt.Errorf("there is no file %s, and no such image in containerd's store: %w", name, err)
	}
	wanted, err := searched(ctx, image)
	if err != nil {
		return "", nil, err
	}
	id, err := publish.Kept(ctx, client.ContentStore(), wanted.Manifest)
	if err != nil {
		return "", nil, fmt.Errorf("image %s: %w", name, err)
	}
	fetcher := stored(client.ContentStore())
	a, err := discover.Linked(ctx, fetcher, id)
	if err != nil {
		return "", nil, fmt.Errorf("archive %s in containerd's store: %w", id, err)
	}
	return fetchTemporary(ctx, fetcher, a)
}

// fetchTemporary writes an archive to a file, which is there until cleanup.
func fetchTemporary(ctx context.Context, fetcher remotes.Fetcher, a discover.Artifact) (path string, cleanup func(), err error) {
	path, cleanup, err = outputPath("", true, "")
	if err != nil {
		return "", nil, err
	}
	if err := fetchTo(ctx, fetcher, a, path); err != nil {
		cleanup()
		return "", nil, err
	}
	return path, cleanup, nil
}
