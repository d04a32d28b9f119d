package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/plugin/bucket"
	"github.com/beam-cloud/containerd-clip/snapshotter/load"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

type loadOptions struct {
	name        string
	snapshotter string
	from        string
	hosts       []string
}

func newLoadCommand(g *globals) *cobra.Command {
	var o loadOptions
	cmd := &cobra.Command{
		Use:   "load FILE|URL",
		Short: "Make an image in containerd out of its archive alone",
		Long: `Make an image in containerd out of its archive alone, without a request to the
image's registry. The image has the digest that it was built with, and runs with
the clip snapshotter; its files come from the registry when they are read.

Of an archive that upstream CLIP wrote, manifest and config are fetched from the
registry, and the daemon streams each layer once to index it.

URL is http:// or https://, or an object in a bucket: s3://, gs://, azblob://.`,
		Example: `  clipctl load app.clip && ctr run --snapshotter clip registry.example.com/team/app:1 app`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runLoad(cmd.Context(), g, args[0], o, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&o.name, "name", "", "name of the image (default: the reference of --from, or else that of the archive)")
	cmd.Flags().StringVar(&o.snapshotter, "snapshotter", "clip", "what containerd calls the clip snapshotter")
	cmd.Flags().StringVar(&o.from, "from", "", "reference whose repository has the image (default: the one that the archive stores)")
	cmd.Flags().StringSliceVar(&o.hosts, "hosts-dir", defaultHostsDirs, "directories with containerd's <host>/hosts.toml files")
	return cmd
}

func runLoad(ctx context.Context, g *globals, source string, o loadOptions, stdout io.Writer) error {
	start := time.Now()
	path := source
	if strings.Contains(source, "://") {
		file, err := download(ctx, source)
		if err != nil {
			return fmt.Errorf("downloading %s: %w", source, err)
		}
		defer os.Remove(file)
		path = file
	}
	ctx, client, err := g.connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	l, err := load.Load(ctx, client, path, load.Options{
		Snapshotter: o.snapshotter, Name: o.name, From: o.from, Registry: remote.New(remote.Options{ConfigPath: o.hosts}),
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "loaded %s\t%s\t%d layers\t%.1fs\n", l.Name, l.Target.Digest, l.Layers, time.Since(start).Seconds())
	return nil
}

// maxDownload bounds an archive, as the snapshotter does.
const maxDownload = 2 << 30

// download fetches url into a temporary file.
func download(ctx context.Context, url string) (_ string, err error) {
	body, err := open(ctx, url)
	if err != nil {
		return "", err
	}
	defer body.Close()
	f, err := os.CreateTemp("", "clipctl-")
	if err != nil {
		return "", err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			os.Remove(f.Name())
		}
	}()
	n, err := io.Copy(f, io.LimitReader(body, maxDownload+1))
	if err == nil && n > maxDownload {
		err = fmt.Errorf("it has more than %d bytes: %w", int64(maxDownload), errdefs.ErrInvalidArgument)
	}
	return f.Name(), err
}

// open asks for what url names.
func open(ctx context.Context, url string) (io.ReadCloser, error) {
	if !strings.HasPrefix(url, "http://") && !strings.HasPrefix(url, "https://") {
		return openObject(ctx, url)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("the server answers %s", resp.Status)
	}
	return resp.Body, nil
}

// openObject opens an object whose whole name is in url.
func openObject(ctx context.Context, url string) (io.ReadCloser, error) {
	l, err := bucket.Parse(url)
	if err != nil {
		return nil, err
	}
	if !l.Fixed() {
		return nil, fmt.Errorf("name one archive, not where archives are: %w", errdefs.ErrInvalidArgument)
	}
	rc, err := l.Open(ctx, "", "")
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return object{rc, l}, nil
}

// object is what is read from a bucket that is closed with it.
type object struct {
	io.ReadCloser
	bucket io.Closer
}

// Close implements io.Closer.
func (o object) Close() error { return errors.Join(o.ReadCloser.Close(), o.bucket.Close()) }
