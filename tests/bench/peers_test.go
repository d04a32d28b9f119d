package bench

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/awslabs/soci-snapshotter/ztoc"
	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/klauspost/compress/flate"
	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/tests/bench/zlib"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// Distances of seek points, where a contestant makes them: ours at its default, SOCI's at its own.
const (
	interval = int64(layer.DefaultPointInterval)
	sociSpan = 4 << 20
)

// An engine opens a gzip stream.
type engine func(io.Reader) (io.Reader, error)

func ours(r io.Reader) (io.Reader, error) { return inflate.NewReader(r, inflate.Options{}) }

func oursWithPoints(r io.Reader) (io.Reader, error) {
	return inflate.NewReader(r, inflate.Options{Interval: inflate.Out(interval), OnPoint: func(inflate.Point) error { return nil }})
}

func goGzip(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }

func klauspostGzip(r io.Reader) (io.Reader, error) { return kgzip.NewReader(r) }

// klauspostCheckpoints keeps a window per interval. Unlike the others it computes no CRC.
func klauspostCheckpoints(r io.Reader) (io.Reader, error) {
	const header = 10 // as compress/gzip writes it
	if _, err := io.CopyN(io.Discard, r, header); err != nil {
		return nil, err
	}
	var next int64
	var window []byte
	return flate.NewReaderOpts(r, flate.WithEobCallback(func(c flate.InflateCheckpoint) {
		if c.UncompressedOffset >= next {
			window = append(window[:0], c.Window...)
			next = c.UncompressedOffset + interval
		}
	})), nil
}

// inflateAll runs an engine over streams, one after the other.
func inflateAll(streams [][]byte, open engine) func() error {
	buf := make([]byte, 256<<10)
	return func() error {
		for _, gz := range streams {
			r, err := open(bytes.NewReader(gz))
			if err != nil {
				return err
			}
			n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf)
			if err != nil {
				return err
			}
			if n != uncompressed(gz) {
				return fmt.Errorf("%d bytes instead of %d", n, uncompressed(gz))
			}
		}
		return nil
	}
}

// inflateZlib is inflateAll with zlib; an interval of 0 asks for no seek points.
func inflateZlib(streams [][]byte, interval int64) func() error {
	return func() error {
		for _, gz := range streams {
			n, points, err := zlib.Inflate(gz, interval)
			if err != nil {
				return err
			}
			if n != uncompressed(gz) || interval > 0 && points == 0 {
				return fmt.Errorf("%d bytes instead of %d, %d seek points", n, uncompressed(gz), points)
			}
		}
		return nil
	}
}

// uncompressed is what the trailer of a stream of one member, below 4 GiB, says.
func uncompressed(gz []byte) int64 { return int64(binary.LittleEndian.Uint32(gz[len(gz)-4:])) }

// clipctl does what `clipctl index` does with an image of the layout.
func clipctl(ctx context.Context, image string, opts index.Options) (*archive.Image, archive.Stats, error) {
	source, m, err := open(ctx, image)
	if err != nil {
		return nil, archive.Stats{}, err
	}
	defer source.Close()
	img, err := index.Run(ctx, source.Provider, index.Image{
		StorageRef: image, Platform: m.Platform, Descriptor: m.Descriptor, Manifest: m.Raw, Config: m.Config, Layers: m.Layers,
	}, opts)
	if err != nil {
		return nil, archive.Stats{}, err
	}
	stats, err := archive.WriteFile(filepath.Join(fixture.scratch, "ours.clip"), img)
	if err == nil && stats.NotLazy > 0 {
		err = fmt.Errorf("%d layers were not indexed", stats.NotLazy)
	}
	return img, stats, err
}

// indexAgain indexes the changed image with the cache in dir, which stays as it is.
func indexAgain(ctx context.Context, dir string) error {
	again, err := os.MkdirTemp(fixture.scratch, "cache-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(again)
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := os.Link(filepath.Join(dir, f.Name()), filepath.Join(again, f.Name())); err != nil {
			return err
		}
	}
	cache, err := index.OpenCache(again, index.DefaultCacheSize)
	if err != nil {
		return err
	}
	return indexed(clipctl(ctx, images.BenchChanged, index.Options{Cache: cache}))
}

// upstreamCLIP indexes an image from the registry.
func upstreamCLIP(ctx context.Context, image string) error {
	return clip.CreateFromOCIImage(ctx, clip.CreateFromOCIImageOptions{
		ImageRef: remoteRef(image), OutputPath: filepath.Join(fixture.scratch, "upstream.clip"),
	})
}

// sociZtocs makes SOCI's index of each layer, one after the other as SOCI does, and returns their size.
func sociZtocs(layers []ocispec.Descriptor) (size int64, err error) {
	builder := ztoc.NewBuilder("bench")
	for i, l := range layers {
		toc, err := builder.BuildZtoc(blobPath(l.Digest), sociSpan)
		if err != nil {
			return 0, err
		}
		r, desc, err := ztoc.Marshal(toc)
		if err != nil {
			return 0, err
		}
		f, err := os.Create(filepath.Join(fixture.scratch, fmt.Sprintf("ztoc-%d", i)))
		if err != nil {
			return 0, err
		}
		if _, err := io.Copy(f, r); err != nil {
			return 0, err
		}
		if err := f.Close(); err != nil {
			return 0, err
		}
		size += desc.Size
	}
	return size, nil
}

// decompressAndHash is what no indexer can do without: it hashes the compressed bytes, decompresses them and hashes the
// result, in one goroutine but for the engine's own.
func decompressAndHash(layers []ocispec.Descriptor, open engine) error {
	for _, l := range layers {
		f, err := os.Open(blobPath(l.Digest))
		if err != nil {
			return err
		}
		err = hashBoth(f, l.Digest, open)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("layer %s: %w", l.Digest, err)
		}
	}
	return nil
}

func hashBoth(compressed io.Reader, want digest.Digest, open engine) error {
	blob, diff := sha256.New(), sha256.New()
	r, err := open(io.TeeReader(compressed, blob))
	if err != nil {
		return err
	}
	if c, ok := r.(io.Closer); ok {
		defer c.Close()
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{diff}, struct{ io.Reader }{r}, make([]byte, 256<<10)); err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, blob); got != want {
		return fmt.Errorf("it hashes to %s", got)
	}
	return nil
}

func klauspostZstd(r io.Reader) (io.Reader, error) {
	d, err := zstd.NewReader(r)
	if err != nil {
		return nil, err
	}
	return d.IOReadCloser(), nil
}
