package plugin

import (
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/transfer"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/plugin/index"
)

// reportInterval is the least time between two events of one layer that is
// being indexed.
const reportInterval = 100 * time.Millisecond

// reporter turns an indexer's progress into events of the transfer service.
// It implements index.Progress.
type reporter struct {
	report transfer.ProgressFunc
	image  string
	layers []ocispec.Descriptor

	mu   sync.Mutex // guards the fields below, serialises report
	read []int64    // bytes by layer
	last []time.Time
}

func newReporter(report transfer.ProgressFunc, image string, layers []ocispec.Descriptor) *reporter {
	return &reporter{report: report, image: image, layers: layers, read: make([]int64, len(layers)), last: make([]time.Time, len(layers))}
}

// Read implements index.Progress.
func (r *reporter) Read(i int, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.read[i] += n
	if now := time.Now(); now.Sub(r.last[i]) >= reportInterval {
		r.last[i] = now
		r.event("indexing", i)
	}
}

// Done implements index.Progress.
func (r *reporter) Done(i int, how index.Outcome) {
	r.mu.Lock()
	defer r.mu.Unlock()
	event := "indexed"
	switch {
	case how.NotLazy != nil:
		event = "not lazy"
	case how.Cached:
		event = "cached"
	}
	r.read[i] = r.layers[i].Size
	r.event(event, i)
}

func (r *reporter) event(event string, i int) {
	desc := r.layers[i]
	r.report(transfer.Progress{
		Event: event, Name: desc.Digest.String(), Parents: []string{r.image},
		Progress: r.read[i], Total: desc.Size, Desc: &desc,
	})
}
