package cache

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Why something is fetched.
const (
	forReader    = "reader"    // one waits for it
	forReadAhead = "readahead" // a reader that goes forward is expected to ask for it
	forPrefetch  = "prefetch"  // a recorded start read it
	forFill      = "fill"      // the layer is being completed
	forWindows   = "windows"   // decoding starts in the middle of a layer for one of the others
)

// How a read of a layer ended.
const (
	readHere    = "disk" // nothing had to be waited for
	readFetched = "fetched"
	readFailed  = "failed"
)

// What did not match its digest.
const (
	wrongSpan   = "span"
	wrongStream = "stream" // it could not be decoded
	wrongLayer  = "layer"  // though every span did
	wrongWindow = "window"
)

// metrics count what a store does.
type metrics struct {
	reads    *prometheus.HistogramVec
	bytes    *prometheus.CounterVec
	requests *prometheus.CounterVec
	spans    *prometheus.CounterVec
	wrong    *prometheus.CounterVec
	evicted  prometheus.Counter
	all      []prometheus.Collector
}

func newMetrics(s *Store) metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	m := metrics{
		reads: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "clip_read_duration_seconds", Help: "Time that reads of layers took, by how they ended.",
			Buckets: []float64{1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60},
		}, []string{"outcome"}),
		bytes:    counter("clip_fetched_bytes_total", "Compressed bytes that arrived, by what for and from which host.", "reason", "source"),
		requests: counter("clip_fetch_requests_total", "Ranges that were asked for, by what for and how that ended.", "reason", "outcome"),
		spans:    counter("clip_spans_total", "Spans that arrived and were verified, by what for.", "reason"),
		wrong:    counter("clip_verification_failures_total", "What arrived or was on disk and did not match its digest.", "what"),
		evicted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "clip_cache_evicted_bytes_total", Help: "Bytes of disk that were given up to make room, or because somebody asked for it.",
		}),
	}
	// What never happened must be there with a zero.
	for _, reason := range []string{forReader, forReadAhead, forPrefetch, forFill} {
		m.spans.WithLabelValues(reason)
	}
	for _, outcome := range []string{readHere, readFetched, readFailed} {
		m.reads.WithLabelValues(outcome)
	}
	for _, what := range []string{wrongSpan, wrongStream, wrongLayer, wrongWindow} {
		m.wrong.WithLabelValues(what)
	}
	m.all = []prometheus.Collector{
		m.reads, m.bytes, m.requests, m.spans, m.wrong, m.evicted,
		gauge("clip_cache_bytes", "Bytes of disk that fetched layers take.", func() float64 { return float64(s.used.Load()) }),
		gauge("clip_cache_limit_bytes", "Most bytes of disk that fetched layers may take.", func() float64 { return float64(s.max) }),
		gauge("clip_cache_in_memory", "1 while what is fetched cannot be stored and is served from memory.", func() float64 {
			if s.full.Load() {
				return 1
			}
			return 0
		}),
	}
	return m
}

// Collectors are the store's metrics.
func (s *Store) Collectors() []prometheus.Collector { return s.metrics.all }

// reason says what for r fetches what arrives now.
func (r *run) reason() string {
	switch {
	case r.pace == nil && r.pos < r.asked:
		return forReader
	case r.pace == nil:
		return forReadAhead
	case r.expected:
		return forPrefetch
	}
	return forFill
}
