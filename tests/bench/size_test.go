package bench

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// indexed fits clipctl into a contest.
func indexed(_ *archive.Image, _ archive.Stats, err error) error { return err }

// imageTable describes an image by its layers; zstd are the same layers in another compression.
func imageTable(img *archive.Image, zstd []ocispec.Descriptor) {
	t := report.Table{Title: "The image", Header: []string{"layer", "entries", "uncompressed MB", "gzip MB", "zstd MB"}}
	add := func(layer string, numbers []int64) {
		t.Add(layer, fmt.Sprint(numbers[0]), megabytes(numbers[1]), megabytes(numbers[2]), megabytes(numbers[3]))
	}
	all := make([]int64, 4)
	for i, l := range img.Layers {
		x := l.Index
		numbers := []int64{int64(len(x.Entries)), int64(x.OutSize), int64(x.Size), zstd[i].Size}
		for k, n := range numbers {
			all[k] += n
		}
		add(fmt.Sprint(i+1), numbers)
	}
	add("all", all)
	tables.Tables = append(tables.Tables, t)
}

// sizeTable reports an archive part by part, and what upstream CLIP wrote and SOCI made of the same image.
func sizeTable(b *testing.B, img *archive.Image, stats archive.Stats, ztocs int64) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		b.Fatal(err)
	}
	var compressed, windows, grouped, digests, spans, entries int64
	for _, l := range img.Layers {
		compressed += int64(l.Index.Size)
		digests += int64(len(l.Index.Spans) * len(layer.Span{}.Digest))
		windows += ownWindows(l.Index)
		grouped += l.Index.WindowsSize()
		spans += int64(len(enc.EncodeAll(l.Index.AppendSpans(nil), nil))) + int64(len(enc.EncodeAll(l.Index.AppendPoints(nil), nil)))
		entries += int64(len(enc.EncodeAll(l.Index.AppendEntries(nil), nil)))
	}
	upstream, err := os.Stat(filepath.Join(fixture.scratch, "upstream.clip"))
	if err != nil {
		b.Fatal(err)
	}
	t := report.Table{Title: "Size of the archive", Header: []string{"part", "MB", "% of the compressed image", "wanted"}}
	share := func(n int64) float64 { return 100 * float64(n) / float64(compressed) }
	add := func(part string, n int64) { t.Add(part, megabytes(n), report.Decimals(share(n)), "") }
	add("compressed image", compressed)
	add("archive", stats.Size)
	add("· what upstream CLIP reads", stats.Compat)
	t.Add("· ours", megabytes(stats.Sections), report.Decimals(share(stats.Sections)), report.AtMost(share(stats.Sections), 1))
	add("·· windows that are fetched when they are needed", grouped)
	add("·· spans and seek points", spans)
	add("··· windows", windows)
	add("··· span digests", digests)
	add("··· offsets and the like", spans-windows-digests)
	add("·· entries", entries)
	add("·· manifest, config and table", stats.Sections-grouped-spans-entries)
	add("upstream CLIP's archive", upstream.Size())
	add("SOCI's ztocs", ztocs)
	b.ReportMetric(share(stats.Sections), "%ours")
	b.ReportMetric(share(stats.Compat), "%compat")
	tables.Tables = append(tables.Tables, t)
}

// ownWindows returns the bytes of the windows that stand with their seek points.
func ownWindows(x *layer.Index) (n int64) {
	for _, p := range x.Points {
		n += int64(len(p.Window))
	}
	return n
}

func megabytes(n int64) string { return fmt.Sprintf("%.3f", float64(n)/1e6) }

// seekPointTable indexes the image with several distances of seek points and computes what two kinds of read fetch.
func seekPointTable(b *testing.B) {
	start, err := startFiles()
	if err != nil {
		b.Fatal(err)
	}
	t := report.Table{Title: "Distance of seek points", Header: []string{
		"KiB", "our part of the archive: MB", "% of the image", "windows: MB", "python's start: MB", "in ranges", "one small file: kB",
	}}
	for _, distance := range []inflate.Out{256 << 10, 512 << 10, layer.DefaultPointInterval, 1 << 20, 2 << 20, 4 << 20} {
		img, stats, err := clipctl(b.Context(), images.BenchGzip, index.Options{Layer: layer.Options{PointInterval: distance}})
		if err != nil {
			b.Fatal(err)
		}
		var compressed, windows int64
		for _, l := range img.Layers {
			compressed += int64(l.Index.Size)
			windows += ownWindows(l.Index) + l.Index.WindowsSize()
		}
		all, ranges, err := fetched(img, start)
		if err != nil {
			b.Fatal(err)
		}
		small, err := meanFetch(img)
		if err != nil {
			b.Fatal(err)
		}
		t.Add(fmt.Sprint(distance>>10), megabytes(stats.Sections), report.Decimals(100*float64(stats.Sections)/float64(compressed)),
			megabytes(windows), megabytes(all), fmt.Sprint(ranges), fmt.Sprintf("%.0f", small/1e3))
	}
	tables.Tables = append(tables.Tables, t)
}

// startFiles are the files that python opens when it starts and imports what the image has it for.
func startFiles() (map[string]bool, error) {
	f, err := os.Open(filepath.Join(fixture.layout, images.BenchStart))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names := map[string]bool{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		names[lines.Text()] = true
	}
	return names, lines.Err()
}

// fetched returns how many compressed bytes, in how many ranges, are read to have the named files whole.
func fetched(img *archive.Image, names map[string]bool) (size int64, ranges int, err error) {
	found := 0
	for _, l := range img.Layers {
		var needed []byteRange
		for _, e := range l.Index.Entries {
			if !names[e.Name] || e.Type != layer.TypeReg || e.Size == 0 {
				continue
			}
			r, err := needs(l.Index, e)
			if err != nil {
				return 0, 0, err
			}
			needed = append(needed, r)
		}
		found += len(needed)
		for _, r := range union(needed) {
			size += r.end - r.off
			ranges++
		}
	}
	if found < len(names)/2 {
		return 0, 0, fmt.Errorf("only %d of %d files of a start are in the image", found, len(names))
	}
	return size, ranges, nil
}

// meanFetch returns how many compressed bytes are read for one file of at most 64 KiB, as the mean of all.
func meanFetch(img *archive.Image) (float64, error) {
	var size, files int64
	for _, l := range img.Layers {
		for _, e := range l.Index.Entries {
			if e.Type != layer.TypeReg || e.Size == 0 || e.Size > 64<<10 {
				continue
			}
			r, err := needs(l.Index, e)
			if err != nil {
				return 0, err
			}
			size += r.end - r.off
			files++
		}
	}
	if files == 0 {
		return 0, errors.New("the image has no small files")
	}
	return float64(size) / float64(files), nil
}

// byteRange is a range of a compressed layer.
type byteRange struct{ off, end int64 }

// needs returns what must be fetched to read a file: from the seek point before it to where its last span ends.
func needs(x *layer.Index, e layer.Entry) (byteRange, error) {
	p, err := x.SeekPoint(e.Off)
	if err != nil {
		return byteRange{}, err
	}
	last := x.SpanAt(e.Off + inflate.Out(e.Size) - 1)
	return byteRange{int64(p.In), int64(x.Spans[last].InEnd)}, nil
}

// union merges ranges that overlap or touch.
func union(all []byteRange) (merged []byteRange) {
	slices.SortFunc(all, func(a, b byteRange) int { return cmp.Compare(a.off, b.off) })
	for _, r := range all {
		if n := len(merged); n > 0 && r.off <= merged[n-1].end {
			merged[n-1].end = max(merged[n-1].end, r.end)
			continue
		}
		merged = append(merged, r)
	}
	return merged
}

// unpackedSize is the uncompressed size of an image with gzip layers.
func unpackedSize(b *testing.B, image string) (size int64) {
	b.Helper()
	for _, l := range layers(b, image) {
		f, err := os.Open(blobPath(l.Digest))
		if err != nil {
			b.Fatal(err)
		}
		trailer := make([]byte, 4)
		if _, err := f.ReadAt(trailer, l.Size-4); err != nil {
			b.Fatal(err)
		}
		size += uncompressed(trailer)
		f.Close()
	}
	return size
}
