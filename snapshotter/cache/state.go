package cache

import (
	"io"
	"slices"
	"time"
)

// Failure is what went wrong fetching a layer, if nothing went right since; the
// zero value is nothing.
type Failure struct {
	At  time.Time
	Err error
}

// LayerState says how it stands with a layer. Sizes are in bytes.
type LayerState struct {
	Fetched  int64 // of the stream, on disk
	Disk     int64 // what all files of the layer take
	Complete bool  // all of it was checked against the diff ID
	Sources  []string
	Host     string    // who delivered last, in this process
	Used     time.Time // when it was last read
	Failure  Failure
}

// State returns how it stands with the layer.
func (l *Layer) State() LayerState {
	disk, _ := l.Usage()
	fetched := l.Fetched()
	l.mu.Lock()
	defer l.mu.Unlock()
	return LayerState{
		Fetched: fetched, Disk: disk, Complete: l.complete, Sources: slices.Clone(l.sources),
		Host: l.host, Used: l.used, Failure: l.failure,
	}
}

// failed notes what went wrong fetching.
func (l *Layer) failed(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failure = Failure{time.Now(), err}
}

// succeeded forgets what went wrong before a fetch that went right began.
func (l *Layer) succeeded(began time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failure.At.Before(began) {
		l.failure = Failure{}
	}
}

// servedBy notes who delivered what r has read.
func (l *Layer) servedBy(r io.Reader) {
	if host := hostOf(r); host != "" {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.host = host
	}
}

// hostOf returns who delivers what r reads, if it says so.
func hostOf(r io.Reader) string {
	if h, ok := r.(interface{ Host() string }); ok {
		return h.Host()
	}
	return ""
}

// Space says how much disk layers' data takes of what it may take, in bytes,
// and whether what is fetched is served from memory because it cannot be stored.
func (s *Store) Space() (used, most int64, inMemory bool) {
	return s.used.Load(), s.max, s.full.Load()
}
