package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/plugin/publish"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

type pullArchiveOptions struct {
	output string
	from   string
	hosts  []string
}

func newPullArchiveCommand(g *globals) *cobra.Command {
	var o pullArchiveOptions
	cmd := &cobra.Command{
		Use:   "pull-archive IMAGE",
		Short: "Fetch the archive of an image from its registry",
		Long: `Fetch the archive that the registry has for an image of containerd's store, for
this machine's platform: into the store, where it stays as long as the image and
is removed with it, or into a file. "clipctl push IMAGE" pushes what is in the
store, to wherever the image was tagged and pushed meanwhile.`,
		Example: `  clipctl pull-archive registry.example.com/team/app:1 -o app.clip`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPullArchive(cmd.Context(), g, args[0], o, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVarP(&o.output, "output", "o", "", "file to write (default: containerd's content store)")
	addRegistryFlags(cmd, &o.from, &o.hosts)
	return cmd
}

func runPullArchive(ctx context.Context, g *globals, name string, o pullArchiveOptions, stdout io.Writer) error {
	if o.output != "" {
		if _, _, err := outputPath(o.output, false, name); err != nil {
			return err
		}
	}
	ctx, client, err := g.connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	image, err := client.GetImage(ctx, name)
	if err != nil {
		return fmt.Errorf("image %q in containerd's store: %w", name, err)
	}
	wanted, err := searched(ctx, image)
	if err != nil {
		return err
	}
	if o.from != "" {
		wanted.Ref = o.from
	}
	fetcher, err := remote.New(remote.Options{ConfigPath: o.hosts}).Fetcher(ctx, wanted.Ref)
	if err != nil {
		return fmt.Errorf("reference %q (name the image's registry with --from): %w", wanted.Ref, err)
	}
	found, err := published(ctx, fetcher, wanted)
	for _, a := range found {
		if o.output != "" {
			err = fetchTo(ctx, fetcher, a, o.output)
		} else {
			err = fetchInto(ctx, client, fetcher, a, wanted)
		}
		if err == nil {
			_, err = fmt.Fprintf(stdout, "fetched %s\tof %s\t%s\n", a.Manifest.Digest, name, size(a.Blob.Size))
			return err
		}
		log.G(ctx).WithError(err).WithField("digest", a.Manifest.Digest).Warn("the archive cannot be used")
	}
	return fmt.Errorf("archive of %s: %w", name, err)
}

// published lists where a registry has an image's archive, the best first.
func published(ctx context.Context, fetcher remotes.Fetcher, image discover.Image) ([]discover.Artifact, error) {
	if image.Link == "" {
		return discover.Referrers(ctx, fetcher, image.Manifest)
	}
	a, err := discover.Linked(ctx, fetcher, image.Link)
	return []discover.Artifact{a}, err
}

// fetchTo writes an archive to the file at path, or leaves that as it is.
func fetchTo(ctx context.Context, fetcher remotes.Fetcher, a discover.Artifact, path string) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".clipctl-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if err := tmp.Chmod(0o644); err != nil {
		return err
	}
	opened, err := discover.Download(ctx, fetcher, a, tmp)
	if err != nil {
		return err
	}
	return errors.Join(opened.Close(), os.Rename(tmp.Name(), path))
}

// fetchInto stores an archive in containerd, tied to the manifest of its image.
func fetchInto(ctx context.Context, client *containerd.Client, fetcher remotes.Fetcher, a discover.Artifact, image discover.Image) error {
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // it expires by itself
	store := client.ContentStore()
	for _, desc := range []ocispec.Descriptor{a.Manifest, a.Blob} {
		if err := remotes.Fetch(ctx, store, fetcher, desc); err != nil && !errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("storing %s: %w", desc.Digest, err)
		}
	}
	_, remove, err := fetchTemporary(ctx, stored(store), a) // it is what it should be
	if err != nil {
		return err
	}
	remove()
	return publish.Keep(ctx, store, image.Manifest, a.Manifest)
}

// stored reads artifacts out of containerd's content store.
func stored(store content.Provider) remotes.Fetcher {
	return remotes.FetcherFunc(func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
		ra, err := store.ReaderAt(ctx, desc)
		if err != nil {
			return nil, err
		}
		return struct {
			io.Reader
			io.Closer
		}{content.NewReader(ra), ra}, nil
	})
}
