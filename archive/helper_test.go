package archive

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

const testRef = "registry.example:5000/team/app:v1"

// testImage is an image, its blobs and the streams in them.
type testImage struct {
	Image
	blobs, streams [][]byte
}

func testStreams(tb testing.TB) [][]byte {
	mtime := time.Unix(1700000000, 5000)
	setuid := testimage.Reg("bin/su", testimage.Content(1, 5000))
	setuid.Mode, setuid.Uid, setuid.Gid, setuid.ModTime, setuid.Format = 0o4755, 7, 1<<32-2, mtime, tar.FormatPAX
	link := testimage.Link("bin/su2", "bin/su") // as tar writes it, with its target's attributes
	link.Mode, link.Uid, link.Gid, link.ModTime, link.Format = setuid.Mode, setuid.Uid, setuid.Gid, mtime, tar.FormatPAX
	sticky := testimage.Dir("tmp/")
	sticky.Mode = 0o1777
	return [][]byte{
		testimage.Tar(tb,
			testimage.Dir("bin/"), setuid, link, testimage.Symlink("bin/sh", "su"),
			testimage.Reg("etc/gone", "gone"), testimage.Reg("etc/kept", "first"), sticky,
		),
		testimage.Tar(tb,
			testimage.Reg("etc/.wh.gone", ""), testimage.Reg("etc/kept", "second"), testimage.Reg("empty", ""),
			testimage.File{Header: tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Mode: 0o666, Devmajor: 1, Devminor: 3}},
			testimage.File{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "dev/pipe"}},
		),
		testimage.Tar(tb, testimage.Reg("lib/big", testimage.Content(2, 90_000)), testimage.Reg("z\xff", "last")),
	}
}

// newImage makes an image of gzip layers.
func newImage(tb testing.TB, streams ...[]byte) *testImage {
	tb.Helper()
	return newImageLevel(tb, 6, streams...)
}

func newImageLevel(tb testing.TB, level int, streams ...[]byte) *testImage {
	tb.Helper()
	img := &testImage{streams: streams}
	created := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	config := ocispec.Image{
		Created: &created, Author: "author", Platform: ocispec.Platform{Architecture: "arm64", OS: "linux", Variant: "v8"},
		Config: ocispec.ImageConfig{
			User: "7:8", Env: []string{"PATH=/bin", "A=b"}, Entrypoint: []string{"/bin/sh"}, Cmd: []string{"-c", "true"},
			WorkingDir: "/tmp", Labels: map[string]string{"b": "2", "a": "1"}, StopSignal: "SIGINT",
			ExposedPorts: map[string]struct{}{"80/tcp": {}}, Volumes: map[string]struct{}{"/data": {}},
		},
		RootFS: ocispec.RootFS{Type: "layers"},
	}
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, s := range streams {
		blob := testimage.Gzip(tb, level, s)
		desc := testimage.Descriptor(ocispec.MediaTypeImageLayerGzip, blob)
		desc.Annotations = map[string]string{"k": "v"}
		x, err := layer.Build(tb.Context(), bytes.NewReader(blob), desc, layer.Options{SpanSize: 4 << 10, PointInterval: 32 << 10})
		require.NoError(tb, err)
		img.blobs = append(img.blobs, blob)
		img.Layers = append(img.Layers, Layer{Index: x})
		manifest.Layers = append(manifest.Layers, desc)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(s))
	}
	img.StorageRef = testRef
	img.Platform = config.Platform
	img.Config = mustJSON(tb, config)
	manifest.Config = testimage.Descriptor(ocispec.MediaTypeImageConfig, img.Config)
	img.setManifest(tb, manifest)
	return img
}

func smallImage(tb testing.TB) *testImage {
	return newImage(tb,
		testimage.Tar(tb, testimage.Reg("a", "content"), testimage.Link("b", "a")),
		testimage.Tar(tb, testimage.Reg("c", "more")))
}

// groupedImage has a layer with groups of windows and one without.
func groupedImage(tb testing.TB) *testImage {
	var files []testimage.File
	for i := range 17 {
		files = append(files, testimage.Reg(fmt.Sprint("file", i), testimage.Content(uint64(i), 70_000)))
	}
	img := newImage(tb, testimage.Tar(tb, files...), testimage.Tar(tb, testimage.Reg("c", "more")))
	require.Greater(tb, len(img.Layers[0].Index.Groups), 1)
	return img
}

func (img *testImage) setManifest(tb testing.TB, m ocispec.Manifest) {
	img.Manifest = mustJSON(tb, m)
	img.Descriptor = testimage.Descriptor(ocispec.MediaTypeImageManifest, img.Manifest)
}

func (img *testImage) manifest(tb testing.TB) (m ocispec.Manifest) {
	require.NoError(tb, json.Unmarshal(img.Manifest, &m))
	return m
}

func mustJSON(tb testing.TB, v any) []byte {
	tb.Helper()
	b, err := json.Marshal(v)
	require.NoError(tb, err)
	return b
}

func write(tb testing.TB, img *Image) []byte {
	tb.Helper()
	var b bytes.Buffer
	st, err := Write(&b, img)
	require.NoError(tb, err)
	require.EqualValues(tb, b.Len(), st.Size)
	require.Equal(tb, st.Size, st.Compat+st.Sections)
	return b.Bytes()
}

func open(b []byte) (*Archive, error) { return Open(bytes.NewReader(b), int64(len(b))) }

// contents is all that an archive says, or the first error.
type contents struct {
	Info             Info
	Manifest, Config []byte
	DiffIDs          []digest.Digest
	Layers           []*layer.Index
	Prefetch         *Prefetch
}

func readAll(b []byte) (*contents, error) {
	a, err := open(b)
	if err != nil {
		return nil, err
	}
	return contentsOf(a)
}

func contentsOf(a *Archive) (_ *contents, err error) {
	m, raw := a.Manifest()
	c := &contents{Info: a.Info(), Manifest: raw, Config: a.Config(), DiffIDs: a.DiffIDs()}
	if c.Prefetch, err = a.Prefetch(); err != nil {
		return nil, err
	}
	for i := range m.Layers {
		var x *layer.Index
		if a.NotLazy(i) == "" {
			if x, err = a.Layer(i); err != nil {
				return nil, err
			}
		}
		c.Layers = append(c.Layers, x)
	}
	return c, nil
}

func withProcs(tb testing.TB, n int) {
	old := runtime.GOMAXPROCS(n)
	tb.Cleanup(func() { runtime.GOMAXPROCS(old) })
}
