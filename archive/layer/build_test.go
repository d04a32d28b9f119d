package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

func TestBuild(t *testing.T) {
	for _, s := range streams(t) {
		for name, blob := range blobs(t, s.data) {
			t.Run(s.name+"/"+name, func(t *testing.T) {
				x := mustBuild(t, blob)
				check(t, x, blob, s.data)
				require.Equal(t, compression(name), x.Compression)
				if x.Compression == layer.Uncompressed {
					require.Empty(t, x.Points)
				}
				if s.name == "many spans" && name == "gzip6" {
					require.Greater(t, len(x.Points), 5)
				}
			})
		}
	}
}

// What is given to Out is the uncompressed stream, and its error ends Build.
func TestBuildOut(t *testing.T) {
	for _, s := range streams(t) {
		for name, blob := range blobs(t, s.data) {
			t.Run(s.name+"/"+name, func(t *testing.T) {
				var out bytes.Buffer
				_, err := build(t, blob, layer.Options{Out: &out})
				require.NoError(t, err)
				require.True(t, bytes.Equal(s.data, out.Bytes()))
			})
		}
	}
	noLeak(t)
	full := errors.New("full")
	_, err := build(t, testimage.Gzip(t, 6, mixed(t)), layer.Options{Out: failing{full}})
	require.ErrorIs(t, err, full)
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// compression is what a blob of blobs is compressed with.
func compression(name string) layer.Compression {
	switch {
	case name == "uncompressed":
		return layer.Uncompressed
	case strings.Contains(name, "zstd"), strings.Contains(name, "frames"):
		return layer.Zstd
	}
	return layer.Gzip
}

// TestSpanSizes has spans that are less than what is passed on at a time, as much, and more.
func TestSpanSizes(t *testing.T) {
	const size = 1 << 20 // of all data
	data := testimage.Tar(t, testimage.Reg("a", testimage.Content(7, 500_000)), testimage.Reg("b", testimage.Content(8, 400_000)))
	data = append(data, make([]byte, size-len(data))...)
	part := inflate.Out(inflate.MaxFill &^ 63)
	for name, blob := range blobs(t, data) {
		for _, span := range []inflate.Out{64 << 10, part - 64, part, part + 64, size / 2, size - 64, size, size + 64, 16 << 20} {
			t.Run(fmt.Sprintf("%s/%d", name, span), func(t *testing.T) {
				x, err := build(t, blob, layer.Options{SpanSize: span, PointInterval: span})
				require.NoError(t, err)
				require.Len(t, x.Spans, int((size+span-1)/span))
				check(t, x, blob, data)
			})
		}
	}
}

// The default options and a source that returns a byte at a time give the same
// digests.
func TestBuildDefaults(t *testing.T) {
	data := mixed(t)
	blob := testimage.Gzip(t, 6, data)
	desc := testimage.Descriptor(ocispec.MediaTypeImageLayerGzip, blob)
	var progress int64
	opts := layer.Options{Progress: func(n int64) { progress += n }}
	x, err := layer.Build(t.Context(), iotest.OneByteReader(bytes.NewReader(blob)), desc, opts)
	require.NoError(t, err)
	require.Equal(t, layer.DefaultSpanSize, x.SpanSize)
	require.EqualValues(t, len(blob), progress)
	check(t, x, blob, data)
}

func TestBuildOptions(t *testing.T) {
	for _, o := range []layer.Options{
		{SpanSize: -64}, {SpanSize: 2 << 10}, {SpanSize: 4<<10 + 1}, {SpanSize: 32 << 20},
		{SpanSize: 64 << 10, PointInterval: 32 << 10}, {PointInterval: -1},
	} {
		_, err := build(t, nil, o)
		require.Error(t, err, "%+v", o)
	}
}

func TestBuildMaxEntries(t *testing.T) {
	data := testimage.Tar(t, testimage.Dir("a"), testimage.Dir("b"), testimage.Dir("c"))
	_, err := build(t, data, layer.Options{MaxEntries: 3})
	require.NoError(t, err)
	_, err = build(t, data, layer.Options{MaxEntries: 2})
	require.ErrorIs(t, err, layer.ErrUnsupported)
	require.ErrorContains(t, err, "more than 2 entries")
}

// damage is every way in which a blob can fail to be what its descriptor says.
// What Build meets first decides between the errors.
func damage(err error) bool {
	for _, target := range []error{layer.ErrMismatch, inflate.ErrCorrupt, tar.ErrHeader, io.ErrUnexpectedEOF} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

func TestBuildDamaged(t *testing.T) {
	noLeak(t)
	for name, blob := range blobs(t, mixed(t)) {
		desc := testimage.Descriptor(ocispec.MediaTypeImageLayer, blob)
		try := func(what string, b []byte) error {
			t.Helper()
			_, err := layer.Build(t.Context(), bytes.NewReader(b), desc, small)
			require.Error(t, err, "%s: %s", name, what)
			require.True(t, damage(err), "%s: %s: %v", name, what, err)
			require.ErrorContains(t, err, desc.Digest.String())
			return err
		}
		for i := range 40 {
			at := i * (len(blob) - 1) / 39
			try(fmt.Sprintf("byte %d altered", at), altered(blob, at))
			if at < len(blob) {
				try(fmt.Sprintf("cut at %d", at), blob[:at])
			}
		}
		require.ErrorIs(t, try("cut", blob[:len(blob)-1]), layer.ErrMismatch)
		require.ErrorIs(t, try("longer", append(blob[:len(blob):len(blob)], 0)), layer.ErrMismatch)
		last := desc
		desc.Size++
		require.ErrorIs(t, try("size too large", blob), layer.ErrMismatch)
		desc.Size -= 2
		require.ErrorIs(t, try("size too small", blob), layer.ErrMismatch)
		desc = last
		desc.Digest = digest.Digest("sha256:" + strings.Repeat("0", 64))
		require.ErrorIs(t, try("wrong digest", blob), layer.ErrMismatch)
	}
}

// A digest that is right does not make a stream that ends early complete.
func TestBuildTruncatedStream(t *testing.T) {
	data := mixed(t)
	gz := testimage.Gzip(t, 6, data)
	for _, n := range []int{3, 10, 20, len(gz) / 2, len(gz) - 8, len(gz) - 1} {
		_, err := build(t, gz[:n], small)
		require.ErrorIs(t, err, inflate.ErrCorrupt, "%d bytes", n)
	}
	_, err := build(t, append(gz[:len(gz):len(gz)], "garbage"...), small)
	require.ErrorIs(t, err, inflate.ErrCorrupt)
	for _, n := range []int{1, 511, 513, 1024, 100_000} {
		for _, blob := range [][]byte{data[:n], testimage.Gzip(t, 6, data[:n])} {
			_, err := build(t, blob, small)
			require.True(t, errors.Is(err, io.ErrUnexpectedEOF) || n == 1024 && err == nil, "%d bytes: %v", n, err)
		}
	}
}

func TestBuildBadDigest(t *testing.T) {
	for _, d := range []string{"", "sha256", "sha256:", "md5:d41d8cd98f00b204e9800998ecf8427e", "sha256:zz"} {
		_, err := layer.Build(t.Context(), bytes.NewReader(nil), ocispec.Descriptor{Digest: digest.Digest(d)}, small)
		require.Error(t, err, d)
	}
}

// The error of the source must not be taken for one of the blob.
func TestBuildSourceFails(t *testing.T) {
	noLeak(t)
	errSource := errors.New("connection reset")
	for name, blob := range blobs(t, mixed(t)) {
		desc := testimage.Descriptor(ocispec.MediaTypeImageLayer, blob)
		for _, n := range []int{0, 1, 5, 300, len(blob) / 2, len(blob)} {
			for range 20 {
				r := io.MultiReader(bytes.NewReader(blob[:n]), iotest.ErrReader(errSource))
				_, err := layer.Build(t.Context(), r, desc, small)
				require.ErrorIs(t, err, errSource, "%s: failing at %d", name, n)
				require.ErrorContains(t, err, desc.Digest.String())
				require.False(t, damage(err), err)
			}
		}
	}
}

// endless is a tar stream with one entry that does not end.
func endless(t *testing.T) (io.Reader, ocispec.Descriptor) {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, tar.NewWriter(&b).WriteHeader(&tar.Header{Name: "f", Size: 1 << 40, Format: tar.FormatGNU}))
	desc := testimage.Descriptor(ocispec.MediaTypeImageLayer, nil)
	desc.Size = 1 << 50
	return io.MultiReader(&b, zeros{}), desc
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestBuildCancelled(t *testing.T) {
	noLeak(t)
	for i := range 30 {
		ctx, cancel := context.WithCancel(t.Context())
		opts := small
		reads := 0
		opts.Progress = func(int64) {
			if reads++; reads == i {
				cancel()
			}
		}
		if i == 0 {
			cancel()
		}
		r, desc := endless(t)
		start := time.Now()
		_, err := layer.Build(ctx, r, desc, opts)
		require.ErrorIs(t, err, context.Canceled)
		require.False(t, damage(err), err)
		require.Less(t, time.Since(start), time.Minute)
		cancel()
	}
}

// A source that waits, as one from the network does, until its context ends.
func TestBuildCancelledWhileReading(t *testing.T) {
	noLeak(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	r, w := io.Pipe()
	defer context.AfterFunc(ctx, func() { w.CloseWithError(ctx.Err()) })()
	_, err := layer.Build(ctx, r, testimage.Descriptor("", []byte("x")), small)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

func BenchmarkBuild(b *testing.B) {
	var files []testimage.File
	for i := range 256 {
		files = append(files, testimage.Reg(fmt.Sprintf("usr/lib/%03d", i), testimage.Content(uint64(i), 256<<10)))
	}
	data := testimage.Tar(b, files...)
	for _, c := range []struct {
		name string
		blob []byte
	}{{"uncompressed", data}, {"gzip", testimage.Gzip(b, 6, data)}} {
		desc := testimage.Descriptor(ocispec.MediaTypeImageLayer, c.blob)
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := layer.Build(b.Context(), bytes.NewReader(c.blob), desc, layer.Options{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
