package remote

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// TestHostIgnoresRanges reads a little too much, or asks somebody else, or
// reads through what nobody else has.
func TestHostIgnoresRanges(t *testing.T) {
	sent := make(chan int, 10) // by each answer
	whole := start(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(big)))
		total := 0
		for part := range slices.Chunk(big, 64<<10) {
			n, err := w.Write(part)
			if total += n; err != nil {
				break
			}
		}
		sent <- total
	})
	good := start(t, serveBig)
	both := []string{whole.ref(), good.ref()}
	const underWay = 8 << 20 // what sockets hold of what nobody reads, at most

	c := newClient(t)
	require.NoError(t, readBig(t, c, both, 1000, 1000), "near")
	require.Empty(t, good.seen())
	require.Less(t, <-sent, underWay)

	c = newClient(t)
	require.NoError(t, readBig(t, c, both, 10<<20, 1000), "far")
	require.Len(t, good.seen(), 1)
	require.Less(t, <-sent, underWay)
	require.NoError(t, readBig(t, c, both, 11<<20, 1000))
	require.Len(t, whole.seen(), 2, "it is remembered")

	c = newClient(t)
	asked := len(whole.seen())
	require.NoError(t, readBig(t, c, both[:1], 10<<20, 1000), "nobody else")
	require.Len(t, whole.seen(), asked+1)
	require.Greater(t, <-sent, 10<<20)
	require.Empty(t, sent)
}

// TestWiden takes all of a blob that is sent anyway, and nothing of one that others
// have a range of.
func TestWiden(t *testing.T) {
	whole := start(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(big) })
	good := start(t, serveBig)
	c := newClient(t)
	widen := func(sources []string, off, n int64) (*Reader, bool) {
		rc, err := c.Open(t.Context(), sources, bigDigest, off, n)
		require.NoError(t, err)
		r := rc.(*Reader)
		t.Cleanup(func() { r.Close() })
		return r, r.Widen(0, int64(len(big)))
	}
	for _, sources := range [][]string{{good.ref()}, {whole.ref(), good.ref()}} {
		for _, off := range []int64{1000, 10 << 20} {
			r, ok := widen(sources, off, 1000)
			require.False(t, ok)
			got, err := io.ReadAll(r)
			require.NoError(t, err)
			require.Equal(t, big[off:off+1000], got)
		}
	}
	asked := len(whole.seen())
	r, ok := widen([]string{whole.ref()}, 10<<20, 1000)
	require.True(t, ok)
	got, err := io.ReadAll(r)
	require.NoError(t, err)
	require.True(t, bytes.Equal(big, got))
	require.Len(t, whole.seen(), asked+1)
}

// TestWholeBlobBreaksOff never comes to what is asked for: that is not progress for
// ever. From another host it goes on where it was.
func TestWholeBlobBreaksOff(t *testing.T) {
	const off = 10 << 20
	cut := start(t, func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Range")
		cutAfter(4<<20, reset)(w, r)
	})
	dockerConfig(t, "{}")
	c := New(Options{GiveUp: 2 * time.Second})
	require.ErrorIs(t, readBig(t, c, []string{cut.ref()}, off, 1000), errdefs.ErrUnavailable)
	require.Less(t, len(cut.seen()), 20)

	good := start(t, serveBig)
	rc, err := newClient(t).Open(t.Context(), []string{cut.ref()}, bigDigest, off, 1000)
	require.NoError(t, err)
	defer rc.Close()
	r := rc.(*Reader)
	require.True(t, r.Widen(0, off))
	require.NoError(t, r.addSource(good.ref()))
	got, err := io.ReadAll(r)
	require.NoError(t, err)
	require.True(t, bytes.Equal(big[:off], got))
	require.Len(t, good.seen(), 1)
	require.Equal(t, fmt.Sprintf("bytes=%d-%d", 4<<20, off-1), good.seen()[0].Header.Get("Range"))
}
