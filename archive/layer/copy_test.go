package layer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
)

func TestCopy(t *testing.T) {
	stream := testimage.Tar(t, testimage.Reg("a", testimage.Content(1, 300_000)), testimage.Reg("b", testimage.Content(2, 70_000)))
	for name, blob := range map[string][]byte{"gzip": testimage.Gzip(t, 6, stream), "plain": stream} {
		x, err := Build(t.Context(), bytes.NewReader(blob), testimage.Descriptor("", blob), Options{SpanSize: 4 << 10, PointInterval: 32 << 10})
		require.NoError(t, err)
		served := bytes.Clone(blob)
		var fetched inflate.In
		fetch := func(_ context.Context, off, n inflate.In) (io.ReadCloser, error) {
			fetched += n
			return io.NopCloser(bytes.NewReader(served[off : off+n])), nil
		}
		for _, r := range [][2]int{
			{0, 0}, {0, 1}, {0, len(stream)}, {4095, 2}, {4096, 4096}, {200_000, 70_001}, {len(stream) - 1, 1}, {len(stream), 0},
		} {
			var b bytes.Buffer
			require.NoError(t, x.Copy(t.Context(), &b, inflate.Out(r[0]), int64(r[1]), fetch), name)
			require.True(t, bytes.Equal(stream[r[0]:r[0]+r[1]], b.Bytes()), "%s %v", name, r)
		}
		fetched = 0
		require.NoError(t, x.Copy(t.Context(), io.Discard, 200_000, 10, fetch))
		require.Less(t, fetched, inflate.In(len(blob)/2), "only what is needed")

		for _, r := range [][2]int64{{-1, 1}, {0, -1}, {0, int64(len(stream)) + 1}, {int64(len(stream)), 1}, {1, 1<<63 - 1}} {
			require.Error(t, x.Copy(t.Context(), io.Discard, inflate.Out(r[0]), r[1], fetch))
		}
		// What is written is right, or nothing is.
		for i := range served {
			if i%97 != 0 {
				continue
			}
			served[i] ^= 0x10
			var b bytes.Buffer
			err := x.Copy(t.Context(), &b, 0, int64(len(stream)), fetch)
			served[i] ^= 0x10
			require.True(t, bytes.HasPrefix(stream, b.Bytes()), "%s: byte %d", name, i)
			require.True(t, err != nil || b.Len() == len(stream))
		}
		broken := errors.New("broken")
		require.ErrorIs(t, x.Copy(t.Context(), io.Discard, 0, 1, func(context.Context, inflate.In, inflate.In) (io.ReadCloser, error) { return nil, broken }), broken)
		require.ErrorIs(t, x.Copy(t.Context(), failing{broken}, 0, 1, fetch), broken)
		served = served[:len(served)/2]
		require.Error(t, x.Copy(t.Context(), io.Discard, 0, 10_000, func(context.Context, inflate.In, inflate.In) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(served[:5])), nil
		}))
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }
