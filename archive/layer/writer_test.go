package layer_test

import (
	"bytes"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// writerStream has what compressors treat differently: text, noise, long runs
// and many small files.
func writerStream(tb testing.TB) []byte {
	tb.Helper()
	files := []testimage.File{
		testimage.Reg("text", testimage.Content(1, 300_000)),
		testimage.Reg("zeros", string(make([]byte, 200_000))),
		testimage.Reg("runs", strings.Repeat("a", 50_000)+strings.Repeat("ab", 50_000)+strings.Repeat("0123456789", 30_000)),
	}
	for i := range 50 {
		files = append(files, testimage.Reg("small/"+strings.Repeat("x", i+1), testimage.Content(uint64(i), i*7)))
	}
	return testimage.Tar(tb, files...)
}

// TestWriters indexes what other people's programs write.
func TestWriters(t *testing.T) {
	data := writerStream(t)
	for _, command := range []string{
		"gzip -1", "gzip -6", "gzip -9", "gzip --rsyncable",
		"pigz -1", "pigz -6", "pigz -11 -I1", "pigz -p 4 -b 128 -i", "pigz -0",
		"igzip -0", "igzip -1", "igzip -2", "igzip -3", "igzip -3 -T 4",
		"libdeflate-gzip -1", "libdeflate-gzip -6", "libdeflate-gzip -12",
		"zstd -1", "zstd -3 -T4", "zstd -19", "zstd --ultra -20 --long=25", "zstd --no-check", "zstd --rsyncable", "zstd --long=24",
		"pzstd -p 4 -3",
	} {
		t.Run(command, func(t *testing.T) {
			t.Parallel()
			words := strings.Fields(command)
			cmd := exec.Command(words[0], append(words[1:], "-c")...)
			cmd.Stdin = bytes.NewReader(data)
			blob, err := cmd.Output()
			require.NoError(t, err, "%s is one of the Debian packages that `make deps` installs", words[0])
			x := mustBuild(t, blob)
			check(t, x, blob, data)
			if strings.Contains(words[0], "zstd") {
				require.Equal(t, layer.Zstd, x.Compression)
				return
			}
			require.Equal(t, layer.Gzip, x.Compression)
			require.Greater(t, len(x.Points), 20, "inside blocks too, which may be as long as the layer")
		})
	}
}

// TestEstargz indexes a layer for another lazy snapshotter, with a gzip member
// for every file.
func TestEstargz(t *testing.T) {
	data := writerStream(t)
	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data))), estargz.WithChunkSize(50_000))
	require.NoError(t, err)
	defer func() { require.NoError(t, blob.Close()) }()
	b, err := io.ReadAll(blob)
	require.NoError(t, err)
	x := mustBuild(t, b)
	require.Equal(t, blob.DiffID(), x.DiffID)
	require.Greater(t, len(x.Points), 20)
	for i := range x.Spans {
		require.NoError(t, x.VerifySpan(i, read(t, x, b, i)))
	}
}
