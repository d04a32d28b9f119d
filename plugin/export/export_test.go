package export

import (
	"archive/tar"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

const layoutVersion = `{"imageLayoutVersion":"1.0.0"}`

func tagged(img *testutil.Image, full, short string) ocispec.Descriptor {
	d := img.Descriptor
	d.Annotations = map[string]string{}
	if full != "" {
		d.Annotations[images.AnnotationImageName] = full
	}
	if short != "" {
		d.Annotations[ocispec.AnnotationRefName] = short
	}
	return d
}

func index(manifests ...ocispec.Descriptor) ocispec.Index {
	return ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests}
}

// writeLayout makes an OCI layout of imgs.
func writeLayout(t testing.TB, x ocispec.Index, imgs ...*testutil.Image) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, ocispec.ImageLayoutFile), []byte(layoutVersion), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(dir, ocispec.ImageIndexFile), testutil.JSON(t, x), 0o644))
	for _, img := range imgs {
		img.Blobs.Write(t, dir)
	}
	return dir
}

// writeTar makes an OCI archive of a layout, with the names that some tools write.
func writeTar(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.tar")
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	w := tar.NewWriter(f)
	err = filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "./" + rel, Mode: 0o644, Size: int64(len(b))}); err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	})
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return path
}

var any1 = Selection{Name: "any", Match: platforms.All, All: true}

func simple(t testing.TB, name string) *testutil.Image {
	return testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: name, Data: name}))
}

func TestTags(t *testing.T) {
	one, two := simple(t, "one"), simple(t, "two")
	dir := writeLayout(t, index(tagged(one, "example.com/app:1", "1"), tagged(two, "", "2")), one, two)
	single := writeLayout(t, index(one.Descriptor), one)
	for name, from := range map[string]func(dir, tag string) (*Source, error){
		"layout":  FromLayout,
		"archive": func(dir, tag string) (*Source, error) { return FromArchive(writeTar(t, dir), tag) },
	} {
		t.Run(name, func(t *testing.T) {
			for _, c := range []struct {
				dir, tag, ref string
				want          *testutil.Image
				message       string
			}{
				{dir: dir, tag: "1", ref: "example.com/app:1", want: one},
				{dir: dir, tag: "example.com/app:1", ref: "example.com/app:1", want: one},
				{dir: dir, tag: "2", want: two},
				{dir: single, want: one},
				{dir: dir, message: `has 2 images for tag ""; name one of: 1, 2`},
				{dir: dir, tag: "3", message: `has 0 images for tag "3"; name one of: 1, 2`},
			} {
				s, err := from(c.dir, c.tag)
				if c.message != "" {
					require.ErrorIs(t, err, errdefs.ErrNotFound)
					require.ErrorContains(t, err, c.message)
					continue
				}
				require.NoError(t, err)
				require.Equal(t, c.want.Descriptor.Digest, s.Target.Digest)
				require.Equal(t, c.ref, s.Ref)
				m, err := s.Manifests(t.Context(), any1)
				require.NoError(t, err)
				require.Len(t, m, 1)
				require.Equal(t, c.want.Manifest, m[0].Raw)
				require.Equal(t, c.want.Config, m[0].Config)
				ra, err := s.Provider.ReaderAt(t.Context(), m[0].Layers[0])
				require.NoError(t, err)
				got, err := io.ReadAll(io.NewSectionReader(ra, 0, ra.Size()))
				require.NoError(t, err)
				require.Equal(t, c.want.Blobs[c.want.Layers[0].Digest], got)
				require.NoError(t, ra.Close())
				require.NoError(t, s.Close())
			}
		})
	}
}

// TestFailureClosesTheFile counts descriptors: an archive source owns one.
func TestFailureClosesTheFile(t *testing.T) {
	img := simple(t, "a")
	path := writeTar(t, writeLayout(t, index(tagged(img, "", "1"), tagged(img, "", "2")), img))
	before := descriptors(t)
	for range 5 {
		_, err := FromArchive(path, "nope")
		require.ErrorIs(t, err, errdefs.ErrNotFound)
	}
	require.Equal(t, before, descriptors(t))
	s, err := FromArchive(path, "1")
	require.NoError(t, err)
	require.Equal(t, before+1, descriptors(t))
	require.NoError(t, s.Close())
	require.Equal(t, before, descriptors(t))
}

func descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(fds)
}

func TestNotALayout(t *testing.T) {
	img := simple(t, "a")
	whole := writeTar(t, writeLayout(t, index(img.Descriptor), img))
	raw, err := os.ReadFile(whole)
	require.NoError(t, err)
	truncated := filepath.Join(t.TempDir(), "truncated.tar")
	require.NoError(t, os.WriteFile(truncated, raw[:700], 0o644))

	dir := writeLayout(t, index(img.Descriptor), img)
	require.NoError(t, os.WriteFile(filepath.Join(dir, ocispec.ImageLayoutFile), []byte(`{"imageLayoutVersion":"9.0.0"}`), 0o644))
	noIndex := writeLayout(t, index(img.Descriptor), img)
	require.NoError(t, os.Remove(filepath.Join(noIndex, ocispec.ImageIndexFile)))
	badIndex := writeLayout(t, index(img.Descriptor), img)
	require.NoError(t, os.WriteFile(filepath.Join(badIndex, ocispec.ImageIndexFile), []byte(`{"manifests":1}`), 0o644))

	layout := func(dir string) error { _, err := FromLayout(dir, ""); return err }
	archive := func(path string) error { _, err := FromArchive(path, ""); return err }
	for name, c := range map[string]struct {
		err     error
		message string
	}{
		"missing directory":   {layout("/nowhere"), "not an OCI layout"},
		"empty directory":     {layout(t.TempDir()), "not an OCI layout"},
		"no index":            {layout(noIndex), "not an OCI layout"},
		"index is no index":   {layout(badIndex), "index.json"},
		"wrong version":       {layout(dir), `version "9.0.0" is not 1.0.0`},
		"archive, version":    {archive(writeTar(t, dir)), `version "9.0.0" is not 1.0.0`},
		"archive, no index":   {archive(writeTar(t, noIndex)), "index.json"},
		"archive, missing":    {archive("/nowhere.tar"), "no such file"},
		"archive, truncated":  {archive(truncated), "not an OCI archive"},
		"archive, not a tar":  {archive("/proc/self/exe"), "not an OCI archive"},
		"archive, empty file": {archive("/dev/null"), "not an OCI archive"},
	} {
		require.ErrorContains(t, c.err, c.message, name)
	}
}

// TestTarCutInABlob reads a blob that lies behind the end of the file.
func TestTarCutInABlob(t *testing.T) {
	img := simple(t, "a")
	dir := writeLayout(t, index(img.Descriptor), img)
	path := writeTar(t, dir)
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	m, err := tarMembers(f)
	require.NoError(t, err)
	at := m["blobs/sha256/"+img.Descriptor.Digest.Encoded()]
	require.NotZero(t, at.size)
	require.NoError(t, os.Truncate(path, at.off+at.size/2))
	_, err = FromArchive(path, "")
	require.ErrorContains(t, err, "not an OCI archive")
}

var (
	amd64   = ocispec.Platform{OS: "linux", Architecture: "amd64"}
	arm64   = ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
	riscv64 = ocispec.Platform{OS: "linux", Architecture: "riscv64"}
)

func source(target ocispec.Descriptor, imgs ...*testutil.Image) (*Source, testutil.Blobs) {
	all := testutil.Blobs{}
	for _, img := range imgs {
		for d, b := range img.Blobs {
			all[d] = b
		}
	}
	return &Source{Name: "test", Provider: all, Target: target}, all
}

func with(img *testutil.Image, p *ocispec.Platform) ocispec.Descriptor {
	d := img.Descriptor
	d.Platform = p
	return d
}

func only(p ocispec.Platform) Selection {
	return Selection{Name: platforms.Format(p), Match: platforms.Only(p)}
}

func TestPlatforms(t *testing.T) {
	raw := testutil.Tar(t, testutil.File{Name: "f", Data: "x"})
	a, b := testutil.NewPlatformImage(t, amd64, raw), testutil.NewPlatformImage(t, arm64, raw)
	absent := testutil.NewPlatformImage(t, riscv64, raw)
	attestation := testutil.NewPlatformImage(t, ocispec.Platform{OS: "unknown", Architecture: "unknown"}, raw)
	s, all := source(ocispec.Descriptor{}, a, b, attestation)
	s.Target = all.Add(ocispec.MediaTypeImageIndex, testutil.JSON(t, index(
		with(a, &amd64), with(b, nil), with(absent, &riscv64),
		with(attestation, &ocispec.Platform{OS: "unknown", Architecture: "unknown"}),
	)))

	for name, c := range map[string]struct {
		sel  Selection
		want []digest.Digest
		err  string
	}{
		"by descriptor":    {sel: only(amd64), want: []digest.Digest{a.Descriptor.Digest}},
		"by config":        {sel: only(arm64), want: []digest.Digest{b.Descriptor.Digest}},
		"all":              {sel: any1, want: []digest.Digest{a.Descriptor.Digest, b.Descriptor.Digest}},
		"one of all":       {sel: Selection{Name: "any", Match: platforms.Ordered(arm64, amd64)}, want: []digest.Digest{b.Descriptor.Digest}},
		"all named":        {sel: Selection{Name: "two", Match: platforms.Any(amd64, arm64), All: true, Whole: true}, want: []digest.Digest{a.Descriptor.Digest, b.Descriptor.Digest}},
		"one not pulled":   {sel: Selection{Name: "two", Match: platforms.Any(amd64, riscv64), All: true, Whole: true}, err: absent.Descriptor.Digest.String()},
		"not pulled":       {sel: only(riscv64), err: "no manifest for platform linux/riscv64; it has: linux/amd64, linux/arm64"},
		"not in the index": {sel: only(ocispec.Platform{OS: "windows", Architecture: "amd64"}), err: "no manifest for platform windows/amd64"},
	} {
		t.Run(name, func(t *testing.T) {
			found, err := s.Manifests(t.Context(), c.sel)
			if c.err != "" {
				require.ErrorIs(t, err, errdefs.ErrNotFound)
				require.ErrorContains(t, err, c.err)
				return
			}
			require.NoError(t, err)
			var got []digest.Digest
			for _, m := range found {
				got = append(got, m.Descriptor.Digest)
			}
			require.Equal(t, c.want, got)
		})
	}
}

func TestNesting(t *testing.T) {
	img := simple(t, "a")
	s, all := source(img.Descriptor, img)
	for range maxDepth {
		s.Target = all.Add(ocispec.MediaTypeImageIndex, testutil.JSON(t, index(s.Target)))
	}
	found, err := s.Manifests(t.Context(), any1)
	require.NoError(t, err)
	require.Len(t, found, 1)

	s.Target = all.Add(ocispec.MediaTypeImageIndex, testutil.JSON(t, index(s.Target)))
	_, err = s.Manifests(t.Context(), any1)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "nested deeper")
}

func TestRefusals(t *testing.T) {
	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "a", Data: "1"}), testutil.Tar(t, testutil.File{Name: "b", Data: "2"}))
	remanifest := func(t *testing.T, s *Source, all testutil.Blobs, edit func(*ocispec.Manifest)) {
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, Config: ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(img.Config), Size: int64(len(img.Config)),
		}, Layers: append([]ocispec.Descriptor(nil), img.Layers...)}
		edit(&m)
		s.Target = all.Add(ocispec.MediaTypeImageManifest, testutil.JSON(t, m))
	}
	for name, c := range map[string]struct {
		spoil    func(*testing.T, *Source, testutil.Blobs)
		is       error
		contains []string
	}{
		"missing layers": {func(_ *testing.T, _ *Source, all testutil.Blobs) {
			delete(all, img.Layers[0].Digest)
			delete(all, img.Layers[1].Digest)
		}, errdefs.ErrNotFound, []string{"layers are missing", img.Layers[0].Digest.String(), img.Layers[1].Digest.String()}},
		"layer size": {func(_ *testing.T, _ *Source, all testutil.Blobs) {
			all[img.Layers[1].Digest] = all[img.Layers[1].Digest][1:]
		}, errdefs.ErrDataLoss, []string{img.Layers[1].Digest.String(), "the manifest says"}},
		"foreign layer": {func(t *testing.T, s *Source, all testutil.Blobs) {
			remanifest(t, s, all, func(m *ocispec.Manifest) { m.Layers[0].MediaType = images.MediaTypeDockerSchema2LayerForeignGzip })
		}, errdefs.ErrInvalidArgument, []string{"is foreign", img.Layers[0].Digest.String()}},
		"foreign OCI layer": {func(t *testing.T, s *Source, all testutil.Blobs) {
			remanifest(t, s, all, func(m *ocispec.Manifest) {
				m.Layers[1].MediaType = "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
			})
		}, errdefs.ErrInvalidArgument, []string{"is foreign", img.Layers[1].Digest.String()}},
		"no manifest": {func(_ *testing.T, s *Source, _ testutil.Blobs) {
			s.Target.MediaType = "text/plain"
		}, errdefs.ErrInvalidArgument, []string{"text/plain is neither a manifest nor an index"}},
		"manifest missing": {func(_ *testing.T, s *Source, all testutil.Blobs) {
			delete(all, s.Target.Digest)
		}, errdefs.ErrNotFound, []string{img.Descriptor.Digest.String()}},
		"manifest altered": {func(_ *testing.T, s *Source, all testutil.Blobs) {
			all[s.Target.Digest] = []byte("{}")
		}, errdefs.ErrDataLoss, []string{"does not match its digest"}},
		"config missing": {func(_ *testing.T, _ *Source, all testutil.Blobs) {
			delete(all, digest.FromBytes(img.Config))
		}, errdefs.ErrNotFound, []string{digest.FromBytes(img.Config).String()}},
		"declared too large": {func(_ *testing.T, s *Source, _ testutil.Blobs) {
			s.Target.Size = maxDocument + 1
		}, errdefs.ErrInvalidArgument, []string{"more than"}},
		"too large": {func(_ *testing.T, s *Source, all testutil.Blobs) {
			s.Target = all.Add(ocispec.MediaTypeImageManifest, make([]byte, maxDocument+1))
			s.Target.Size = 10
		}, errdefs.ErrInvalidArgument, []string{"more than"}},
	} {
		t.Run(name, func(t *testing.T) {
			s, all := source(img.Descriptor, img)
			c.spoil(t, s, all)
			_, err := s.Manifests(t.Context(), any1)
			require.ErrorIs(t, err, c.is)
			for _, part := range c.contains {
				require.ErrorContains(t, err, part)
			}
		})
	}
}

func TestLayoutBlobs(t *testing.T) {
	img := simple(t, "a")
	dir := writeLayout(t, index(img.Descriptor), img)
	require.NoError(t, os.Remove(testutil.BlobPath(dir, img.Layers[0].Digest)))
	for name, from := range map[string]func() (*Source, error){
		"layout":  func() (*Source, error) { return FromLayout(dir, "") },
		"archive": func() (*Source, error) { return FromArchive(writeTar(t, dir), "") },
	} {
		s, err := from()
		require.NoError(t, err, name)
		_, err = s.Manifests(t.Context(), any1)
		require.ErrorIs(t, err, errdefs.ErrNotFound, name)
		require.ErrorContains(t, err, img.Layers[0].Digest.String(), name)
		_, err = s.Provider.ReaderAt(t.Context(), ocispec.Descriptor{Digest: "sha256:../../../etc/passwd"})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
		require.NoError(t, s.Close())
	}
}

func TestParse(t *testing.T) {
	dir := t.TempDir()
	colon := filepath.Join(dir, "a:b")
	require.NoError(t, os.Mkdir(colon, 0o755))
	for _, c := range []struct{ arg, kind, location, tag string }{
		{"registry.example.com:5000/app:1", "containerd", "registry.example.com:5000/app:1", ""},
		{"oci:" + dir, "oci", dir, ""},
		{"oci:" + dir + ":1", "oci", dir, "1"},
		{"oci:" + dir + ":example.com:5000/app:1", "oci", dir, "example.com:5000/app:1"},
		{"oci:" + colon, "oci", colon, ""},
		{"oci:" + colon + ":1", "oci", colon, "1"},
		{"oci:/no/such:dir/layout", "oci", "/no/such:dir/layout", ""},
		{"oci-archive:/x/a.tar:v2", "oci-archive", "/x/a.tar", "v2"},
		{"oci-archive:a.tar", "oci-archive", "a.tar", ""},
	} {
		kind, location, tag := Parse(c.arg)
		require.Equal(t, []string{c.kind, c.location, c.tag}, []string{kind, location, tag}, strings.TrimPrefix(c.arg, dir))
	}
}
