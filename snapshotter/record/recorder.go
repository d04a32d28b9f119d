package record

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
)

// Recordings of ordinary starts: how long one takes, and how many are kept.
const (
	Period   = time.Minute
	mostKept = 256
	mostFile = 16 << 20 // bytes
)

// Recorder records ordinary starts. It is safe for concurrent use.
type Recorder struct {
	ctx context.Context // carries the logger
	dir string

	open atomic.Int64 // recordings under way, for reads to see without a lock

	mu     sync.Mutex // guards the fields below
	under  map[digest.Digest]*window
	closed bool
}

// window is a recording under way.
type window struct {
	*Recording
	layers []digest.Digest // fixed
	timer  *time.Timer
}

// Open returns a recorder that keeps recordings in the directory dir. ctx
// carries the logger and nothing else. The caller closes it.
func Open(ctx context.Context, dir string) (*Recorder, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &Recorder{ctx: context.WithoutCancel(ctx), dir: dir, under: map[digest.Digest]*window{}}, nil
}

// Close ends all recordings and keeps them.
func (r *Recorder) Close() {
	r.mu.Lock()
	r.closed = true
	chains := slices.Collect(maps.Keys(r.under))
	r.mu.Unlock()
	for _, chainID := range chains {
		r.end(chainID, nil)
	}
}

// Start begins a recording, unless one of the same chain is under way.
func (r *Recorder) Start(doc Document) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.under[doc.ChainID] != nil {
		return
	}
	w := &window{Recording: New(doc), layers: doc.Layers}
	w.timer = time.AfterFunc(Period, func() { r.end(doc.ChainID, w) })
	r.under[doc.ChainID] = w
	r.open.Add(1)
}

// end ends the recording of a chain, if it is w, or whatever it is, and keeps it.
func (r *Recorder) end(chainID digest.Digest, w *window) {
	r.mu.Lock()
	now := r.under[chainID]
	if now == nil || w != nil && w != now {
		r.mu.Unlock()
		return
	}
	now.timer.Stop()
	delete(r.under, chainID)
	r.open.Add(-1)
	r.mu.Unlock()
	if err := r.keep(now.Document()); err != nil {
		log.G(r.ctx).WithError(err).WithField("chainID", chainID).Warn("cannot keep what was recorded of a start")
	}
}

// Stream returns s, the layer's stream that all roots share, whose reads are
// recorded.
func (r *Recorder) Stream(diffID digest.Digest, s Stream) Stream { return &shared{s, r, diffID} }

type shared struct {
	Stream
	rec    *Recorder
	diffID digest.Digest
}

func (s *shared) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if s.rec.open.Load() > 0 {
		s.rec.touch(s.diffID, off, min(int64(len(p)), s.Size()-off))
	}
	return s.Stream.ReadAt(ctx, p, off)
}

func (r *Recorder) touch(diffID digest.Digest, off, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range r.under {
		if i := slices.Index(w.layers, diffID); i >= 0 {
			w.touch(i, off, n)
		}
	}
}

// Get returns the recording of a chain: the one under way, or else the one that
// was kept. The error is errdefs.ErrNotFound if there is none.
func (r *Recorder) Get(chainID digest.Digest) (Document, error) {
	if err := chainID.Validate(); err != nil {
		return Document{}, fmt.Errorf("chain ID %q: %w", chainID, errdefs.ErrInvalidArgument)
	}
	r.mu.Lock()
	w := r.under[chainID]
	r.mu.Unlock()
	old, err := r.load(chainID)
	if w == nil {
		return old, err
	}
	doc := w.Document()
	if err == nil && !better(doc, old) {
		return old, nil
	}
	return doc, nil
}

// better says whether a new recording is worth more than the one that is kept:
// not if less of the start was to be seen.
func better(doc, old Document) bool {
	return len(doc.Touches) > 0 && len(doc.Hidden) <= len(old.Hidden)
}

func (r *Recorder) file(chainID digest.Digest) string {
	return filepath.Join(r.dir, chainID.Encoded()+".json")
}

func (r *Recorder) load(chainID digest.Digest) (doc Document, err error) {
	f, err := os.Open(r.file(chainID))
	if os.IsNotExist(err) {
		return doc, fmt.Errorf("no start of %s was recorded: %w", chainID, errdefs.ErrNotFound)
	}
	if err != nil {
		return doc, err
	}
	defer f.Close()
	if err := json.NewDecoder(io.LimitReader(f, mostFile)).Decode(&doc); err != nil {
		return doc, fmt.Errorf("recording %s: %w", f.Name(), err)
	}
	if doc.Version != version || doc.ChainID != chainID {
		return doc, fmt.Errorf("recording %s is of version %d and chain %q: %w", f.Name(), doc.Version, doc.ChainID, errdefs.ErrNotFound)
	}
	return doc, nil
}

// keep writes a recording to its file, unless what is there is worth more.
func (r *Recorder) keep(doc Document) error {
	if len(doc.Touches) == 0 {
		return nil
	}
	if old, err := r.load(doc.ChainID); err == nil && !better(doc, old) {
		return nil
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(r.dir, ".new-")
	if err != nil {
		return err
	}
	_, err = tmp.Write(raw)
	if err == nil {
		err = tmp.Sync()
	}
	err = cmp.Or(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), r.file(doc.ChainID))
	}
	if err != nil {
		os.Remove(tmp.Name())
		return err
	}
	return r.prune()
}

// prune removes the oldest recordings, and what a crash left.
func (r *Recorder) prune() error {
	dirs, err := os.ReadDir(r.dir)
	if err != nil {
		return err
	}
	var kept []os.FileInfo
	for _, d := range dirs {
		info, err := d.Info()
		switch {
		case err != nil:
		case filepath.Ext(d.Name()) == ".json":
			kept = append(kept, info)
		case time.Since(info.ModTime()) > time.Hour:
			os.Remove(filepath.Join(r.dir, d.Name()))
		}
	}
	slices.SortFunc(kept, func(a, b os.FileInfo) int { return b.ModTime().Compare(a.ModTime()) })
	for _, info := range kept[min(len(kept), mostKept):] {
		if err := os.Remove(filepath.Join(r.dir, info.Name())); err != nil {
			return err
		}
	}
	return nil
}
