package images

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Epoch is when the images and what is in them were made, unless something else is said. It has nanoseconds.
var Epoch = time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.UTC)

// Layer is a layer in a layout.
type Layer struct {
	ocispec.Descriptor
	DiffID digest.Digest
}

// Layout is an OCI image layout that is being written. Finish makes it complete.
type Layout struct {
	Dir string

	index ocispec.Index
}

// NewLayout starts a layout in dir.
func NewLayout(dir string) (*Layout, error) {
	if err := os.MkdirAll(filepath.Join(dir, ocispec.ImageBlobsDir, "sha256"), 0o755); err != nil {
		return nil, err
	}
	version, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return nil, err
	}
	l := &Layout{Dir: dir, index: ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}}
	return l, os.WriteFile(filepath.Join(dir, ocispec.ImageLayoutFile), version, 0o644)
}

// AddLayer compresses what write writes.
func (l *Layout) AddLayer(write func(io.Writer) error) (Layer, error) {
	return l.addLayer(ocispec.MediaTypeImageLayerGzip, write, func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) })
}

// AddZstdLayer compresses as BuildKit does with zstd: one frame.
func (l *Layout) AddZstdLayer(write func(io.Writer) error) (Layer, error) {
	return l.addZstdLayer(write)
}

// addLongZstdLayer compresses as "zstd --long=26" does: whoever decompresses needs 64 MiB of memory.
func (l *Layout) addLongZstdLayer(write func(io.Writer) error) (Layer, error) {
	return l.addZstdLayer(write, zstd.WithWindowSize(64<<20))
}

func (l *Layout) addZstdLayer(write func(io.Writer) error, opts ...zstd.EOption) (Layer, error) {
	return l.addLayer(ocispec.MediaTypeImageLayerZstd, write, func(w io.Writer) io.WriteCloser {
		c, err := zstd.NewWriter(w, opts...)
		if err != nil {
			panic(err) // only options can be wrong
		}
		return c
	})
}

// AddPlainLayer stores what write writes as it is.
func (l *Layout) AddPlainLayer(write func(io.Writer) error) (Layer, error) {
	return l.addLayer(ocispec.MediaTypeImageLayer, write, func(w io.Writer) io.WriteCloser { return nopCloser{w} })
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func (l *Layout) addLayer(mediaType string, write func(io.Writer) error, compressor func(io.Writer) io.WriteCloser) (Layer, error) {
	diffID := digest.Canonical.Digester()
	d, err := l.addBlob(mediaType, func(w io.Writer) error {
		c := compressor(w)
		if err := write(io.MultiWriter(c, diffID.Hash())); err != nil {
			return err
		}
		return c.Close()
	})
	return Layer{Descriptor: d, DiffID: diffID.Digest()}, err
}

func (l *Layout) addBlob(mediaType string, write func(io.Writer) error) (ocispec.Descriptor, error) {
	f, err := os.CreateTemp(l.Dir, "blob-")
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer os.Remove(f.Name()) // renamed when all went well
	defer f.Close()
	hash := digest.Canonical.Digester()
	if err := write(io.MultiWriter(f, hash.Hash())); err != nil {
		return ocispec.Descriptor{}, err
	}
	info, err := f.Stat()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: hash.Digest(), Size: info.Size()}
	if err := f.Chmod(0o644); err != nil {
		return d, err
	}
	return d, os.Rename(f.Name(), l.BlobPath(d.Digest))
}

func (l *Layout) addJSON(mediaType string, v any) (ocispec.Descriptor, error) {
	return l.addBlob(mediaType, func(w io.Writer) error { return json.NewEncoder(w).Encode(v) })
}

// BlobPath is the file of a blob.
func (l *Layout) BlobPath(d digest.Digest) string {
	return filepath.Join(l.Dir, ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// AddImage adds an image of this machine's architecture under a name.
func (l *Layout) AddImage(name string, config ocispec.ImageConfig, layers ...Layer) (ocispec.Descriptor, error) {
	d, err := l.addManifest(runtime.GOARCH, config, layers)
	if err == nil {
		l.name(name, d)
	}
	return d, err
}

// addDockerImage is AddImage with Docker's media types, as older builders push it. The layers are gzip.
func (l *Layout) addDockerImage(name string, config ocispec.ImageConfig, layers ...Layer) (ocispec.Descriptor, error) {
	image, manifest := describe(runtime.GOARCH, config, layers)
	manifest.MediaType = images.MediaTypeDockerSchema2Manifest
	for i := range manifest.Layers {
		manifest.Layers[i].MediaType = images.MediaTypeDockerSchema2LayerGzip
	}
	d, err := l.store(image, images.MediaTypeDockerSchema2Config, manifest)
	if err == nil {
		l.name(name, d)
	}
	return d, err
}

// addIndex adds an image of several architectures under a name. All have the same layers but the last, which is their
// own.
func (l *Layout) addIndex(name string, config ocispec.ImageConfig, shared []Layer, own map[string]Layer) (ocispec.Descriptor, error) {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, arch := range slices.Sorted(maps.Keys(own)) {
		d, err := l.addManifest(arch, config, append(slices.Clone(shared), own[arch]))
		if err != nil {
			return d, err
		}
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		index.Manifests = append(index.Manifests, d)
	}
	d, err := l.addJSON(ocispec.MediaTypeImageIndex, index)
	if err == nil {
		l.name(name, d)
	}
	return d, err
}

func (l *Layout) addManifest(arch string, config ocispec.ImageConfig, layers []Layer) (ocispec.Descriptor, error) {
	image, manifest := describe(arch, config, layers)
	return l.store(image, ocispec.MediaTypeImageConfig, manifest)
}

// describe makes an image's config and manifest; the manifest still lacks the config.
func describe(arch string, config ocispec.ImageConfig, layers []Layer) (ocispec.Image, ocispec.Manifest) {
	image := ocispec.Image{
		Created:  &Epoch,
		Platform: ocispec.Platform{OS: "linux", Architecture: arch},
		Config:   config,
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, layer := range layers {
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, layer.DiffID)
		manifest.Layers = append(manifest.Layers, layer.Descriptor)
	}
	return image, manifest
}

func (l *Layout) store(image ocispec.Image, configType string, manifest ocispec.Manifest) (d ocispec.Descriptor, err error) {
	if manifest.Config, err = l.addJSON(configType, image); err != nil {
		return d, err
	}
	return l.addJSON(manifest.MediaType, manifest)
}

// name lists a manifest or index in the layout's index. containerd takes an image's name from the first annotation,
// `oci:DIR:TAG` the tag from the second.
func (l *Layout) name(name string, d ocispec.Descriptor) {
	d.Annotations = map[string]string{images.AnnotationImageName: name, ocispec.AnnotationRefName: ShortName(name)}
	l.index.Manifests = append(l.index.Manifests, d)
}

// ShortName is the last element of an image's name without the tag: how the image is called in its layout.
func ShortName(name string) string {
	last := name[strings.LastIndex(name, "/")+1:]
	short, _, _ := strings.Cut(last, ":")
	return short
}

// Finish writes the layout's index.
func (l *Layout) Finish() error {
	text, err := json.Marshal(l.index)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(l.Dir, ocispec.ImageIndexFile), text, 0o644)
}

// WriteTar writes the layout as the tar that `ctr image import` reads.
func (l *Layout) WriteTar(file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	tw := tar.NewWriter(f)
	err = filepath.WalkDir(l.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return addFile(tw, l.Dir, path)
	})
	if err != nil {
		return err
	}
	if err := tw.Close(); err != nil {
		return err
	}
	return f.Close()
}

func addFile(tw *tar.Writer, top, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	name, err := filepath.Rel(top, path)
	if err != nil {
		return err
	}
	if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: info.Size()}); err != nil {
		return err
	}
	if _, err := io.Copy(tw, f); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
