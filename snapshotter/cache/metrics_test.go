package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
)

// metric returns the value, or for a histogram the count, of the metrics whose
// labels have all these values.
func metric(t *testing.T, s *Store, name string, labels ...string) (sum float64) {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(s.Collectors()...)
	families, err := registry.Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	next:
		for _, m := range f.GetMetric() {
			for _, want := range labels {
				if !strings.Contains(m.String(), `value:"`+want+`"`) {
					continue next
				}
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sum
}

// hosts is a registry whose answers say who delivers.
type hosts struct{ *blobs }

type hosted struct{ io.ReadCloser }

func (hosted) Host() string { return "mirror.example.com" }

func (h hosts) Open(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	rc, err := h.blobs.Open(ctx, sources, d, off, n)
	return hosted{rc}, err
}

// TestMetrics reads and fills, has a wrong answer and evicts.
func TestMetrics(t *testing.T) {
	stream := testTar(t, 60)
	src := &blobs{blob: gzipped(t, stream)}
	s, l := open(t, t.TempDir(), hosts{src}, build(t, src.blob))
	read := func(off int64, n int) {
		t.Helper()
		_, err := l.ReadAt(t.Context(), make([]byte, n), off)
		require.NoError(t, err)
	}
	read(0, 10)
	read(0, 10)
	require.Equal(t, 1.0, metric(t, s, "clip_read_duration_seconds", readFetched))
	require.Equal(t, 1.0, metric(t, s, "clip_read_duration_seconds", readHere))
	byReader := metric(t, s, "clip_fetched_bytes_total", forReader, "mirror.example.com")
	require.Positive(t, byReader)
	require.LessOrEqual(t, byReader, float64(src.bytes.Load()))
	// A reader has its bytes before the request has ended.
	ended := func(outcome string) {
		t.Helper()
		require.Eventually(t, func() bool { return metric(t, s, "clip_fetch_requests_total", forReader, outcome) == 1 }, time.Minute, time.Millisecond)
	}
	ended("ok")
	require.Equal(t, "mirror.example.com", l.State().Host)
	require.Equal(t, "mirror.example.com", s.Fetches(time.Time{})[0].Host)

	bad := true
	src.answer = func(b []byte) ([]byte, error) {
		if bad {
			bad = false
			clear(b)
		}
		return b, nil
	}
	read(l.Size()-10, 10)
	require.Equal(t, 1.0, metric(t, s, "clip_verification_failures_total"))
	ended("failed")

	src.answer = func([]byte) ([]byte, error) { return nil, errors.New("refused") }
	_, err := l.ReadAt(t.Context(), make([]byte, 10), l.Size()/2)
	require.ErrorContains(t, err, "refused")
	require.ErrorContains(t, l.State().Failure.Err, "refused")
	src.answer = nil
	read(l.Size()/2, 10)
	require.Eventually(t, func() bool { return l.State().Failure == Failure{} }, time.Minute, time.Millisecond, "until it goes right")
	require.Equal(t, 1.0, metric(t, s, "clip_read_duration_seconds", readFailed))
	require.Equal(t, 1.0, metric(t, s, "clip_verification_failures_total"), "nothing that came was wrong")

	for l.Fetched() < l.Size() {
		_, err := l.Fill(t.Context(), Fill{Want: l.All(), Bytes: 1 << 20, Pace: unpaced})
		require.NoError(t, err)
	}
	require.Positive(t, metric(t, s, "clip_fetched_bytes_total", forFill))
	require.Equal(t, float64(l.spans), metric(t, s, "clip_spans_total"), "each span came once")
	require.Equal(t, 0.0, metric(t, s, "clip_fetched_bytes_total", forPrefetch))
	held := metric(t, s, "clip_cache_bytes")
	require.GreaterOrEqual(t, held, float64(len(stream)))
	layers, freed := s.Prune(false)
	require.Len(t, layers, 1)
	require.Equal(t, float64(freed), metric(t, s, "clip_cache_evicted_bytes_total"))
	require.Less(t, metric(t, s, "clip_cache_bytes"), held/100)
	require.Zero(t, l.Fetched())
	got := make([]byte, len(stream))
	_, err = l.ReadAt(t.Context(), got, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(stream, got), "what was given up is fetched again")
}
