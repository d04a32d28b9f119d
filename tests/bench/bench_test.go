package bench

import (
	"os"
	"testing"

	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/tests/bench/zlib"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// BenchmarkSize describes the image and says where an archive's bytes go.
func BenchmarkSize(b *testing.B) {
	defer once(b)
	img, stats, err := clipctl(b.Context(), images.BenchGzip, index.Options{})
	if err != nil {
		b.Fatal(err)
	}
	ztocs, err := sociZtocs(layers(b, images.BenchGzip))
	if err != nil {
		b.Fatal(err)
	}
	if err := upstreamCLIP(b.Context(), images.BenchGzip); err != nil {
		b.Fatal(err)
	}
	imageTable(img, layers(b, images.BenchZstd))
	sizeTable(b, img, stats, ztocs)
}

// BenchmarkSeekPoints shows what the distance of seek points costs and saves.
func BenchmarkSeekPoints(b *testing.B) {
	defer once(b)
	seekPointTable(b)
}

// BenchmarkInflate decompresses the layers from memory in one goroutine.
func BenchmarkInflate(b *testing.B) {
	var streams [][]byte
	var size int64
	for _, l := range layers(b, images.BenchGzip) {
		gz, err := os.ReadFile(blobPath(l.Digest))
		if err != nil {
			b.Fatal(err)
		}
		streams = append(streams, gz)
		size += uncompressed(gz)
	}
	compare(b, "Inflate: the layers from memory, one thread", size,
		contestant{name: "ours with seek points", run: inflateAll(streams, oursWithPoints)},
		contestant{name: "ours", run: inflateAll(streams, ours)},
		contestant{name: "compress/gzip", run: inflateAll(streams, goGzip), wantCPU: 2.7},
		contestant{name: "klauspost gzip", run: inflateAll(streams, klauspostGzip)},
		contestant{name: "klauspost flate with checkpoints", run: inflateAll(streams, klauspostCheckpoints), wantCPU: 1.9},
		contestant{name: "zlib " + zlib.Version(), run: inflateZlib(streams, 0), wantCPU: 1.7},
		contestant{name: "zlib with seek points", run: inflateZlib(streams, interval)},
	)
}

// BenchmarkIndex makes an archive of the whole image.
func BenchmarkIndex(b *testing.B) {
	ctx, blobs := b.Context(), layers(b, images.BenchGzip)
	compare(b, "Index: the whole image", unpackedSize(b, images.BenchGzip),
		contestant{name: "clipctl index", run: func() error { return indexed(clipctl(ctx, images.BenchGzip, index.Options{})) }},
		contestant{name: "upstream CLIP", run: func() error { return upstreamCLIP(ctx, images.BenchGzip) }, wantWall: 3},
		contestant{name: "SOCI", run: func() error { _, err := sociZtocs(blobs); return err }, wantWall: 4},
		contestant{name: "inflate and hashes alone", run: func() error { return decompressAndHash(blobs, ours) }, wantCPU: 1 / 1.15},
		contestant{name: "the same with seek points", run: func() error { return decompressAndHash(blobs, oursWithPoints) }},
	)
}

// BenchmarkZstd makes an archive of the image with zstd layers.
func BenchmarkZstd(b *testing.B) {
	ctx, blobs := b.Context(), layers(b, images.BenchZstd)
	compare(b, "Index: the whole image with zstd layers", unpackedSize(b, images.BenchGzip),
		contestant{name: "clipctl index", run: func() error { return indexed(clipctl(ctx, images.BenchZstd, index.Options{})) }},
		contestant{name: "klauspost zstd and hashes", run: func() error { return decompressAndHash(blobs, klauspostZstd) }, wantWall: 0.9},
	)
}

// BenchmarkIncremental makes the archive of an image that differs from one indexed before in its top layer, of 8 MB.
func BenchmarkIncremental(b *testing.B) {
	ctx := b.Context()
	before := b.TempDir() // the cache as the image left it
	cache, err := index.OpenCache(before, index.DefaultCacheSize)
	if err != nil {
		b.Fatal(err)
	}
	if err := indexed(clipctl(ctx, images.BenchGzip, index.Options{Cache: cache})); err != nil {
		b.Fatal(err)
	}
	compare(b, "Index: after a change of the top layer", unpackedSize(b, images.BenchGzip),
		contestant{name: "clipctl index again", run: func() error { return indexAgain(ctx, before) }},
		contestant{name: "clipctl index from nothing", run: func() error { return indexed(clipctl(ctx, images.BenchGzip, index.Options{})) }, wantWall: 20},
	)
}
