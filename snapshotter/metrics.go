package snapshotter

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// What becomes of a layer that containerd offers to leave out.
const (
	asLazy     = "lazy"
	asOrdinary = "unpacked"
)

func newPrepared() *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "clip_prepared_layers_total", Help: "Layers of images that containerd asked for, by what became of them.",
	}, []string{"outcome"})
	v.WithLabelValues(asLazy)
	v.WithLabelValues(asOrdinary)
	return v
}

// Collectors are the metrics of the snapshotter and all below it.
func (s *Snapshotter) Collectors() []prometheus.Collector {
	mounts := func(mode root.Mode) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "clip_mounts", Help: "Lazy roots that are mounted, by mode.", ConstLabels: prometheus.Labels{"mode": string(mode)},
		}, func() float64 { return float64(s.roots.count(mode)) })
	}
	inFlight := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "clip_requests_in_flight", Help: "Requests of the kernel that are being answered.",
	}, func() float64 { n, _ := s.InFlight(); return float64(n) })
	oldest := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "clip_oldest_request_age_seconds", Help: "How long the oldest request of the kernel has been under way.",
	}, func() float64 { _, oldest := s.InFlight(); return oldest.Seconds() })
	return slices.Concat(s.layers.Collectors(), s.filler.Collectors(),
		[]prometheus.Collector{s.prepared, inFlight, oldest, mounts(root.File), mounts(root.Loop), mounts(root.FUSE)})
}

// count returns how many roots are mounted in a mode.
func (r roots) count(mode root.Mode) (n int) {
	r.mu.Lock()
	ids := make([]string, 0, len(r.byID))
	for id := range r.byID {
		ids = append(ids, id)
	}
	r.mu.Unlock()
	for _, id := range ids {
		if r.mode(id) == mode {
			n++
		}
	}
	return n
}
