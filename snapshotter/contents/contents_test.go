package contents

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// blobs serves ranges of an image's blobs and counts their bytes.
type blobs struct {
	testutil.Blobs
	sources []string
	sent    int64
}

func (b *blobs) Open(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	ra, err := b.ReaderAt(ctx, ocispec.Descriptor{Digest: d})
	if err != nil {
		return nil, err
	}
	b.sources, b.sent = sources, b.sent+n
	return io.NopCloser(io.NewSectionReader(ra, off, n)), nil
}

const ref = "registry.example.com/team/app:1"

func indexed(t *testing.T, files ...testutil.File) (string, *blobs, *testutil.Image) {
	t.Helper()
	img := testutil.NewImage(t, testutil.Tar(t, files...))
	path := filepath.Join(t.TempDir(), "a.clip")
	img.WriteArchive(t, path, ref)
	return path, &blobs{Blobs: img.Blobs}, img
}

func open(t *testing.T, path string, o Options) *Archive {
	t.Helper()
	a, err := Open(path, o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, a.Close()) })
	return a
}

func list(t *testing.T, a *Archive, name string) (paths []string) {
	t.Helper()
	require.NoError(t, a.List(name, func(f File) error {
		paths = append(paths, f.Path)
		return nil
	}))
	return paths
}

func TestIndexed(t *testing.T) {
	path, fetch, img := indexed(t, testutil.File{Name: "d/f", Data: "content"}, testutil.File{Name: "d.x", Data: "x"}, testutil.File{Name: "d/sub/g", Data: ""})
	a := open(t, path, Options{Fetch: fetch})
	require.Equal(t, []string{"/", "/d", "/d/f", "/d/sub", "/d/sub/g", "/d.x"}, list(t, a, "/"))
	require.Equal(t, []string{"/d/sub", "/d/sub/g"}, list(t, a, "d//sub/"))
	require.Zero(t, fetch.sent)
	var b bytes.Buffer
	require.NoError(t, a.Copy(t.Context(), &b, "../d/./f"))
	require.Equal(t, "content", b.String())
	require.Equal(t, []string{ref}, fetch.sources)
	require.ErrorIs(t, a.Copy(t.Context(), &b, "/d"), errdefs.ErrInvalidArgument)
	for _, missing := range []string{"/none", "/d/f/x", "/none/.."} {
		require.ErrorIs(t, a.Copy(t.Context(), &b, missing), errdefs.ErrNotFound, missing)
	}
	d, err := a.Describe()
	require.NoError(t, err)
	require.Equal(t, KindIndexed, d.Kind)
	require.Equal(t, 6, d.Files)
	require.Equal(t, img.DiffIDs[0], d.Layers[0].DiffID)
	require.Equal(t, "gzip", d.Layers[0].Compression)

	// A registry that delivers something else is found out.
	bad := slices.Clone(img.Blobs[img.Layers[0].Digest])
	bad[len(bad)/2] ^= 1
	fetch.Blobs[img.Layers[0].Digest] = bad
	b.Reset()
	require.Error(t, a.Copy(t.Context(), &b, "/d/f"))
	require.Empty(t, b.String())
}

// An image with a layer that has no index can be described, not listed.
func TestNotLazy(t *testing.T) {
	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "f"}))
	path := filepath.Join(t.TempDir(), "a.clip")
	_, err := archive.WriteFile(path, &archive.Image{
		StorageRef: ref, Platform: img.Platform, Descriptor: img.Descriptor, Manifest: img.Manifest, Config: img.Config,
		Layers: []archive.Layer{{Reason: layer.ErrUnsupported.Error()}},
	})
	require.NoError(t, err)
	a := open(t, path, Options{})
	d, err := a.Describe()
	require.NoError(t, err)
	require.Equal(t, layer.ErrUnsupported.Error(), d.Layers[0].NotLazy)
	_, err = a.Stat("/")
	require.ErrorContains(t, err, "layer 1 has no index")
}

// Links are followed as a process in the root would, and no further than Linux goes.
func TestLinks(t *testing.T) {
	require.NoError(t, clip.SetLogLevel("disabled"))
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "in/a/b"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "in/a/f"), []byte("found"), 0o600))
	for name, target := range map[string]string{
		"a/b/up": "../f", "top": "/a/b", "out": "../../../../a/f", "loop": "loop", "gone": "/none", "chain": "top/up", "dir": "a/b/..",
	} {
		require.NoError(t, os.Symlink(target, filepath.Join(dir, "in", name)))
	}
	path := filepath.Join(dir, "a.clip")
	require.NoError(t, clip.CreateArchive(clip.CreateOptions{InputPath: filepath.Join(dir, "in"), OutputPath: path}))
	a := open(t, path, Options{})
	for _, name := range []string{"a/f", "a/b/up", "top/up", "out", "chain", "dir/f", "top/../f"} {
		var b bytes.Buffer
		require.NoError(t, a.Copy(t.Context(), &b, name), name)
		require.Equal(t, "found", b.String(), name)
	}
	_, err := a.Stat("loop")
	require.ErrorContains(t, err, "too many links")
	_, err = a.Stat("gone")
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	// A file that is shorter than the archive says.
	require.NoError(t, os.Truncate(path, 200))
	_, err = Open(path, Options{})
	require.ErrorIs(t, err, archive.ErrCorrupt)
	_, err = Open(filepath.Join(dir, "none"), Options{})
	require.ErrorIs(t, err, os.ErrNotExist)
}

// Holes read as zeros, however the data arrives.
func TestSparseWriter(t *testing.T) {
	extents := []layer.Extent{{Pos: 2, Len: 3}, {Pos: 9, Len: 1}, {Pos: 10, Len: 2}}
	for size := 1; size <= 6; size++ {
		var b bytes.Buffer
		w := &sparseWriter{w: &b, extents: extents}
		for data := []byte("abcdef"); len(data) > 0; data = data[min(size, len(data)):] {
			n, err := w.Write(data[:min(size, len(data))])
			require.NoError(t, err)
			require.Equal(t, min(size, len(data)), n)
		}
		require.Equal(t, "\x00\x00abc\x00\x00\x00\x00def", b.String())
	}
	require.Equal(t, layer.Extent{Pos: 2, Len: 3}, extents[0], "they are the archive's own")
}
