package export

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// named is a source of img alone.
func named(img *testutil.Image, ref string) *Source {
	return &Source{Name: ref, Kind: "containerd", Ref: ref, Provider: img.Blobs, Target: img.Descriptor}
}

// requireValid has go-containerregistry read all of a layout and compute
// every digest anew. It returns the entries of index.json.
func requireValid(t *testing.T, dir string) []v1.Descriptor {
	t.Helper()
	p, err := layout.FromPath(dir)
	require.NoError(t, err)
	x, err := p.ImageIndex()
	require.NoError(t, err)
	require.NoError(t, validate.Index(x))
	m, err := x.IndexManifest()
	require.NoError(t, err)
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 3, "nothing but blobs, index.json and oci-layout")
	return m.Manifests
}

func TestWriteLayout(t *testing.T) {
	one, two := simple(t, "one"), simple(t, "two")
	dir := filepath.Join(t.TempDir(), "new", "layout")
	w, err := WriteLayout(t.Context(), named(one, "example.com/app:1"), dir, WriteOptions{Platforms: ThisPlatform})
	require.NoError(t, err)
	require.Equal(t, Written{Target: w.Target, Blobs: 3, Bytes: w.Bytes}, w)
	got := requireValid(t, dir)
	require.Len(t, got, 1)
	require.Equal(t, one.Descriptor.Digest.String(), got[0].Digest.String())
	require.Equal(t, map[string]string{"io.containerd.image.name": "example.com/app:1", "org.opencontainers.image.ref.name": "1"}, got[0].Annotations)
	require.Equal(t, one.Platform.Architecture, got[0].Platform.Architecture)

	// Another name, the first name again with another image, the same once more.
	_, err = WriteLayout(t.Context(), named(one, "example.com/app:1"), dir, WriteOptions{Platforms: ThisPlatform, Name: "example.com/app:2"})
	require.NoError(t, err)
	require.Len(t, requireValid(t, dir), 2)
	for range 2 {
		w, err = WriteLayout(t.Context(), named(two, "example.com/app:1"), dir, WriteOptions{Platforms: ThisPlatform})
		require.NoError(t, err)
		got = requireValid(t, dir)
		require.Len(t, got, 2)
	}
	require.Equal(t, 3, w.Had)
	// Another image with a tag that is taken: the tag stays whose it is.
	for range 2 {
		_, err = WriteLayout(t.Context(), named(one, "example.com/other:1"), dir, WriteOptions{Platforms: ThisPlatform})
		require.NoError(t, err)
	}
	got = requireValid(t, dir)
	require.Len(t, got, 3)
	require.Equal(t, "example.com/other:1", got[2].Annotations[ocispec.AnnotationRefName])
	for tag, want := range map[string]*testutil.Image{"1": two, "2": one, "example.com/app:2": one, "example.com/other:1": one} {
		s, err := FromLayout(dir, tag)
		require.NoError(t, err)
		require.Equal(t, want.Descriptor.Digest, s.Target.Digest, tag)
	}
}

// TestShared exports out of a real content store: the blobs share their data
// with it unless that is refused.
func TestShared(t *testing.T) {
	img := simple(t, "one")
	parent := t.TempDir()
	store, err := local.NewStore(filepath.Join(parent, "store"))
	require.NoError(t, err)
	for d, b := range img.Blobs {
		require.NoError(t, content.WriteBlob(t.Context(), store, d.String(), strings.NewReader(string(b)), ocispec.Descriptor{Digest: d, Size: int64(len(b))}))
	}
	outside := named(img, "example.com/app:1")
	outside.Provider = layoutProvider(filepath.Join(parent, "store"))
	for name, c := range map[string]struct {
		source *Source
		copy   bool
		shared int
	}{
		"inside containerd":  {source: &Source{Provider: store, Target: img.Descriptor}, shared: 3},
		"outside containerd": {source: outside, shared: 3},
		"copied":             {source: outside, copy: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(parent, strings.ReplaceAll(name, " ", "-"))
			w, err := WriteLayout(t.Context(), c.source, dir, WriteOptions{Platforms: ThisPlatform, Copy: c.copy})
			require.NoError(t, err)
			require.Equal(t, c.shared, w.Shared)
			requireValid(t, dir)
			for d := range img.Blobs {
				blob, origin := testutil.BlobPath(dir, d), testutil.BlobPath(filepath.Join(parent, "store"), d)
				st, err := os.Stat(blob)
				require.NoError(t, err)
				require.Equal(t, os.FileMode(0o444), st.Mode().Perm())
				require.Equal(t, c.copy || clones(t, parent), inode(t, blob) != inode(t, origin), "a hard link, or a file of its own")
			}
		})
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	return st.Ino
}

// clones says whether files can be cloned in dir.
func clones(t *testing.T, dir string) bool {
	t.Helper()
	src, err := os.CreateTemp(dir, "src")
	require.NoError(t, err)
	defer src.Close()
	dst, err := os.CreateTemp(dir, "dst")
	require.NoError(t, err)
	defer dst.Close()
	return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil
}

// TestOtherFileSystem has layout and store on different file systems.
func TestOtherFileSystem(t *testing.T) {
	img := simple(t, "one")
	store := t.TempDir()
	img.Blobs.Write(t, store)
	dir, err := os.MkdirTemp("/dev/shm", "layout-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	var a, b unix.Stat_t
	require.NoError(t, unix.Stat(store, &a))
	require.NoError(t, unix.Stat(dir, &b))
	require.NotEqual(t, a.Dev, b.Dev, "the test needs two file systems")
	w, err := WriteLayout(t.Context(), &Source{Provider: layoutProvider(store), Target: img.Descriptor}, dir, WriteOptions{Platforms: ThisPlatform})
	require.NoError(t, err)
	require.Zero(t, w.Shared)
	requireValid(t, dir)
}

// TestAtOnce adds many images to one layout at the same time, some of them under one name, beside somebody who reads all
// of it again and again.
func TestAtOnce(t *testing.T) {
	const writers, exports, shared = 8, 4, "example.com/app:moves"
	dir := t.TempDir()
	write := func(img *testutil.Image, name string) error {
		_, err := WriteLayout(context.Background(), named(img, name), dir, WriteOptions{Platforms: ThisPlatform})
		return err
	}
	require.NoError(t, write(simple(t, "first"), shared))
	var images []*testutil.Image // each for two writers
	for i := range writers / 2 {
		noise := make([]byte, 256<<10) // is not written at once
		_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(noise)
		img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "noise", Data: string(noise)}))
		images = append(images, img, img)
	}
	var writing sync.WaitGroup
	errs := make([]error, writers)
	looked := make(chan struct{}) // closed when it was looked at often enough, or in vain
	enough := sync.OnceFunc(func() { close(looked) })
	for i, img := range images {
		writing.Go(func() {
			for n := range exports {
				if n == exports-1 {
					<-looked // else all is written while a busy machine looks once
				}
				errs[i] = errors.Join(errs[i], write(img, shared), write(img, fmt.Sprintf("example.com/app:%d-%d", i, n)))
			}
		})
	}
	t.Cleanup(func() { enough(); writing.Wait() })
	done := make(chan struct{})
	go func() { defer close(done); writing.Wait() }()
	looks, before := 0, 0
	for reading := true; reading; looks++ {
		if looks > 2 {
			enough()
		}
		select {
		case <-done:
			reading = false
		default:
		}
		n, err := readAll(dir)
		require.NoError(t, err)
		require.GreaterOrEqual(t, n, before, "no image goes away")
		before = n
		s, err := FromLayout(dir, shared)
		require.NoError(t, err)
		_, err = s.Manifests(t.Context(), ThisPlatform)
		require.NoError(t, err)
	}
	require.NoError(t, errors.Join(errs...))
	require.Greater(t, looks, 2)
	require.Len(t, requireValid(t, dir), 1+writers*exports)
}

// readAll has go-containerregistry read all of a layout and compute every digest anew. It returns how many images
// there are.
func readAll(dir string) (int, error) {
	p, err := layout.FromPath(dir)
	if err != nil {
		return 0, err
	}
	x, err := p.ImageIndex()
	if err != nil {
		return 0, err
	}
	m, err := x.IndexManifest()
	if err != nil {
		return 0, err
	}
	return len(m.Manifests), validate.Index(x)
}

func TestWritePlatforms(t *testing.T) {
	raw := testutil.Tar(t, testutil.File{Name: "f", Data: "x"})
	a, b := testutil.NewPlatformImage(t, amd64, raw), testutil.NewPlatformImage(t, arm64, raw)
	c := testutil.NewPlatformImage(t, riscv64, raw)
	unknown := ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	attestation := testutil.NewPlatformImage(t, unknown, raw)
	several := func(descs ...ocispec.Descriptor) func(*testing.T) *Source {
		return func(t *testing.T) *Source {
			s, all := source(ocispec.Descriptor{}, a, b, c, attestation)
			s.Ref = "example.com/app:1"
			s.Target = all.Add(ocispec.MediaTypeImageIndex, testutil.JSON(t, index(descs...)))
			return s
		}
	}
	three := several(with(a, &amd64), with(b, &arm64), with(c, &riscv64))
	withoutC := func(t *testing.T) *Source {
		s := three(t)
		delete(s.Provider.(testutil.Blobs), c.Descriptor.Digest)
		return s
	}
	for name, c := range map[string]struct {
		source    func(*testing.T) *Source
		sel       Selection
		whole     bool
		platforms []string
	}{
		"one of several":             {three, OnePlatform(arm64), false, []string{"arm64"}},
		"all":                        {three, AllPlatforms, true, []string{"amd64", "arm64", "riscv64"}},
		"all that are here":          {withoutC, AllPlatforms, false, []string{"amd64", "arm64"}},
		"the only one":               {several(with(a, &amd64)), OnePlatform(amd64), true, []string{"amd64"}},
		"the only one, attested":     {several(with(a, &amd64), with(attestation, &unknown)), OnePlatform(amd64), true, []string{"amd64", "unknown"}},
		"one of several, attested":   {several(with(a, &amd64), with(b, &arm64), with(attestation, &unknown)), OnePlatform(amd64), false, []string{"amd64"}},
		"several, no platform named": {several(with(a, nil), with(b, nil)), OnePlatform(amd64), false, []string{"amd64"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := c.source(t)
			dir := t.TempDir()
			w, err := WriteLayout(t.Context(), s, dir, WriteOptions{Platforms: c.sel})
			require.NoError(t, err)
			require.Equal(t, c.whole, w.Target.Digest == s.Target.Digest)
			got := requireValid(t, dir)
			require.Len(t, got, 1, "one name, one entry")
			require.Equal(t, "1", got[0].Annotations[ocispec.AnnotationRefName])
			require.Equal(t, c.platforms, architectures(t, dir, w.Target))

			file := filepath.Join(t.TempDir(), "image.tar")
			archived, err := WriteTar(t.Context(), s, file, WriteOptions{Platforms: c.sel})
			require.NoError(t, err)
			require.Equal(t, w.Target, archived.Target)
			back, err := FromArchive(file, "1")
			require.NoError(t, err)
			defer back.Close()
			_, err = WriteLayout(t.Context(), back, t.TempDir(), WriteOptions{Platforms: AllPlatforms})
			require.NoError(t, err, "all blobs are in the tar, and what they should be")
			again := filepath.Join(t.TempDir(), "again.tar")
			_, err = WriteTar(t.Context(), s, again, WriteOptions{Platforms: c.sel})
			require.NoError(t, err)
			require.Equal(t, read(t, file), read(t, again))
		})
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	return string(b)
}

// architectures are those of the manifests below an entry of index.json.
func architectures(t *testing.T, dir string, target ocispec.Descriptor) (found []string) {
	t.Helper()
	if target.MediaType == ocispec.MediaTypeImageManifest {
		return []string{target.Platform.Architecture}
	}
	var x ocispec.Index
	require.NoError(t, json.Unmarshal([]byte(read(t, testutil.BlobPath(dir, target.Digest))), &x))
	for _, m := range x.Manifests {
		require.NotNil(t, m.Platform)
		found = append(found, m.Platform.Architecture)
	}
	return found
}

// TestAttestationMissing has provenance that was not pulled: the image is
// exported without.
func TestAttestationMissing(t *testing.T) {
	a := testutil.NewPlatformImage(t, amd64, testutil.Tar(t, testutil.File{Name: "f", Data: "x"}))
	attestation := testutil.NewPlatformImage(t, ocispec.Platform{OS: "unknown", Architecture: "unknown"}, testutil.Tar(t, testutil.File{Name: "p", Data: "y"}))
	s, all := source(ocispec.Descriptor{}, a, attestation)
	s.Target = all.Add(ocispec.MediaTypeImageIndex, testutil.JSON(t, index(with(a, &amd64), with(attestation, &attestation.Platform))))
	delete(all, attestation.Layers[0].Digest)
	dir := t.TempDir()
	w, err := WriteLayout(t.Context(), s, dir, WriteOptions{Platforms: OnePlatform(amd64)})
	require.NoError(t, err)
	require.Equal(t, a.Descriptor.Digest, w.Target.Digest)
	requireValid(t, dir)
}

func TestWriteRefuses(t *testing.T) {
	img := simple(t, "a")
	occupied := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(occupied, "precious"), nil, 0o644))
	future := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(future, ocispec.ImageLayoutFile), []byte(`{"imageLayoutVersion":"9"}`), 0o644))
	broken := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(broken, ocispec.ImageLayoutFile), []byte(layoutMarker), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(broken, ocispec.ImageIndexFile), []byte(`{"manifests":3}`), 0o644))
	lazy := named(img, "example.com/app:1")
	lazy.Provider = without(img.Blobs, img.Layers[0].Digest)
	altered := without(img.Blobs, img.Layers[0].Digest)
	altered[img.Layers[0].Digest] = make([]byte, img.Layers[0].Size)
	wrong := named(img, "example.com/app:1")
	wrong.Provider = altered
	for name, c := range map[string]struct {
		source   *Source
		dir      string
		is       error
		contains []string
	}{
		"other files":    {named(img, "a:1"), occupied, os.ErrNotExist, []string{occupied, "not an OCI layout"}},
		"other version":  {named(img, "a:1"), future, errdefs.ErrInvalidArgument, []string{future, `version "9"`}},
		"broken index":   {named(img, "a:1"), broken, nil, []string{"index.json"}},
		"lazily pulled":  {lazy, t.TempDir(), errdefs.ErrNotFound, []string{img.Layers[0].Digest.String(), "clipctl content ensure"}},
		"altered blob":   {wrong, t.TempDir(), errdefs.ErrDataLoss, []string{img.Layers[0].Digest.String()}},
		"below a file":   {named(img, "a:1"), "/proc/self/exe/layout", unix.ENOTDIR, []string{"layout"}},
		"other platform": {named(img, "a:1"), t.TempDir(), nil, []string{"no manifest for platform windows"}},
	} {
		t.Run(name, func(t *testing.T) {
			sel := ThisPlatform
			if name == "other platform" {
				sel = OnePlatform(ocispec.Platform{OS: "windows", Architecture: "amd64"})
			}
			_, err := WriteLayout(t.Context(), c.source, c.dir, WriteOptions{Platforms: sel})
			require.Error(t, err)
			if c.is != nil {
				require.ErrorIs(t, err, c.is)
			}
			for _, part := range c.contains {
				require.ErrorContains(t, err, part)
			}
			require.NoFileExists(t, testutil.BlobPath(c.dir, img.Descriptor.Digest), "the manifest comes last")
			left, _ := filepath.Glob(filepath.Join(c.dir, temporary))
			require.Empty(t, left)
		})
	}
	file := filepath.Join(t.TempDir(), "a.tar")
	_, err := WriteTar(t.Context(), wrong, file, WriteOptions{Platforms: ThisPlatform})
	require.ErrorIs(t, err, errdefs.ErrDataLoss)
	entries, err := os.ReadDir(filepath.Dir(file))
	require.NoError(t, err)
	require.Empty(t, entries, "no half tar")
}

func without(blobs testutil.Blobs, d digest.Digest) testutil.Blobs {
	left := testutil.Blobs{}
	for k, v := range blobs {
		if k != d {
			left[k] = v
		}
	}
	return left
}

// TestInterrupted goes on after an export that ended in the middle of it.
func TestInterrupted(t *testing.T) {
	img := simple(t, "a")
	dir := t.TempDir()
	img.Blobs.Write(t, dir)
	half := testutil.BlobPath(dir, img.Layers[0].Digest)
	require.NoError(t, os.Truncate(half, 3))
	require.NoError(t, os.WriteFile(filepath.Join(dir, ".export-1"), nil, 0o600))
	w, err := WriteLayout(t.Context(), named(img, "a:1"), dir, WriteOptions{Platforms: ThisPlatform})
	require.NoError(t, err)
	require.Equal(t, 2, w.Had)
	require.NoError(t, os.Remove(filepath.Join(dir, ".export-1")))
	requireValid(t, dir)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = WriteLayout(ctx, named(img, "a:1"), t.TempDir(), WriteOptions{Platforms: ThisPlatform})
	require.ErrorIs(t, err, context.Canceled)
}

func TestTagOf(t *testing.T) {
	for name, want := range map[string]string{
		"example.com:5000/team/app:1": "1",
		"example.com:5000/team/app":   "example.com:5000/team/app",
		"app:2":                       "2",
		"example.com/app:1@sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a": "1",
		"Not A Reference": "Not A Reference",
	} {
		require.Equal(t, want, tagOf(name))
	}
}
