package discover

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// upstreamArchive puts an archive of the image that ref names into the
// finder's directory, as CLIP itself makes it.
func upstreamArchive(t *testing.T, f *Finder, ref, storageRef string) string {
	t.Helper()
	require.NoError(t, clip.SetLogLevel("disabled"))
	path := filepath.Join(f.opts.Dir, "theirs.clip")
	require.NoError(t, clip.CreateFromOCIImage(t.Context(), clip.CreateFromOCIImageOptions{
		ImageRef: ref, StorageImageRef: storageRef, OutputPath: path,
	}))
	return path
}

// pushed puts an image into the registry, and tags it.
func (s *server) pushed(t *testing.T) *testutil.Image {
	t.Helper()
	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "a", Data: "first"}), testutil.Tar(t, testutil.File{Name: "b", Data: "second"}))
	img.Push(t, s.host, repo)
	testutil.PutManifest(t, s.host, repo, "1", img.Descriptor.MediaType, img.Manifest)
	return img
}

func TestAdopt(t *testing.T) {
	for _, storageRef := range []string{"", "registry.example.com/team/app:1"} {
		s := startServer(t, true)
		f := s.finder(t)
		img := s.pushed(t)
		path := upstreamArchive(t, f, s.ref(), storageRef)

		before := s.gets()
		a, release, err := f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
		require.NoError(t, err)
		require.Equal(t, img.DiffIDs, a.DiffIDs())
		require.Equal(t, s.ref(), a.Info().StorageRef, "where containerd pulls it from")
		require.Equal(t, img.Platform, a.Info().Platform)
		for i := range img.Layers {
			x, err := a.Layer(i)
			require.NoError(t, err)
			require.Len(t, x.Entries, 1)
		}
		release()
		require.Equal(t, before+1+len(img.Layers), s.gets(), "config and layers, once")

		require.FileExists(t, f.indexedPath(img.Descriptor.Digest))
		again := New(f.opts)
		_, release, err = again.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
		require.NoError(t, err)
		release()
		again.Close()
		require.Equal(t, before+1+len(img.Layers), s.gets(), "what was made is used the next time")

		// What was made goes with what it was made of.
		require.NoError(t, f.Sweep(t.Context()))
		require.FileExists(t, f.indexedPath(img.Descriptor.Digest))
		require.NoError(t, os.Remove(path))
		require.NoError(t, f.Sweep(t.Context()))
		require.NoFileExists(t, f.indexedPath(img.Descriptor.Digest))
	}
}

// stream is a Stream that remembers.
type stream struct {
	bytes.Buffer
	of     digest.Digest
	closed bool
}

func (s *stream) Done(diffID digest.Digest) { s.of = diffID }
func (s *stream) Close()                    { s.closed = true }

// What is streamed in order to be indexed is there for the layers that are
// added, until the image is forgotten.
func TestAdoptKeepsStreams(t *testing.T) {
	s := startServer(t, true)
	f := s.finder(t)
	var mu sync.Mutex // guards streams
	var streams []*stream
	f.opts.Receive = func() Stream {
		mu.Lock()
		defer mu.Unlock()
		streams = append(streams, new(stream))
		return streams[len(streams)-1]
	}
	img := s.pushed(t)
	upstreamArchive(t, f, s.ref(), "")
	_, release, err := f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.NoError(t, err)
	require.Len(t, streams, len(img.DiffIDs))
	for _, k := range streams {
		require.Equal(t, k.of, digest.FromBytes(k.Bytes()))
		require.Contains(t, img.DiffIDs, k.of)
	}
	f.Forget(Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.False(t, streams[0].closed, "it is still in use")
	release()
	for _, k := range streams {
		require.True(t, k.closed)
	}
}

// What other images brought to the node is not streamed again, if it is the same blob.
func TestAdoptKnown(t *testing.T) {
	s := startServer(t, true)
	f := s.finder(t)
	img := s.pushed(t)
	full, err := archive.Open(bytes.NewReader(archiveOf(t, img)), int64(len(archiveOf(t, img))))
	require.NoError(t, err)
	upstreamArchive(t, f, s.ref(), "")
	f.opts.Known = func(diffID digest.Digest) (*layer.Index, error) {
		switch diffID {
		case img.DiffIDs[0]:
			return full.Layer(0)
		case img.DiffIDs[1]:
			x, err := full.Layer(1)
			x.Digest = digest.FromString("the same stream, compressed anew")
			return x, err
		}
		return nil, errdefs.ErrNotFound
	}
	before := s.gets()
	a, release, err := f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.NoError(t, err)
	defer release()
	require.Equal(t, before+2, s.gets(), "config and one layer")
	for i := range img.Layers {
		want, err := full.Layer(i)
		require.NoError(t, err)
		got, err := a.Layer(i)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}

	f = s.finder(t)
	upstreamArchive(t, f, s.ref(), "")
	f.opts.Known = func(digest.Digest) (*layer.Index, error) { return nil, errdefs.ErrDataLoss }
	before = s.gets()
	_, release, err = f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.NoError(t, err)
	release()
	require.Equal(t, before+1+len(img.Layers), s.gets(), "what is damaged is streamed")
}

// Two images that are pulled at once, one of which has a layer twice, stream what they share once.
func TestAdoptAtOnce(t *testing.T) {
	s := startServer(t, true)
	shared, own := testutil.Tar(t, testutil.File{Name: "a", Data: "shared"}), testutil.Tar(t, testutil.File{Name: "b", Data: "own"})
	one, two := testutil.NewImage(t, shared), testutil.NewImage(t, shared, own, shared)
	f := s.finder(t)
	for tag, img := range map[string]*testutil.Image{"one": one, "two": two} {
		img.Push(t, s.host, repo)
		testutil.PutManifest(t, s.host, repo, tag, img.Descriptor.MediaType, img.Manifest)
		path := upstreamArchive(t, f, s.host+"/"+repo+":"+tag, "")
		require.NoError(t, os.Rename(path, filepath.Join(f.opts.Dir, tag+".clip")))
	}
	// The shared layer comes when the other one has been asked for.
	held, asked := make(chan struct{}), make(chan struct{})
	fetcher := f.opts.Fetcher
	f.opts.Fetcher = func(ctx context.Context, ref string) (remotes.Fetcher, error) {
		inner, err := fetcher(ctx, ref)
		return remotes.FetcherFunc(func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
			switch desc.Digest {
			case one.Layers[0].Digest:
				close(held) // a second time it would panic
				<-asked
			case two.Layers[1].Digest:
				close(asked)
			}
			return inner.Fetch(ctx, desc)
		}), err
	}
	f.opts.Referrers = false
	found := make(chan error, 2)
	for tag, img := range map[string]*testutil.Image{"one": one, "two": two} {
		find := func() {
			a, release, err := f.Find(t.Context(), Image{Ref: s.host + "/" + repo + ":" + tag, Manifest: img.Descriptor.Digest})
			if err == nil {
				defer release()
				if !slices.Equal(img.DiffIDs, a.DiffIDs()) {
					err = errors.New("the archive is of another image")
				}
			}
			found <- err
		}
		go find()
	}
	<-held
	for range 2 {
		require.NoError(t, <-found)
	}
	f.Close()
	require.Empty(t, f.streamed)
}

// The indexes of an archive are not used for one that took its place.
func TestAdoptReplaced(t *testing.T) {
	s := startServer(t, true)
	f := s.finder(t)
	img := s.pushed(t)
	upstreamArchive(t, f, s.ref(), "")
	_, release, err := f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.NoError(t, err)
	release()
	other := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "c", Data: "third"}))
	other.Push(t, s.host, repo)
	testutil.PutManifest(t, s.host, repo, "2", other.Descriptor.MediaType, other.Manifest)
	ref := s.host + "/" + repo + ":2"
	upstreamArchive(t, f, ref, "")
	a, release, err := f.Find(t.Context(), Image{Ref: ref, Manifest: other.Descriptor.Digest})
	require.NoError(t, err)
	require.Equal(t, other.DiffIDs, a.DiffIDs())
	release()
	require.NoFileExists(t, f.indexedPath(img.Descriptor.Digest))
	require.FileExists(t, f.indexedPath(other.Descriptor.Digest))
}

// An archive that a newer program wrote cannot be used. That is why the image
// is not lazy, and not that there was none.
func TestNewerVersion(t *testing.T) {
	s := startServer(t, true)
	img := s.pushed(t)
	other := digest.FromString("another image")
	for name, c := range map[string]struct {
		write func(t *testing.T, f *Finder) string
		at    func(size int) int // the byte of the version
		image digest.Digest      // which other image is told, too
	}{
		"ours": {func(t *testing.T, f *Finder) string {
			path := filepath.Join(f.opts.Dir, "ours.clip")
			require.NoError(t, os.WriteFile(path, archiveOf(t, img), 0o600))
			return path
		}, func(size int) int { return size - 64 + 8 }, ""},
		"CLIP's": {func(t *testing.T, f *Finder) string { return upstreamArchive(t, f, s.ref(), "") },
			func(int) int { return len(common.ClipFileStartBytes) }, other},
	} {
		t.Run(name, func(t *testing.T) {
			f := s.finder(t)
			path := c.write(t, f)
			b, err := os.ReadFile(path)
			require.NoError(t, err)
			b[c.at(len(b))]++
			require.NoError(t, os.WriteFile(path, b, 0o600))
			_, _, err = f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
			require.ErrorIs(t, err, errdefs.ErrNotFound)
			require.ErrorContains(t, err, path)
			require.ErrorContains(t, err, "newer version: upgrade containerd-clip")
			_, _, err = f.Find(t.Context(), Image{Ref: s.ref(), Manifest: other})
			if c.image == "" {
				require.NotContains(t, err.Error(), "newer version", "it is of another image")
			} else {
				require.ErrorContains(t, err, "newer version", "nobody can tell which image it is of")
			}

			// Another one that can be used goes first.
			require.NoError(t, os.WriteFile(filepath.Join(f.opts.Dir, "zz.clip"), archiveOf(t, img), 0o600))
			f.Forget(Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
			_, release, err := f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
			require.NoError(t, err)
			release()
		})
	}
}

// An archive of ours, wherever it is, goes before one without layer indexes.
func TestAdoptLast(t *testing.T) {
	s := startServer(t, true)
	f := s.finder(t)
	img := s.pushed(t)
	image := Image{Ref: s.ref(), Manifest: img.Descriptor.Digest}
	path := upstreamArchive(t, f, s.ref(), "")
	_, upstream, err := f.Look(t.Context(), image)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.Equal(t, path, upstream, "of which Find would make one")
	s.refer(s.put(t, artifact{subject: img.Descriptor.Digest, mediaType: archive.MediaType, blob: compress(t, archiveOf(t, img))}))
	a, upstream, err := f.Look(t.Context(), image)
	require.NoError(t, err)
	require.Empty(t, upstream)
	require.NoError(t, a.Close())
	_, release, err := f.Find(t.Context(), image)
	require.NoError(t, err)
	release()
	require.NoFileExists(t, f.indexedPath(img.Descriptor.Digest))
}

// An archive that names its image by reference only is taken for that
// reference, and refused if the reference has moved on.
func TestAdoptByReference(t *testing.T) {
	s := startServer(t, true)
	f := s.finder(t)
	img := s.pushed(t)
	path := upstreamArchive(t, f, s.ref(), "")
	rewrite(t, path, func(info *common.OCIStorageInfo) { info.ImageMetadata = nil })
	_, _, err := f.Find(t.Context(), Image{Ref: s.host + "/" + repo + ":2", Manifest: img.Descriptor.Digest})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	f.Forget(Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	a, release, err := f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.NoError(t, err)
	require.Equal(t, img.DiffIDs, a.DiffIDs())
	release()

	moved := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "c", Data: "third"}))
	moved.Push(t, s.host, repo)
	_, _, err = f.Find(t.Context(), Image{Ref: s.ref(), Manifest: moved.Descriptor.Digest})
	require.ErrorContains(t, err, "other layers")
}

func TestAdoptFails(t *testing.T) {
	s := startServer(t, true)
	img := s.pushed(t)
	other := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "c", Data: "third"}))
	other.Push(t, s.host, repo)
	testutil.PutManifest(t, s.host, repo, "2", other.Descriptor.MediaType, other.Manifest)

	// It says that it is of another image.
	f := s.finder(t)
	path := upstreamArchive(t, f, s.host+"/"+repo+":2", "")
	rewrite(t, path, func(info *common.OCIStorageInfo) { info.ImageMetadata.Digest = img.Descriptor.Digest.String() })
	_, _, err := f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.ErrorContains(t, err, "other layers")
	require.ErrorContains(t, err, path)

	// A layer is not what its digest says.
	f = s.finder(t)
	upstreamArchive(t, f, s.ref(), "")
	fetcher := f.opts.Fetcher
	f.opts.Fetcher = func(ctx context.Context, ref string) (remotes.Fetcher, error) {
		inner, err := fetcher(ctx, ref)
		return swapped{inner, img.Layers[1].Digest, img.Layers[0].Digest}, err
	}
	_, _, err = f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.ErrorIs(t, err, errAdopting)
	gets := s.gets()
	_, _, err = f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.ErrorIs(t, err, errAdopting)
	require.Equal(t, gets, s.gets(), "it is not tried again for the next layer")

	// The daemon ends meanwhile.
	f = s.finder(t)
	upstreamArchive(t, f, s.ref(), "")
	arrived := make(chan struct{})
	f.opts.Fetcher = func(ctx context.Context, _ string) (remotes.Fetcher, error) {
		close(arrived)
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	f.opts.Referrers = false
	failed := make(chan error, 1)
	go func() {
		_, _, err := f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
		failed <- err
	}()
	<-arrived
	f.Close()
	require.ErrorIs(t, <-failed, context.Canceled)
}

// swapped delivers one blob for another.
type swapped struct {
	remotes.Fetcher
	asked, given digest.Digest
}

func (s swapped) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if desc.Digest == s.asked {
		desc.Digest = s.given
	}
	return s.Fetcher.Fetch(ctx, desc)
}

// A file of CLIP's that is of no image is passed over, with the reason in the log.
func TestNotOfAnImage(t *testing.T) {
	s := startServer(t, true)
	f := s.finder(t)
	require.NoError(t, clip.SetLogLevel("disabled"))
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("data"), 0o600))
	require.NoError(t, clip.CreateArchive(clip.CreateOptions{InputPath: dir, OutputPath: filepath.Join(f.opts.Dir, "data.clip")}))
	_, err := imageOf(filepath.Join(f.opts.Dir, "data.clip"))
	require.ErrorContains(t, err, "holds data instead of an image")
	_, _, err = f.Find(t.Context(), Image{Ref: s.ref(), Manifest: digest.FromString("x")})
	require.Error(t, err)
}

// Nothing that arrives late keeps a search from ending.
func TestStalled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	w := watched{strings.NewReader("x"), time.AfterFunc(time.Hour, func() { cancel(errStalled) })}
	defer w.watch.Stop()
	n, err := w.Read(make([]byte, 2))
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.True(t, w.watch.Stop(), "it runs again")
	w.watch.Reset(0)
	<-ctx.Done()
	require.ErrorIs(t, context.Cause(ctx), errStalled)
}
