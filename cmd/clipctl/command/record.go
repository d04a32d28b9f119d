package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/plugin/publish"
	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

type recordOptions struct {
	archive    string
	output     string
	push       bool
	fromDaemon bool
	period     time.Duration
}

func newRecordCommand(g *globals) *cobra.Command {
	var o recordOptions
	cmd := &cobra.Command{
		Use:   "record IMAGE [flags] [-- CMD...]",
		Short: "Record what a start of a lazy image reads; write its archive with a prefetch list",
		Long: `Run an image that was pulled lazily, note which parts of its layers are read and
in what order, and write its archive anew with that as its prefetch list: workers
that pull the image then fetch these parts at once, before they are asked for.

Without CMD the image's own command runs. The recording ends with the command, or
after --period, which ends the command too.`,
		Example: `  clipctl record registry.example.com/team/app:1 --push --period 10s
  clipctl record registry.example.com/team/app:1 -o app.clip -- python3 -c 'import numpy'
  clipctl record registry.example.com/team/app:1 --from-daemon --push`,
		Args: recordArgs(&o),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runRecord(cmd.Context(), g, args[0], args[1:], o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.archive, "archive", "", "archive of the image to add the list to (default: the one that the daemon would use)")
	f.StringVarP(&o.output, "output", "o", "", "archive to write (default: IMAGE's last part + .clip, in the current directory)")
	f.BoolVar(&o.push, "push", false, "push the archive to the image's repository, as an artifact that refers to the image; without -o no file is kept")
	f.BoolVar(&o.fromDaemon, "from-daemon", false, "run nothing: take what the daemon recorded of the image's last ordinary start")
	f.DurationVar(&o.period, "period", record.Period, "how long the command runs at most")
	cmd.MarkFlagsMutuallyExclusive("from-daemon", "period")
	return cmd
}

func runRecord(ctx context.Context, g *globals, name string, args []string, o recordOptions, stdout, stderr io.Writer) error {
	path, cleanup, err := outputPath(o.output, o.push, name)
	if err != nil {
		return err
	}
	defer cleanup()
	ctx, on, err := g.stage(ctx, name)
	if err != nil {
		return err
	}
	defer on.close()
	a, release, err := on.findArchive(ctx, o.archive)
	if err != nil {
		return fmt.Errorf("the archive of %s (make one with clipctl index, or name it with --archive): %w", name, err)
	}
	defer release()
	img, err := a.Image()
	if err != nil {
		return err
	}
	diffIDs := a.DiffIDs()
	doc, err := o.recording(ctx, on, identity.ChainID(slices.Clone(diffIDs)), args, stderr)
	if err != nil {
		return err
	}
	if err := checkRecording(doc, diffIDs, img); err != nil {
		return err
	}
	warnOfGaps(ctx, doc)
	if err := fit(ctx, on, a, img, doc, stderr); err != nil {
		return err
	}
	img.Prefetch = prefetchList(doc, img)
	return writeRecorded(ctx, path, img, o, stdout)
}

// stage is where a start of an image is recorded.
type stage struct {
	daemon *grpc.ClientConn
	client *containerd.Client
	image  containerd.Image
}

// stage dials the daemon and containerd, which must have the image. The context
// it returns carries the namespace; the caller closes the stage.
func (g *globals) stage(ctx context.Context, name string) (context.Context, *stage, error) {
	daemon, err := g.connectDaemon()
	if err != nil {
		return ctx, nil, err
	}
	ctx, client, err := g.connect(ctx)
	if err != nil {
		return ctx, nil, errors.Join(err, daemon.Close())
	}
	on := &stage{daemon: daemon, client: client}
	if on.image, err = client.GetImage(ctx, name); err != nil {
		on.close()
		return ctx, nil, fmt.Errorf("image %q in containerd's store: %w", name, err)
	}
	return ctx, on, nil
}

func (s *stage) close() {
	s.client.Close()
	s.daemon.Close()
}

// recording returns what is read of the image when args run, or what the daemon
// has noted of its last start.
func (o recordOptions) recording(ctx context.Context, on *stage, chainID digest.Digest, args []string, stderr io.Writer) (record.Document, error) {
	if !o.fromDaemon {
		return runRecorded(ctx, on.daemon, on.client, on.image, args, o.period, stderr)
	}
	doc, err := record.Get(ctx, on.daemon, chainID.String())
	if err != nil {
		return doc, fmt.Errorf("asking the daemon for the last start of %s: %w", on.image.Name(), err)
	}
	return doc, nil
}

// findArchive opens the archive at path, or the one that the daemon would use for
// the image. The caller calls release when it has done with it.
func (s *stage) findArchive(ctx context.Context, path string) (a *archive.Archive, release func(), err error) {
	wanted, err := searched(ctx, s.image)
	if err != nil {
		return nil, nil, err
	}
	if path == "" {
		return s.savedArchive(ctx, wanted)
	}
	if a, err = archive.OpenFile(path); err != nil {
		return nil, nil, err
	}
	if got := a.Info().Descriptor.Digest; got != wanted.Manifest {
		a.Close()
		return nil, nil, fmt.Errorf("%s is of manifest %s, and the image's is %s: %w", path, got, wanted.Manifest, errdefs.ErrInvalidArgument)
	}
	return a, func() { a.Close() }, nil
}

// savedArchive has the daemon, which may look where only it can, write the
// image's archive to a file that is gone as soon as it is open.
func (s *stage) savedArchive(ctx context.Context, image discover.Image) (a *archive.Archive, release func(), err error) {
	dir, err := os.MkdirTemp("", "clipctl-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "image.clip")
	_, err = control.SaveArchive(ctx, s.daemon, control.Save{
		Image: control.Image{Ref: image.Ref, Manifest: image.Manifest, Link: image.Link}, Path: path,
	})
	if errdefs.IsNotImplemented(err) {
		err = fmt.Errorf("the daemon is of another version: %s: %w", sameRelease, err)
	}
	if err != nil {
		return nil, nil, err
	}
	if a, err = archive.OpenFile(path); err != nil {
		return nil, nil, err
	}
	return a, func() { a.Close() }, nil
}

// searched is what the image's archive is searched for by, on this machine.
func searched(ctx context.Context, image containerd.Image) (discover.Image, error) {
	desc, err := platformManifest(ctx, image)
	if err != nil {
		return discover.Image{}, err
	}
	raw, err := content.ReadBlob(ctx, image.ContentStore(), desc)
	if err != nil {
		return discover.Image{}, fmt.Errorf("image %s: manifest: %w", image.Name(), err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return discover.Image{}, fmt.Errorf("image %s: manifest %s: %w", image.Name(), desc.Digest, err)
	}
	return discover.ImageOf(image.Name(), desc.Digest, m), nil
}

// platformManifest describes the image's manifest for this machine.
func platformManifest(ctx context.Context, image containerd.Image) (ocispec.Descriptor, error) {
	if images.IsManifestType(image.Target().MediaType) {
		return image.Target(), nil
	}
	children, err := images.Children(ctx, image.ContentStore(), image.Target())
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	best, err := bestManifest(children)
	if err != nil {
		return best, fmt.Errorf("image %s: %w", image.Name(), err)
	}
	return best, nil
}

// bestManifest returns the one of an index's manifests that is for this machine.
func bestManifest(all []ocispec.Descriptor) (ocispec.Descriptor, error) {
	match := platforms.Default()
	found := slices.DeleteFunc(slices.Clone(all), func(d ocispec.Descriptor) bool {
		return !images.IsManifestType(d.MediaType) || d.Platform == nil || !match.Match(*d.Platform)
	})
	if len(found) == 0 {
		return ocispec.Descriptor{}, fmt.Errorf("it has no manifest for %s: %w", platforms.DefaultString(), errdefs.ErrNotFound)
	}
	return slices.MinFunc(found, func(a, b ocispec.Descriptor) int {
		if match.Less(*a.Platform, *b.Platform) {
			return -1
		}
		return 1
	}), nil
}

// checkRecording checks that doc is of the image that the archive is of.
func checkRecording(doc record.Document, diffIDs []digest.Digest, img *archive.Image) error {
	if !slices.Equal(doc.Layers, diffIDs) {
		return fmt.Errorf("what was recorded is of other layers than the image's: %w", errdefs.ErrInvalidArgument)
	}
	if len(doc.Touches) == 0 {
		return fmt.Errorf("nothing of the image was read: %w", errdefs.ErrNotFound)
	}
	for _, t := range doc.Touches {
		if t.Layer < 0 || t.Layer >= len(img.Layers) || img.Layers[t.Layer].Index == nil || t.Off < 0 || t.Len < 1 {
			return fmt.Errorf("what was recorded names layer %d, which cannot be read lazily: %w", t.Layer, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// fit fits img's layer indexes to what was recorded.
func fit(ctx context.Context, on *stage, a *archive.Archive, img *archive.Image, doc record.Document, stderr io.Writer) error {
	m, _ := a.Manifest()
	all := make([]index.Fitting, len(img.Layers))
	for i, l := range img.Layers {
		all[i] = index.Fitting{Layer: m.Layers[i], Index: l.Index}
	}
	for _, t := range doc.Touches {
		all[t.Layer].Reads = append(all[t.Layer].Reads, index.Stretch{Off: inflate.Out(t.Off), End: inflate.Out(t.Off + t.Len)})
	}
	var todo []index.Fitting
	var layers []ocispec.Descriptor
	var places []int
	for i, f := range all {
		if f.CanFit() {
			todo, layers, places = append(todo, f), append(layers, f.Layer), append(places, i)
		}
	}
	fmt.Fprintf(stderr, "reading %d layers once more, to fit the archive to what was read\n", len(todo))
	progress := newProgress(stderr, layers)
	fitted, err := index.Fit(ctx, on.blobs(img.StorageRef), todo, progress)
	progress.close(err)
	if err != nil {
		return err
	}
	for i, x := range fitted {
		img.Layers[places[i]].Index = x
	}
	return nil
}

// blobs opens layers of the image in containerd's store, or else in a registry.
func (s *stage) blobs(ref string) index.Opener {
	registry := remote.New(remote.Options{ConfigPath: defaultHostsDirs})
	store := s.image.ContentStore()
	return func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
		ra, err := store.ReaderAt(ctx, desc)
		if err == nil {
			return blobReader{content.NewReader(ra), ra}, nil
		}
		if !errdefs.IsNotFound(err) {
			return nil, err
		}
		return registry.Open(ctx, []string{s.image.Name(), ref}, desc.Digest, 0, desc.Size)
	}
}

// prefetchList turns touches into spans, each at its first touch.
func prefetchList(doc record.Document, img *archive.Image) *archive.Prefetch {
	list := &archive.Prefetch{Recorded: doc.Began.Truncate(time.Second)}
	seen := map[archive.SpanRange]bool{}
	for _, t := range doc.Touches {
		x := img.Layers[t.Layer].Index
		size := int64(x.SpanSize)
		for span := t.Off / size; span*size < min(t.Off+t.Len, int64(x.OutSize)); span++ {
			one := archive.SpanRange{Layer: t.Layer, First: int(span), Count: 1}
			if seen[one] {
				continue
			}
			seen[one] = true
			if n := len(list.Spans); n > 0 && list.Spans[n-1].Layer == t.Layer && list.Spans[n-1].End() == one.First {
				list.Spans[n-1].Count++
				continue
			}
			list.Spans = append(list.Spans, one)
		}
	}
	return list
}

// warnOfGaps says what the recording cannot know.
func warnOfGaps(ctx context.Context, doc record.Document) {
	if len(doc.Hidden) > 0 {
		log.G(ctx).WithField("layers", doc.Hidden).Warn("the daemon did not see all that was read of some layers, which were complete or in use; " +
			"clipctl record with a command sees everything")
	}
	if doc.Full {
		log.G(ctx).WithField("bytes", int64(record.MostBytes)).Warn("only the first part of what was read is in the list")
	}
}

func writeRecorded(ctx context.Context, path string, img *archive.Image, o recordOptions, stdout io.Writer) error {
	st, err := archive.WriteFile(path, img)
	if err != nil {
		return fmt.Errorf("writing the archive: %w", err)
	}
	var bytes int64
	for _, r := range img.Prefetch.Spans {
		bytes += int64(r.Count) * int64(img.Layers[r.Layer].Index.SpanSize)
	}
	what := fmt.Sprintf("%s read in %d ranges", size(bytes), len(img.Prefetch.Spans))
	if o.output != "" || !o.push {
		fmt.Fprintf(stdout, "%s\t%s\t%s\n", path, size(st.Size), what)
	}
	if !o.push {
		return nil
	}
	id, n, err := publish.Push(ctx, path, img.StorageRef)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "pushed %s\tfor %s\t%s\t%s\n", id, img.StorageRef, size(n), what)
	return nil
}
