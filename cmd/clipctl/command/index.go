package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/plugin/bucket"
	"github.com/beam-cloud/containerd-clip/plugin/export"
	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/plugin/publish"
)

type indexOptions struct {
	indexingFlags
	platforms  platformFlags
	storageRef string
	output     string
	push       bool
	to         string
	engine     string
}

// indexingFlags say how layers are to be indexed.
type indexingFlags struct {
	cacheDir string
	force    bool
	spanSize string
}

func (o *indexingFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.cacheDir, "cache-dir", os.Getenv("CLIPCTL_CACHE_DIR"), "where indexes of layers are kept, for other images with the same layers (default: "+systemCacheDir+" for root, else containerd-clip in the user's cache directory) [$CLIPCTL_CACHE_DIR]")
	f.BoolVar(&o.force, "force", false, "index every layer, also those whose index is in the cache")
	f.StringVar(&o.spanSize, "span-size", units.BytesSize(float64(layer.DefaultPointInterval)), "distance of the places in a layer where reading can start: less fetches less per read, more makes a smaller archive")
}

func newIndexCommand(g *globals) *cobra.Command {
	var o indexOptions
	cmd := &cobra.Command{
		Use:   "index IMAGE",
		Short: "Index an image of the local store; write its archive",
		Long: `Index an image from local content, without a request to any registry, and
write an archive that refers to the image's layers in the registry.

IMAGE is the name of an image in containerd's store, or
  oci:DIR[:TAG]           an OCI layout
  oci-archive:FILE[:TAG]  a tar of one, as "ctr image export" writes it

The layers must be in the registry under the storage reference when a worker
runs the image; --push checks it.`,
		Example: `  clipctl index registry.example.com/team/app:1 --push
  clipctl index registry.example.com/team/app:1 --to 's3://archives/{{.Path}}/{{.Manifest}}.clip?region=eu-central-1'
  clipctl index oci:./layout --storage-ref registry.example.com/team/app:1 -o app.clip`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runIndex(cmd.Context(), g, args[0], o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.storageRef, "storage-ref", "", "remote reference to store (default: the image's own name)")
	o.platforms.add(cmd, "index")
	f.StringVarP(&o.output, "output", "o", "", "archive to write (default: IMAGE's last part + .clip, in the current directory)")
	f.BoolVar(&o.push, "push", false, "push the archive to the image's repository, as an artifact that refers to the image; without -o no file is kept")
	f.StringVar(&o.to, "to", "", toFlag+"; without -o no other file is kept")
	o.indexingFlags.add(cmd)
	f.StringVar(&o.engine, "engine", engineOurs, "who indexes: "+engineOurs+", or "+engineCLIP+" for upstream CLIP's own indexer, whose archives have no layer indexes")
	return cmd
}

func runIndex(ctx context.Context, g *globals, image string, o indexOptions, stdout, stderr io.Writer) error {
	if err := o.checkEngine(); err != nil {
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
	ctx, source, done, err := openSource(ctx, g, image)
	if err != nil {
		return err
	}
	defer done()
	ref := o.storageRef
	if ref == "" {
		ref = source.Ref
	}
	if ref == "" {
		return fmt.Errorf("%s has no name of its own; say where its layers are with --storage-ref", image)
	}
	if err := archive.CheckStorageRef(ref); err != nil {
		return err
	}
	manifests, err := source.Manifests(ctx, selection)
	if err != nil {
		return err
	}
	if err := o.checkNames(ref, manifests); err != nil {
		return err
	}
	several := len(manifests) > 1
	for _, m := range manifests {
		if o.engine == engineCLIP {
			err = indexWithCLIP(ctx, source, m, ref, o, several, stdout, stderr)
		} else {
			err = indexOne(ctx, source, m, ref, o, indexing, several, stdout, stderr)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkNames makes sure that each of the manifests gets an object of its own.
func (o indexOptions) checkNames(ref string, manifests []export.Manifest) error {
	if o.to == "" {
		return nil
	}
	l, err := bucket.Parse(o.to)
	if err != nil {
		return err
	}
	defer l.Close()
	var digests []digest.Digest
	for _, m := range manifests {
		digests = append(digests, m.Descriptor.Digest)
	}
	return l.CheckNames(ref, digests)
}

// systemCacheDir is where root's layer indexes are kept.
const systemCacheDir = "/var/cache/containerd-clip"

// indexing returns how layers are to be indexed.
func (o indexingFlags) indexing(ctx context.Context) (index.Options, error) {
	opts := index.Options{Force: o.force}
	size, err := units.RAMInBytes(o.spanSize)
	if err != nil || size < int64(inflate.WindowSize) {
		return opts, fmt.Errorf("span size %q: must be a size of at least %s, such as 512KiB or 4MiB", o.spanSize, units.BytesSize(inflate.WindowSize))
	}
	opts.Layer.PointInterval = inflate.Out(size)
	opts.Layer.SpanSize = min(layer.DefaultSpanSize, inflate.Out(size)&^63)
	if opts.Layer, err = opts.Layer.Normalize(); err != nil {
		return opts, err
	}
	opts.Cache, err = o.openCache(ctx)
	return opts, err
}

// openCache opens the layer-index cache. One that nobody asked for may be missing.
func (o indexingFlags) openCache(ctx context.Context) (*index.Cache, error) {
	if o.cacheDir != "" {
		return index.OpenCache(o.cacheDir, index.DefaultCacheSize)
	}
	dir, err := systemCacheDir, error(nil)
	if os.Geteuid() != 0 {
		dir, err = os.UserCacheDir()
		dir = filepath.Join(dir, "containerd-clip")
	}
	var cache *index.Cache
	if err == nil {
		cache, err = index.OpenCache(dir, index.DefaultCacheSize)
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("indexing without a cache of layer indexes; name a place for it with --cache-dir")
	}
	return cache, nil
}

// openSource opens IMAGE. The context it returns is the one to read it with.
func openSource(ctx context.Context, g *globals, image string) (context.Context, *export.Source, func(), error) {
	kind, location, tag := export.Parse(image)
	var source *export.Source
	var err error
	done := func() { source.Close() }
	switch kind {
	case "oci":
		source, err = export.FromLayout(location, tag)
	case "oci-archive":
		source, err = export.FromArchive(location, tag)
	default:
		nctx, client, cerr := g.connect(ctx)
		if cerr != nil {
			return ctx, nil, nil, cerr
		}
		ctx = nctx
		done = func() { source.Close(); client.Close() }
		if source, err = export.FromStore(ctx, client, location); err != nil {
			client.Close()
		}
	}
	if err != nil {
		return ctx, nil, nil, err
	}
	return ctx, source, done, nil
}

// indexOne indexes one platform's image, and publishes it if asked to.
func indexOne(ctx context.Context, source *export.Source, m export.Manifest, ref string, o indexOptions, indexing index.Options, several bool, stdout, stderr io.Writer) (err error) {
	path, cleanup, err := o.path(source.Name, m, several)
	if err != nil {
		return err
	}
	defer cleanup()
	start := time.Now()
	progress := newProgress(stderr, m.Layers)
	indexing.Progress = progress
	st, err := index.WriteArchive(ctx, source, m, ref, path, indexing)
	progress.close(err)
	if err != nil {
		return err
	}
	if !o.temporary() {
		fmt.Fprintf(stdout, "%s\t%s\t%d layers\t%d files\t%.1fs\n",
			path, size(st.Size), len(m.Layers), st.Files, time.Since(start).Seconds())
	}
	if o.to != "" {
		if err := putArchive(ctx, path, o.to, stdout); err != nil {
			return err
		}
	}
	if !o.push {
		return nil
	}
	id, n, err := publish.Push(ctx, path, ref)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "pushed %s\tfor %s\t%s\t%d layers\t%d files\t%.1fs\n",
		id, ref, size(n), len(m.Layers), st.Files, time.Since(start).Seconds())
	return nil
}

// temporary says whether the archive is made only to be published.
func (o indexOptions) temporary() bool { return o.output == "" && (o.push || o.to != "") }

// path returns where to write the archive of one platform, and what to call
// when it is no longer needed.
func (o indexOptions) path(image string, m export.Manifest, several bool) (string, func(), error) {
	output := o.output
	if several && !o.temporary() {
		if output == "" {
			output = defaultOutput(image)
		}
		ext := filepath.Ext(output)
		output = strings.TrimSuffix(output, ext) + "-" + strings.ReplaceAll(platforms.Format(m.Platform), "/", "-") + ext
	}
	return outputPath(output, o.temporary(), image)
}

// outputPath returns where to write an archive of an image, and what to call
// when it is no longer needed: output, or else a file that is not kept if it is
// only to be published, or else one named after the image.
func outputPath(output string, publish bool, image string) (path string, cleanup func(), err error) {
	if publish && output == "" {
		dir, err := os.MkdirTemp("", "clipctl-")
		if err != nil {
			return "", nil, err
		}
		return filepath.Join(dir, "image.clip"), func() { os.RemoveAll(dir) }, nil
	}
	if output == "" {
		output = defaultOutput(image)
	}
	if st, err := os.Stat(output); err == nil && st.IsDir() {
		return "", nil, fmt.Errorf("output %s is a directory; name a file in it", output)
	} else if err == nil && !st.Mode().IsRegular() {
		return "", nil, fmt.Errorf("output %s is not an ordinary file and would be replaced by one; name another", output)
	}
	if st, err := os.Stat(filepath.Dir(output)); err != nil {
		return "", nil, fmt.Errorf("output %s: %w", output, err)
	} else if !st.IsDir() {
		return "", nil, fmt.Errorf("output %s: %s is not a directory", output, filepath.Dir(output))
	}
	return output, func() {}, nil
}

// defaultOutput is "app-1.clip" for "registry.example.com/team/app:1".
func defaultOutput(image string) string {
	base, _, _ := strings.Cut(image[strings.LastIndexByte(image, '/')+1:], "@")
	return strings.NewReplacer(":", "-", ".tar", "").Replace(base) + ".clip"
}

// size formats a number of bytes.
func size(n int64) string {
	switch {
	case n >= 1e9:
		return fmt.Sprintf("%.2f GB", float64(n)/1e9)
	case n >= 1e6:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	case n >= 1e3:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%d B", n)
}
