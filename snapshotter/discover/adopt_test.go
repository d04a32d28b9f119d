package discover

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
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

		indexed := strings.TrimSuffix(path, ".clip") + ".indexed.clip"
		require.FileExists(t, indexed)
		again := New(f.opts)
		_, release, err = again.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
		require.NoError(t, err)
		release()
		again.Close()
		require.Equal(t, before+1+len(img.Layers), s.gets(), "what was made is used the next time")
	}
}

// An archive of ours, wherever it is, goes before one without layer indexes.
func TestAdoptLast(t *testing.T) {
	s := startServer(t, true)
	f := s.finder(t)
	img := s.pushed(t)
	path := upstreamArchive(t, f, s.ref(), "")
	s.refer(s.put(t, artifact{subject: img.Descriptor.Digest, mediaType: archive.MediaType, blob: compress(t, archiveOf(t, img))}))
	_, release, err := f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.NoError(t, err)
	release()
	require.NoFileExists(t, strings.TrimSuffix(path, ".clip")+".indexed.clip")
}

// An archive that names its image by reference only is taken for that
// reference, and refused if the reference has moved on.
func TestAdoptByReference(t *testing.T) {
	s := startServer(t, true)
	f := s.finder(t)
	img := s.pushed(t)
	path := upstreamArchive(t, f, s.ref(), "")
	m, err := clip.NewClipArchiver().ExtractMetadata(path)
	require.NoError(t, err)
	info := m.StorageInfo.(common.OCIStorageInfo)
	info.ImageMetadata = nil
	require.NoError(t, clip.NewClipArchiver().CreateRemoteArchive(info, m, path))
	_, _, err = f.Find(t.Context(), Image{Ref: s.host + "/" + repo + ":2", Manifest: img.Descriptor.Digest})
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
	m, err := clip.NewClipArchiver().ExtractMetadata(path)
	require.NoError(t, err)
	info := m.StorageInfo.(common.OCIStorageInfo)
	info.ImageMetadata.Digest = img.Descriptor.Digest.String()
	require.NoError(t, clip.NewClipArchiver().CreateRemoteArchive(info, m, path))
	_, _, err = f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
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
	_, _, err := imageOf(filepath.Join(f.opts.Dir, "data.clip"))
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
