package layer

import (
	"archive/tar"
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// TestLargeFile has a file of more than the 8 GiB that a plain header can name, and one behind it. Its content is the
// same piece of memory again and again, which nothing looks at.
func TestLargeFile(t *testing.T) {
	const size, piece = 9<<30 + 5, 64 << 20
	for _, format := range []tar.Format{tar.FormatPAX, tar.FormatGNU} {
		t.Run(format.String(), func(t *testing.T) {
			var head, tail bytes.Buffer
			require.NoError(t, tar.NewWriter(&head).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "large", Size: size, Format: format}))
			w := tar.NewWriter(&tail)
			require.NoError(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "next", Size: 1}))
			_, err := w.Write([]byte("x"))
			require.NoError(t, err)
			require.NoError(t, w.Close())

			content, left := make([]byte, piece), blockAlign(size)
			ch := make(chan *chunk, left/piece+3)
			ch <- &chunk{data: head.Bytes()}
			for ; left > 0; left -= piece {
				ch <- &chunk{data: content[:min(left, piece)]}
			}
			ch <- &chunk{data: tail.Bytes()}
			close(ch)
			opts, err := Options{}.Normalize()
			require.NoError(t, err)
			b := &builder{idx: &Index{}, opts: opts}
			require.NoError(t, b.readTar(&chunkReader{ctx: t.Context(), ch: ch}))
			off := inflate.Out(head.Len())
			require.Equal(t, []Entry{
				{Name: "large", Type: TypeReg, Size: size, Off: off},
				{Name: "next", Type: TypeReg, Size: 1, Off: off + inflate.Out(blockAlign(size)) + blockSize},
			}, b.idx.Entries)
		})
	}
}
