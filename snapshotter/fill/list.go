package fill

import (
	"slices"
	"time"

	"github.com/beam-cloud/containerd-clip/snapshotter/cache"
)

// Want is a part of a layer that somebody is about to read.
type Want struct {
	Layer *cache.Layer
	Spans cache.Spans
}

// A list is fetched in batches, each twice as large as the one before: within
// one, order is given up for large requests. What a start reads first is little
// and comes first. Sizes in uncompressed bytes.
const (
	firstBatch = 2 << 20
	mostBatch  = 64 << 20
)

// A request for a list asks for about what arrives in listTime: a reader of
// something else waits until that is through. Sizes in compressed bytes.
const (
	listTime  = 100 * time.Millisecond
	leastList = 256 << 10
)

// nextSize returns how much to ask for, at least so much, for it to take about the
// time aim, after n bytes took that long.
func nextSize(n int64, took, aim time.Duration, least int64) int64 {
	return min(max(int64(float64(n)*float64(aim)/float64(max(took, time.Microsecond))), least), rangeSize)
}

// listAttempts is how often a part of a list is tried again.
const listAttempts = 3

// Prefetch fetches the wants, about in their order, before all else that the
// filler fetches and without delay.
func (f *Filler) Prefetch(wants []Want) {
	for _, w := range wants {
		w.Layer.Expect(w.Spans)
	}
	now := time.Now()
	var jobs []*job
	batch := int64(firstBatch)
	for len(wants) > 0 {
		var part []Want
		part, wants = cut(wants, batch)
		first := len(jobs)
		for _, w := range part {
			i := slices.IndexFunc(jobs[first:], func(j *job) bool { return j.layer == w.Layer })
			if i < 0 {
				i = len(jobs) - first
				jobs = append(jobs, &job{layer: w.Layer, list: true, due: now})
			}
			j := jobs[first+i]
			j.want = append(j.want, w.Spans)
		}
		batch = min(2*batch, mostBatch)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	lists := slices.IndexFunc(f.jobs, func(j *job) bool { return !j.list })
	if lists < 0 {
		lists = len(f.jobs)
	}
	f.jobs = slices.Insert(f.jobs, lists, jobs...)
	f.changedLocked()
}

// cut returns the first wants that have about n bytes together, and the rest.
func cut(wants []Want, n int64) (part, rest []Want) {
	for i, w := range wants {
		if n -= int64(w.Spans.End-w.Spans.First) * w.Layer.SpanSize(); n <= 0 {
			return wants[:i+1], wants[i+1:]
		}
	}
	return wants, nil
}
