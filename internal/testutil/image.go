// Package testutil makes small images and layers, and puts and reads them where tests need them.
package testutil

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Image is an image in memory.
type Image struct {
	Descriptor ocispec.Descriptor
	Platform   ocispec.Platform
	Manifest   []byte
	Config     []byte
	Layers     []ocispec.Descriptor
	DiffIDs    []digest.Digest
	Blobs      Blobs // manifest, config and layers
}

// File is a file of a layer.
type File struct{ Name, Data string }

// Tar returns a layer's tar stream.
func Tar(t testing.TB, files ...File) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		require.NoError(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.Name, Mode: 0o644, Size: int64(len(f.Data))}))
		_, err := w.Write([]byte(f.Data))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

// Gzip compresses b.
func Gzip(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write(b)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return out.Bytes()
}

// NewImage makes an image of this machine's architecture with gzip layers.
func NewImage(t testing.TB, tars ...[]byte) *Image {
	t.Helper()
	return NewPlatformImage(t, ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, tars...)
}

// NewPlatformImage makes an image with gzip layers.
func NewPlatformImage(t testing.TB, p ocispec.Platform, tars ...[]byte) *Image {
	t.Helper()
	img := &Image{Platform: p, Blobs: Blobs{}}
	for _, raw := range tars {
		img.DiffIDs = append(img.DiffIDs, digest.FromBytes(raw))
		img.Layers = append(img.Layers, img.Blobs.Add(ocispec.MediaTypeImageLayerGzip, Gzip(t, raw)))
	}
	img.Config = JSON(t, ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: img.DiffIDs}})
	img.Manifest = JSON(t, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    img.Blobs.Add(ocispec.MediaTypeImageConfig, img.Config),
		Layers:    img.Layers,
	})
	img.Descriptor = img.Blobs.Add(ocispec.MediaTypeImageManifest, img.Manifest)
	return img
}

// JSON marshals v.
func JSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	require.NoError(t, err)
	return b
}

// WriteArchive writes the image's archive to path.
func (img *Image) WriteArchive(t testing.TB, path, ref string) {
	t.Helper()
	a := &archive.Image{StorageRef: ref, Platform: img.Platform, Descriptor: img.Descriptor, Manifest: img.Manifest, Config: img.Config}
	for _, desc := range img.Layers {
		x, err := layer.Build(t.Context(), bytes.NewReader(img.Blobs[desc.Digest]), desc, layer.Options{})
		require.NoError(t, err)
		a.Layers = append(a.Layers, archive.Layer{Index: x})
	}
	_, err := archive.WriteFile(path, a)
	require.NoError(t, err)
}

// WriteLayout makes dir an OCI layout of the image, without a name.
func (img *Image) WriteLayout(t testing.TB, dir string) {
	t.Helper()
	img.Blobs.Write(t, dir)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "index.json"), JSON(t, ocispec.Index{Manifests: []ocispec.Descriptor{img.Descriptor}}), 0o644))
}

// Push puts the image into a registry that asks for no credentials.
func (img *Image) Push(t testing.TB, host, repo string) {
	t.Helper()
	for d, b := range img.Blobs {
		if d != img.Descriptor.Digest {
			PutBlob(t, host, repo, d, b)
		}
	}
	PutManifest(t, host, repo, img.Descriptor.Digest.String(), ocispec.MediaTypeImageManifest, img.Manifest)
}

// PutBlob uploads a blob.
func PutBlob(t testing.TB, host, repo string, d digest.Digest, b []byte) {
	t.Helper()
	upload(t, http.MethodPost, fmt.Sprintf("http://%s/v2/%s/blobs/uploads/?digest=%s", host, repo, d), "application/octet-stream", b)
}

// PutManifest uploads a manifest or index under a tag or digest.
func PutManifest(t testing.TB, host, repo, name, mediaType string, b []byte) {
	t.Helper()
	upload(t, http.MethodPut, fmt.Sprintf("http://%s/v2/%s/manifests/%s", host, repo, name), mediaType, b)
}

func upload(t testing.TB, method, url, mediaType string, b []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(b))
	require.NoError(t, err)
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, http.StatusCreated, resp.StatusCode, "%s %s", method, url)
}

// Blobs is a content store in memory.
type Blobs map[digest.Digest][]byte

// Add stores b.
func (s Blobs) Add(mediaType string, b []byte) ocispec.Descriptor {
	d := digest.FromBytes(b)
	s[d] = b
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
}

// ReaderAt implements content.Provider.
func (s Blobs) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	b, ok := s[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, errdefs.ErrNotFound)
	}
	return reader{bytes.NewReader(b)}, nil
}

// Write stores all blobs below dir as an OCI layout does.
func (s Blobs) Write(t testing.TB, dir string) {
	t.Helper()
	for d, b := range s {
		path := BlobPath(dir, d)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, b, 0o644))
	}
}

// BlobPath is where an OCI layout keeps a blob.
func BlobPath(dir string, d digest.Digest) string {
	return filepath.Join(dir, ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

type reader struct{ *bytes.Reader }

func (reader) Close() error { return nil }
