// Package fill fetches ahead what nobody has asked for yet.
//
// A Filler fetches lists of what somebody is about to read at once, in their
// order. Then it completes the layers it is given, some time after they were
// given to it: a container that ends soon costs only what it reads, and nodes
// that pull at the same moment do not fetch at the same moment. It asks for
// large ranges, several side by side, each of which is decoded as it arrives;
// with as many as there are cores all of them inflate. Readers come first: a
// range stands still while one waits for something else (see cache.Layer.Fill).
//
// The package does not decide what is kept: when the cache is full it waits
// until there is room.
package fill

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/beam-cloud/containerd-clip/snapshotter/cache"
)

// Options configures New.
type Options struct {
	// Workers is how many ranges are fetched at the same time; 0 fetches nothing.
	Workers int
	// ListsOnly completes no layers.
	ListsOnly bool
	// Delay is how long a layer waits at least before it is fetched; it may
	// wait twice as long.
	Delay time.Duration
	// Rate is the most compressed bytes per second, over all workers; 0 is no
	// limit. What a reader waits for is not held back.
	Rate int64
}

// rangeSize is how much of a blob one request asks for, in bytes: much enough
// for the time between requests not to matter on a fast link, little enough
// for a layer to be shared among workers and for a failure to cost little.
const rangeSize = 8 << 20

// On a slow link a range is what arrives in rangeTime: what a server has sent cannot
// be taken back when a reader comes. Sizes in compressed bytes.
const (
	rangeTime  = time.Second
	leastRange = 1 << 20
	firstRange = 2 << 20
)

// Pauses before a layer is looked at again.
const (
	busyPause  = time.Second      // the rest of it is being fetched by others
	fullPause  = 30 * time.Second // the cache is full
	firstPause = 2 * time.Second  // after a failure, doubling
	mostPause  = 5 * time.Minute
)

// Filler completes layers in the background. It is safe for concurrent use.
type Filler struct {
	opts  Options
	limit *rate.Limiter // nil if there is none
	life  context.Context
	stop  context.CancelFunc
	work  sync.WaitGroup

	listSize  atomic.Int64 // compressed bytes of the next request for a list
	rangeSize atomic.Int64 // and of another one

	mu      sync.Mutex    // guards the fields below
	changed chan struct{} // closed and replaced when there may be more to do
	jobs    []*job        // lists first, each kind in the order in which they were added
	full    bool          // the cache was, when it was last tried
}

// job is one layer to complete, or a part of it that a list names.
type job struct {
	layer    *cache.Layer
	want     []cache.Spans
	list     bool
	due      time.Time
	active   int // workers that fetch for it
	failures int
	done     bool // it was complete once: what it gives up then comes back when it is read
}

// New returns a filler that works until it is closed. ctx carries the logger
// and nothing else.
func New(ctx context.Context, opts Options) *Filler {
	f := &Filler{opts: opts, changed: make(chan struct{})}
	f.listSize.Store(leastList)
	f.rangeSize.Store(firstRange)
	if opts.Rate > 0 {
		f.limit = rate.NewLimiter(rate.Limit(opts.Rate), burst)
	}
	f.life, f.stop = context.WithCancel(context.WithoutCancel(ctx))
	for range opts.Workers {
		f.work.Go(f.run)
	}
	return f
}

// Close ends all fetches.
func (f *Filler) Close() {
	f.stop()
	f.work.Wait()
}

// Add has layers completed after the delay. Those that were added before stay
// as they are, unless they gave up a part since they were complete.
func (f *Filler) Add(layers ...*cache.Layer) {
	due := time.Now().Add(f.opts.Delay)
	if f.opts.Delay > 0 {
		due = due.Add(rand.N(f.opts.Delay))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range layers {
		i := slices.IndexFunc(f.jobs, func(j *job) bool { return !j.list && j.layer == l })
		if i < 0 {
			f.jobs = append(f.jobs, &job{layer: l, want: l.All(), due: due})
		} else if f.jobs[i].done {
			f.jobs[i].done, f.jobs[i].due = false, due
		}
	}
	f.changedLocked()
}

// Remove forgets a layer.
func (f *Filler) Remove(diffID digest.Digest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.jobs = slices.DeleteFunc(f.jobs, func(j *job) bool { return j.layer.DiffID() == diffID })
}

func (f *Filler) changedLocked() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// Phase says what becomes of a layer in the background.
type Phase string

// The phases of a layer.
const (
	Off      Phase = "off"      // layers are not completed, or it was and gave up a part for others
	Waiting  Phase = "waiting"  // for its time, or for a worker
	Fetching Phase = "fetching" // requests for it are under way
	Failing  Phase = "failing"  // the last request failed; it is tried again
	Paused   Phase = "paused"   // the cache is full
	Done     Phase = "done"
)

// State says how much of a layer is there.
type State struct {
	DiffID digest.Digest
	Done   int64 // uncompressed bytes on disk
	Total  int64 // uncompressed bytes
	Phase  Phase
}

// State returns the state of all layers, in the order in which they were added.
func (f *Filler) State() []State {
	f.mu.Lock()
	defer f.mu.Unlock()
	states := []State{}
	for _, j := range f.jobs {
		if j.list {
			continue
		}
		s := State{DiffID: j.layer.DiffID(), Done: j.layer.Fetched(), Total: j.layer.Size()}
		s.Phase = f.phaseLocked(j, s.Done == s.Total)
		states = append(states, s)
	}
	return states
}

// phaseLocked returns the phase of a layer. The caller holds f.mu.
func (f *Filler) phaseLocked(j *job, whole bool) Phase {
	switch {
	case whole:
		return Done
	case f.opts.ListsOnly, f.opts.Workers == 0, j.done:
		return Off
	case f.full:
		return Paused
	case j.active > 0:
		return Fetching
	case j.failures > 0:
		return Failing
	}
	return Waiting
}

// Collectors are the filler's metrics.
func (f *Filler) Collectors() []prometheus.Collector {
	layers := func(phase Phase) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "clip_fill_layers", Help: "Layers of lazy images, by what becomes of them in the background.",
			ConstLabels: prometheus.Labels{"phase": string(phase)},
		}, func() (n float64) {
			for _, s := range f.State() {
				if s.Phase == phase {
					n++
				}
			}
			return n
		})
	}
	all := []prometheus.Collector{prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "clip_fill_backlog_bytes", Help: "Uncompressed bytes of lazy images that are not here yet and will be fetched in the background.",
	}, func() (n float64) {
		for _, s := range f.State() {
			if s.Phase != Off {
				n += float64(s.Total - s.Done)
			}
		}
		return n
	})}
	for _, phase := range []Phase{Off, Waiting, Fetching, Failing, Paused, Done} {
		all = append(all, layers(phase))
	}
	return all
}

// run fetches range after range until the filler is closed.
func (f *Filler) run() {
	for f.life.Err() == nil {
		j, due, changed := f.next()
		if j != nil {
			f.fetch(j)
			continue
		}
		timer := time.NewTimer(time.Until(due))
		select {
		case <-timer.C:
		case <-changed:
		case <-f.life.Done():
		}
		timer.Stop()
	}
}

// fetch sends one request for j.
func (f *Filler) fetch(j *job) {
	size, aim, least := &f.rangeSize, rangeTime, int64(leastRange)
	if j.list {
		size, aim, least = &f.listSize, listTime, leastList
	}
	done, err := j.layer.Fill(f.life, cache.Fill{Want: j.want, Bytes: size.Load(), Expected: j.list, Pace: f.pace})
	if done.Bytes > 0 && err == nil {
		size.Store(nextSize(done.Bytes, done.Took, aim, least))
	}
	f.done(j, done.Bytes > 0, err)
}

// next returns the first job that is due, or else when the next one will be
// and what tells of a change before that.
func (f *Filler) next() (_ *job, due time.Time, changed <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	due = now.Add(time.Hour)
	for _, j := range f.jobs {
		switch {
		case j.done, f.opts.ListsOnly && !j.list:
		case !j.due.After(now):
			j.active++
			return j, now, nil
		case j.due.Before(due):
			due = j.due
		}
	}
	return nil, due, f.changed
}

// done notes how a fetch of j ended.
func (f *Filler) done(j *job, begun bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	j.active--
	now := time.Now()
	full := errors.Is(err, cache.ErrFull)
	if full != f.full && (full || begun) {
		f.full = full
		if full {
			log.G(f.life).Info("the cache is full; what is not read is no longer fetched ahead")
		}
	}
	switch {
	case j.list && (full || err != nil && j.failures == listAttempts), j.list && !begun && j.active == 0:
		// What a list brings later than a reader asks for it is of no use.
		f.jobs = slices.DeleteFunc(f.jobs, func(other *job) bool { return other == j })
	case full:
		j.due = now.Add(jitter(fullPause))
	case err != nil:
		j.failures++
		j.due = now.Add(jitter(min(firstPause<<min(j.failures, 10), mostPause)))
		log.G(f.life).WithError(err).WithField("diffID", j.layer.DiffID()).Debug("fetching ahead failed; it is tried again later")
	case begun:
		j.failures = 0
	case !j.list && j.layer.Fetched() == j.layer.Size():
		j.done = true
	default:
		j.due = now.Add(busyPause)
	}
}

// jitter returns between a half and three halves of d: many nodes must not
// come back at the same moment.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// burst is how many bytes may come at once in spite of the rate.
const burst = 64 << 10

// pace waits until n more bytes are within the rate.
func (f *Filler) pace(ctx context.Context, n int) error {
	if f.limit == nil {
		return nil
	}
	for n > 0 {
		part := min(n, burst)
		if err := f.limit.WaitN(ctx, part); err != nil {
			return err
		}
		n -= part
	}
	return nil
}
