package cache

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// Fetch is one request for a stretch of a layer that has ended.
type Fetch struct {
	DiffID digest.Digest
	Off    int64 // of the uncompressed stream
	Len    int64 // that arrived
	Bytes  int64 // compressed, that were asked for
	Reason string
	Host   string
	Began  time.Time
	Took   time.Duration
	Err    error
}

// trace makes the request a span, if somebody collects spans. It belongs to no
// trace of containerd's: who reads is the kernel, and others may wait for it, too.
func (f Fetch) trace(ctx context.Context) {
	_, span := otel.Tracer("").Start(ctx, "clip.fetch", trace.WithNewRoot(), trace.WithTimestamp(f.Began))
	if !span.IsRecording() {
		return
	}
	span.SetAttributes(
		attribute.String("diffID", f.DiffID.String()), attribute.Int64("off", f.Off), attribute.Int64("len", f.Len),
		attribute.Int64("bytes", f.Bytes), attribute.String("reason", f.Reason), attribute.String("host", f.Host),
	)
	if f.Err != nil {
		span.SetStatus(codes.Error, f.Err.Error())
	}
	span.End(trace.WithTimestamp(f.Began.Add(f.Took)))
}

// keptFetches is how many fetches are remembered.
const keptFetches = 4096

// fetches are the last ones. The zero value is none.
type fetches struct {
	mu   sync.Mutex // guards the fields below
	ring []Fetch
	next int
}

func (f *fetches) add(one Fetch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.ring) < keptFetches {
		f.ring = append(f.ring, one)
		return
	}
	f.ring[f.next] = one
	f.next = (f.next + 1) % keptFetches
}

// Fetches returns the last fetches of the store that began after a time, in the
// order in which they ended: 4096 at most.
func (s *Store) Fetches(after time.Time) []Fetch {
	s.fetches.mu.Lock()
	defer s.fetches.mu.Unlock()
	all := slices.Concat(s.fetches.ring[s.fetches.next:], s.fetches.ring[:s.fetches.next])
	return slices.DeleteFunc(all, func(f Fetch) bool { return !f.Began.After(after) })
}
