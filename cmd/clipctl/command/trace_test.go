package command

import (
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
)

// TestTrace draws a start of two layers in which something was read that was
// there, something that was fetched, and something fetched in vain.
func TestTrace(t *testing.T) {
	a, b := digest.FromString("a"), digest.FromString("b")
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	at := func(ms int) time.Time { return began.Add(time.Duration(ms) * time.Millisecond) }
	const piece = tracePiece
	tr := newTrace(`registry.example.com/<b>app`, "python3 -c 'x'", record.Document{
		Began: began, Layers: []digest.Digest{a, b},
		Touches: []record.Touch{{Layer: 0, Off: 0, Len: piece, Millis: 10}, {Layer: 0, Off: 4 * piece, Len: piece, Millis: 20}, {Layer: 1, Off: 0, Len: piece, Millis: 300}},
	}, []control.Fetch{
		{DiffID: a, Off: 0, Len: 3 * piece, Bytes: 1000, Reason: "reader", Host: "h", Began: at(5), Millis: 100},
		{DiffID: a, Off: 6 * piece, Len: piece, Bytes: 500, Reason: "prefetch", Host: "h", Began: at(50), Millis: 100},
		{DiffID: b, Off: 0, Len: piece, Bytes: 700, Reason: "reader", Host: "h", Began: at(55), Millis: 150},
		{DiffID: b, Off: 0, Len: 0, Bytes: 700, Reason: "fill", Began: at(400), Millis: 1, Error: "refused"},
		{DiffID: b, Off: 0, Len: piece, Bytes: 1 << 30, Reason: "fill", Began: at(5000), Millis: 1},
		{DiffID: digest.FromString("other"), Len: piece, Bytes: 1 << 30, Reason: "reader", Began: at(5), Millis: 1},
	}, []control.Layer{{DiffID: a, Size: 8 * piece}, {DiffID: b, Size: piece / 2}})
	require.Equal(t, tracedSums{
		Size: 8*piece + piece/2, Touched: 2*piece + piece/2, Fetched: 4*piece + piece/2, Vain: 3 * piece, Bytes: 2900, Requests: 4, ByReaders: 2,
	}, tr.Total)
	require.InDelta(t, 0.2, tr.Waited, 1e-9, "two that overlap count once")
	require.InDelta(t, 0.401, tr.Seconds, 1e-9)
	var kinds []string
	for _, m := range tr.Layers[0].Map {
		kinds = append(kinds, m.Kind)
	}
	require.Equal(t, []string{"used", "vain", "", "here", "", "vain", ""}, kinds)
	require.Equal(t, "failed", tr.Layers[1].Fetches[1].Kind)
	require.LessOrEqual(t, len(tr.Ticks), 12)

	var page strings.Builder
	require.NoError(t, tr.write(&page))
	for _, outside := range []string{"http:", "https:", "src=", "<script", "@import", "url(", "<b>app"} {
		require.NotContains(t, page.String(), outside)
	}
	for _, what := range []string{"&lt;b&gt;app", "prefers-color-scheme: dark", "save at most 0.20 s", "0.055 s: 700 B for reader from h in 150 ms", "refused"} {
		require.Contains(t, page.String(), what)
	}
	require.Equal(t, "4 requests, 2.9 kB; 41.0 kB read, 49.2 kB fetched in vain", tr.summary())
}

// TestTraceOfNothing is a start that read nothing, of an unknown layer.
func TestTraceOfNothing(t *testing.T) {
	tr := newTrace("x", "", record.Document{Layers: []digest.Digest{digest.FromString("a")}, Hidden: []int{0}}, nil, nil)
	var page strings.Builder
	require.NoError(t, tr.write(&page))
	require.Contains(t, page.String(), "a prefetch list would save nothing")
	require.Contains(t, page.String(), "are not known")
}
