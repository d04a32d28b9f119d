package inflate

import (
	"bytes"
	"io"
	"testing"

	"github.com/stretchr/testify/require"
)

// readOn reads the rest of a stream behind a pause after n bytes, if there is one.
func readOn(t *testing.T, s stream, n int) (p Point, ahead []byte, ok bool) {
	t.Helper()
	z, err := NewReader(bytes.NewReader(s.gz), Options{})
	require.NoError(t, err)
	_, err = io.CopyN(io.Discard, z, int64(n))
	require.NoError(t, err)
	if p, ahead, ok = z.Pause(); !ok {
		return p, ahead, false
	}
	require.Empty(t, p.Window)
	require.Equal(t, Out(n+len(ahead)), p.Out)
	require.True(t, bytes.Equal(s.data[n:p.Out], ahead), "%s at %d", s.name, n)
	_, err = z.Read(make([]byte, 1))
	require.ErrorIs(t, err, errPaused)
	_, _, again := z.Pause()
	require.False(t, again)

	p.Window = s.data[max(0, p.Out-WindowSize):p.Out]
	z, err = Resume(bytes.NewReader(s.gz[p.In:]), p)
	require.NoError(t, err)
	rest, err := io.ReadAll(z)
	require.NoError(t, err, "%s at %d", s.name, n)
	require.True(t, bytes.Equal(s.data[p.Out:], rest), "%s at %d", s.name, n)
	return p, ahead, true
}

func TestPause(t *testing.T) {
	inMatch, inBlock, stored := 0, 0, 0
	for _, s := range streams(t) {
		for n := 1; n < len(s.data); n += 1 + len(s.data)/29 {
			p, ahead, ok := readOn(t, s, n)
			switch {
			case !ok, len(p.State) == 0:
			case p.State[0]>>1 == typeStored:
				stored++
			default:
				inBlock++
			}
			if len(ahead) > 0 {
				inMatch++
			}
		}
	}
	// The cases that matter did occur.
	for _, n := range []int{inMatch, inBlock, stored} {
		require.Greater(t, n, 20)
	}
}

// TestPauseBetweenBlocks has blocks that end with their last byte.
func TestPauseBetweenBlocks(t *testing.T) {
	s := storedBlocks(mixedData(newRand(1), 70_000))
	for _, n := range []int{0xffff, 0xffff + 1} {
		p, ahead, ok := readOn(t, s, n)
		require.True(t, ok)
		require.Empty(t, p.State)
		require.Empty(t, ahead)
	}
}

// TestPauseBetweenMembers says no where there is no point that a stream can go on at.
func TestPauseBetweenMembers(t *testing.T) {
	first := stdGzip(t, 6, []byte("first"))
	s := stream{"members", append(first, stdGzip(t, 6, []byte("second"))...), []byte("firstsecond")}
	_, _, ok := readOn(t, s, len("first")+1)
	require.True(t, ok)
	z, err := NewReader(bytes.NewReader(s.gz), Options{})
	require.NoError(t, err)
	_, _, ok = z.Pause()
	require.False(t, ok, "nothing was read")
	_, err = io.Copy(io.Discard, z)
	require.NoError(t, err)
	_, _, ok = z.Pause()
	require.False(t, ok, "nothing follows")
}
