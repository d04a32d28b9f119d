package watch

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/beam-cloud/containerd-clip/plugin/index"
)

// metrics count what a watcher does.
type metrics struct {
	took   *prometheus.HistogramVec
	bytes  prometheus.Counter
	layers *prometheus.CounterVec
	queued prometheus.Collector
}

func newMetrics(queued func() int) metrics {
	m := metrics{
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "clip_index_duration_seconds", Help: "Time that making the archive of an image for one platform took, by how it ended.",
			Buckets: prometheus.ExponentialBuckets(0.1, 2, 14),
		}, []string{"outcome"}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "clip_index_bytes_total", Help: "Compressed bytes of layers that were read to index them.",
		}),
		layers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "clip_index_layers_total", Help: "Layers of images that were indexed, by where their indexes came from.",
		}, []string{"outcome"}),
		queued: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "clip_index_queue", Help: "Images that wait for being looked at.",
		}, func() float64 { return float64(queued()) }),
	}
	for _, outcome := range []string{"indexed", "failed"} {
		m.took.WithLabelValues(outcome)
	}
	for _, outcome := range []string{"indexed", "cached", "not_lazy"} {
		m.layers.WithLabelValues(outcome)
	}
	return m
}

// Collectors are the watcher's metrics.
func (w *Watcher) Collectors() []prometheus.Collector {
	return []prometheus.Collector{w.metrics.took, w.metrics.bytes, w.metrics.layers, w.metrics.queued}
}

// Read implements index.Progress.
func (m metrics) Read(_ int, n int64) { m.bytes.Add(float64(n)) }

// Done implements index.Progress.
func (m metrics) Done(_ int, how index.Outcome) {
	outcome := "indexed"
	switch {
	case how.NotLazy != nil:
		outcome = "not_lazy"
	case how.Cached:
		outcome = "cached"
	}
	m.layers.WithLabelValues(outcome).Inc()
}
