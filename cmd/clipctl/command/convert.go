package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/plugin/export"
	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/plugin/publish"
	"github.com/beam-cloud/containerd-clip/snapshotter/load"
)

type convertOptions struct {
	indexingFlags
	platforms platformFlags
	archives  []string
}

func newConvertCommand(g *globals) *cobra.Command {
	var o convertOptions
	cmd := &cobra.Command{
		Use:   "convert SRC DST",
		Short: "Make an image that names its archive, so that workers need not search for it",
		Long: `Index the image SRC of containerd's store and make the image DST there, which has
the same layers and config and names its archive by digest in its manifest. Push
it as any image: the archive goes with it, and a worker that pulls it reads it
lazily without asking for anything that could be another the next time.

DST has another digest than SRC: sign DST. Attestations of SRC are not in it.
Containerd without the clip snapshotter, and other programs, run it as any image.`,
		Example: `  clipctl convert registry.example.com/team/app:1 registry.example.com/team/app:1-clip
  ctr image push registry.example.com/team/app:1-clip`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runConvert(cmd.Context(), g, args[0], args[1], o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	o.platforms.add(cmd, "convert")
	o.indexingFlags.add(cmd)
	cmd.Flags().StringArrayVar(&o.archives, "archive", nil, "archive of SRC to use, such as one that clipctl record wrote, instead of indexing; may be repeated for several platforms")
	return cmd
}

func runConvert(ctx context.Context, g *globals, src, dst string, o convertOptions, stdout, stderr io.Writer) error {
	if err := archive.CheckStorageRef(dst); err != nil {
		return err
	}
	selection, err := o.platforms.selection()
	if err != nil {
		return err
	}
	indexing, err := o.indexing(ctx)
	if err != nil {
		return err
	}
	made, err := artifacts(o.archives)
	if err != nil {
		return err
	}
	ctx, client, err := g.connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // it expires by itself
	source, err := export.FromStore(ctx, client, src)
	if err != nil {
		return err
	}
	defer source.Close()
	manifests, err := source.Manifests(ctx, selection)
	if err != nil {
		return err
	}
	start := time.Now()
	dir, err := os.MkdirTemp("", "clipctl-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var all []publish.Convertible
	var bytes int64
	for i, m := range manifests {
		a := made[m.Descriptor.Digest]
		if a == nil {
			a, err = indexFor(ctx, source, m, dst, filepath.Join(dir, strconv.Itoa(i)), indexing, stderr)
		}
		if err != nil {
			return err
		}
		bytes += a.Size()
		all = append(all, publish.Convertible{Manifest: m.Raw, Platform: m.Platform, Archive: a})
	}
	target, err := publish.Convert(ctx, client.ContentStore(), all)
	if err != nil {
		return fmt.Errorf("image %s: %w", dst, err)
	}
	if err := load.SetImage(ctx, client.ImageService(), dst, target); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "converted %s\t%s\t%d platforms\t%s of archives\t%.1fs\n", dst, target.Digest, len(all), size(bytes), time.Since(start).Seconds())
	return nil
}

// artifacts reads archives, by the manifests that they are of.
func artifacts(paths []string) (map[digest.Digest]*publish.Artifact, error) {
	found := map[digest.Digest]*publish.Artifact{}
	for _, path := range paths {
		a, err := publish.NewArtifact(path)
		if err != nil {
			return nil, err
		}
		found[a.Subject.Digest] = a
	}
	return found, nil
}

// indexFor makes the archive of one platform's image.
func indexFor(ctx context.Context, source *export.Source, m export.Manifest, ref, path string, o index.Options, stderr io.Writer) (*publish.Artifact, error) {
	progress := newProgress(stderr, m.Layers)
	o.Progress = progress
	_, err := index.WriteArchive(ctx, source, m, ref, path, o)
	progress.close(err)
	if err != nil {
		return nil, err
	}
	return publish.NewArtifact(path)
}
