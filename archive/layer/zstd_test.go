package layer

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// compressZstd makes one frame of every part.
func compressZstd(tb testing.TB, parts []string, opts ...zstd.EOption) []byte {
	tb.Helper()
	w, err := zstd.NewWriter(nil, append(opts, zstd.WithZeroFrames(true))...)
	require.NoError(tb, err)
	var b []byte
	for _, part := range parts {
		b = w.EncodeAll([]byte(part), b)
	}
	return b
}

// frame is a call of onFrame.
type frame struct {
	out inflate.Out
	in  inflate.In
}

// decodeZstd returns what blob decompresses to and where its frames start.
func decodeZstd(tb testing.TB, r io.Reader) (data []byte, frames []frame, err error) {
	tb.Helper()
	dec, err := newZstdDecoder(nil)
	require.NoError(tb, err)
	defer dec.Close()
	z := newZstdStream(bufio.NewReaderSize(r, 32), dec, func(out inflate.Out, in inflate.In) { frames = append(frames, frame{out, in}) })
	data, err = io.ReadAll(z)
	return data, frames, err
}

func TestZstdFrames(t *testing.T) {
	parts := []string{strings.Repeat("one", 100_000), "", "two", strings.Repeat("3", 300_000)}
	skip := []byte{0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 1, 2}
	var blob, want []byte
	var starts []frame
	for _, part := range parts {
		blob = append(blob, skip...)
		starts = append(starts, frame{inflate.Out(len(want)), inflate.In(len(blob))})
		blob = append(blob, compressZstd(t, []string{part})...)
		want = append(want, part...)
	}
	blob = append(blob, skip...)
	for _, r := range []io.Reader{bytes.NewReader(blob), iotest.OneByteReader(bytes.NewReader(blob)), iotest.DataErrReader(bytes.NewReader(blob))} {
		data, frames, err := decodeZstd(t, r)
		require.NoError(t, err)
		require.Equal(t, want, data)
		require.Equal(t, starts, frames)
	}
	for i := 1; i < len(blob); i++ {
		data, _, err := decodeZstd(t, bytes.NewReader(blob[:i]))
		if err == nil { // cut between two frames
			require.True(t, slices.ContainsFunc(starts, func(f frame) bool { return int(f.in) == i || int(f.in) == i+len(skip) }) || i == len(blob)-len(skip), "cut at %d", i)
			continue
		}
		require.ErrorIs(t, err, inflate.ErrCorrupt)
		require.ErrorContains(t, err, "compressed offset")
		require.True(t, bytes.HasPrefix(want, data))
	}
}

func TestZstdReadError(t *testing.T) {
	blob := compressZstd(t, []string{strings.Repeat("one", 100_000), "two"})
	broken := errors.New("disk is broken")
	for i := range blob {
		_, _, err := decodeZstd(t, io.MultiReader(bytes.NewReader(blob[:i]), iotest.ErrReader(broken)))
		require.ErrorIs(t, err, broken)
		require.NotErrorIs(t, err, inflate.ErrCorrupt, "the blob is not at fault")
	}
}

// TestZstdWindow has a frame that a decoder would need too much memory for.
func TestZstdWindow(t *testing.T) {
	header := func(window byte) []byte {
		return []byte{0x28, 0xb5, 0x2f, 0xfd, 0, window, 1, 0, 0} // RFC 8878, section 3.1.1.1.2, and an empty block
	}
	const largest = (25 - 10) << 3 // 2^25 bytes
	_, _, err := decodeZstd(t, bytes.NewReader(header(largest)))
	require.NoError(t, err)
	_, _, err = decodeZstd(t, bytes.NewReader(header(largest+1)))
	require.ErrorIs(t, err, ErrUnsupported)
	require.ErrorContains(t, err, "32 MiB")
	require.NotErrorIs(t, err, inflate.ErrCorrupt)
}

// FuzzZstd compares with the decoder reading all frames by itself, and decodes
// again from every frame.
func FuzzZstd(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(compressZstd(f, []string{"one", "", strings.Repeat("two", 1000)}))
	f.Add(compressZstd(f, []string{strings.Repeat("a", 200_000)}, zstd.WithEncoderCRC(false)))
	f.Add(append([]byte{0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff}, 1))
	f.Fuzz(func(t *testing.T, blob []byte) {
		if len(blob) > 1<<16 {
			return
		}
		const most = 8 << 20 // of a few bytes that expand to terabytes
		dec, err := newZstdDecoder(bytes.NewReader(blob))
		require.NoError(t, err)
		defer dec.Close()
		want, wantErr := io.ReadAll(io.LimitReader(dec, most))
		var frames []frame
		again, err := newZstdDecoder(nil)
		require.NoError(t, err)
		defer again.Close()
		z := newZstdStream(bufio.NewReader(bytes.NewReader(blob)), again, func(out inflate.Out, in inflate.In) { frames = append(frames, frame{out, in}) })
		got, gotErr := io.ReadAll(io.LimitReader(z, most))
		require.Equal(t, wantErr == nil, gotErr == nil, "%v, %v", wantErr, gotErr)
		if wantErr != nil {
			return
		}
		require.True(t, bytes.Equal(want, got))
		for _, fr := range frames[:min(len(frames), 20)] {
			r, err := (&Index{Compression: Zstd}).Decode(bytes.NewReader(blob[fr.in:]), inflate.Point{Out: fr.out, In: fr.in})
			require.NoError(t, err)
			tail, err := io.ReadAll(io.LimitReader(r, most-int64(fr.out)))
			require.NoError(t, err)
			require.True(t, bytes.Equal(want[fr.out:], tail))
			require.NoError(t, r.Close())
		}
	})
}
