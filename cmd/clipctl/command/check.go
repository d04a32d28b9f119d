package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/plugin/export"
	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

type checkOptions struct {
	hosts []string
}

func newCheckCommand(g *globals) *cobra.Command {
	var o checkOptions
	cmd := &cobra.Command{
		Use:   "check FILE [IMAGE]",
		Short: "Compare an archive with the layers of its image",
		Long: `Read every layer of the image that an archive is of, and compare it with what the
archive says: digests, every file's metadata and place, and every span, decoded
from its seek point as the snapshotter decodes it.

Without IMAGE the layers come from the registry that the archive stores. IMAGE is
an image in containerd's store, oci:DIR or oci-archive:FILE, as in clipctl index.
One layer at a time passes through a temporary file ($TMPDIR).`,
		Example: `  clipctl check app.clip
  clipctl check app.clip registry.example.com/team/app:1
  clipctl check app.clip oci:/srv/layout:1`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			image := ""
			if len(args) > 1 {
				image = args[1]
			}
			return runCheck(cmd.Context(), g, args[0], image, o, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringSliceVar(&o.hosts, "hosts-dir", defaultHostsDirs, "directories with containerd's <host>/hosts.toml files")
	return cmd
}

func runCheck(ctx context.Context, g *globals, path, image string, o checkOptions, stdout io.Writer) error {
	a, err := archive.OpenFile(path)
	if err != nil {
		return err
	}
	defer a.Close()
	open, done, err := o.layers(ctx, g, a, image)
	if err != nil {
		return err
	}
	defer done()
	wrong := 0
	m, _ := a.Manifest()
	for i, desc := range m.Layers {
		began := time.Now()
		what, err := checkLayer(ctx, a, i, desc, open)
		if errors.Is(err, errFindings) {
			wrong++
			fmt.Fprintf(stdout, "WRONG layer %d/%d %s: %v\n", i+1, len(m.Layers), desc.Digest, err)
			continue
		}
		if err != nil {
			return fmt.Errorf("layer %d of %d, %s: %w", i+1, len(m.Layers), desc.Digest, err)
		}
		fmt.Fprintf(stdout, "ok    layer %d/%d %s: %s\t%.1fs\n", i+1, len(m.Layers), desc.Digest, what, time.Since(began).Seconds())
	}
	if wrong > 0 {
		return fmt.Errorf("%s is wrong about %d of %d layers; do not use it: %w", path, wrong, len(m.Layers), errFindings)
	}
	return nil
}

// layers returns where an archive's layers come from.
func (o checkOptions) layers(ctx context.Context, g *globals, a *archive.Archive, image string) (index.Opener, func(), error) {
	if image == "" {
		client := remote.New(remote.Options{ConfigPath: o.hosts})
		return func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
			return client.Open(ctx, []string{a.Info().StorageRef}, desc.Digest, 0, desc.Size)
		}, func() {}, nil
	}
	ctx, source, done, err := openSource(ctx, g, image)
	if err != nil {
		return nil, nil, err
	}
	manifests, err := source.Manifests(ctx, export.AllPlatforms)
	if err != nil {
		done()
		return nil, nil, err
	}
	want := a.Info().Descriptor.Digest
	for _, m := range manifests {
		if m.Descriptor.Digest == want {
			return func(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
				ra, err := source.Provider.ReaderAt(ctx, desc)
				if err != nil {
					return nil, err
				}
				return blobReader{content.NewReader(ra), ra}, nil
			}, done, nil
		}
	}
	done()
	return nil, nil, fmt.Errorf("the archive is of manifest %s, which is not among those of %s: %w", want, image, errdefs.ErrInvalidArgument)
}

type blobReader struct {
	io.Reader
	io.Closer
}

// checkLayer compares layer i with its blob and says what it found. An error
// wraps errFindings if the archive is wrong.
func checkLayer(ctx context.Context, a *archive.Archive, i int, desc ocispec.Descriptor, open index.Opener) (string, error) {
	if reason := a.NotLazy(i); reason != "" {
		return "not lazy: " + reason, nil
	}
	x, err := a.Layer(i)
	if err == nil {
		err = x.CheckWindows()
	}
	if err != nil {
		return "", fmt.Errorf("%w: %w", errFindings, err)
	}
	blob, err := os.CreateTemp("", "clipctl-check-")
	if err != nil {
		return "", err
	}
	defer blob.Close()
	if err := os.Remove(blob.Name()); err != nil {
		return "", err
	}
	rc, err := open(ctx, desc)
	if err != nil {
		return "", err
	}
	defer rc.Close()
	y, err := layer.Build(ctx, io.TeeReader(rc, blob), desc, layer.Options{SpanSize: x.SpanSize, PointInterval: max(x.SpanSize, layer.DefaultPointInterval)})
	if err != nil {
		return "", err
	}
	if err := sameLayer(x, y); err != nil {
		return "", fmt.Errorf("%w: %w", errFindings, err)
	}
	if err := checkSpans(ctx, x, blob); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d files, %d spans, %d seek points", len(x.Entries), len(x.Spans), len(x.Points)), nil
}

// sameLayer compares what an archive says of a layer with what the layer says.
func sameLayer(x, y *layer.Index) error {
	switch {
	case x.Digest != y.Digest || x.Size != y.Size:
		return fmt.Errorf("it is of a blob %s of %d bytes", x.Digest, x.Size)
	case x.DiffID != y.DiffID || x.OutSize != y.OutSize:
		return fmt.Errorf("it has diff ID %s and %d bytes instead of %s and %d", x.DiffID, x.OutSize, y.DiffID, y.OutSize)
	case len(x.Spans) != len(y.Spans):
		return fmt.Errorf("it has %d spans instead of %d", len(x.Spans), len(y.Spans))
	case bytes.Equal(x.AppendEntries(nil), y.AppendEntries(nil)):
		return nil
	}
	for i := range min(len(x.Entries), len(y.Entries)) {
		one, other := layer.Index{Entries: x.Entries[i : i+1]}, layer.Index{Entries: y.Entries[i : i+1]}
		if !bytes.Equal(one.AppendEntries(nil), other.AppendEntries(nil)) {
			return fmt.Errorf("its file %s is another than the layer's %s", printable(x.Entries[i].Name), printable(y.Entries[i].Name))
		}
	}
	return fmt.Errorf("it has %d files instead of %d", len(x.Entries), len(y.Entries))
}

// checkSpans decodes every span as a reader of it alone would.
func checkSpans(ctx context.Context, x *layer.Index, blob io.ReaderAt) error {
	buf := make([]byte, x.SpanSize)
	for i, span := range x.Spans {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		start, end := x.SpanRange(i)
		err := func() error {
			p, err := x.SeekPoint(start)
			if err != nil {
				return err
			}
			stream, err := x.Decode(io.NewSectionReader(blob, int64(p.In), int64(span.InEnd-p.In)), p)
			if err != nil {
				return err
			}
			defer stream.Close()
			if _, err := io.CopyN(io.Discard, stream, int64(start-p.Out)); err != nil {
				return err
			}
			if _, err := io.ReadFull(stream, buf[:end-start]); err != nil {
				return err
			}
			return x.VerifySpan(i, buf[:end-start])
		}()
		if err != nil {
			return fmt.Errorf("%w: span %d [%d, %d): %w", errFindings, i, start, end, err)
		}
	}
	return nil
}
