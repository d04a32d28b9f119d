package cache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Layer is one layer's uncompressed stream, of which the spans that were read
// are on disk. It is safe for concurrent use.
type Layer struct {
	store *Store
	dir   *os.Root
	head  layer.Index // without spans, points and entries
	spans int
	data  *os.File

	windows windows

	indexing  sync.Mutex   // serialises reading the index
	recording sync.Mutex   // serialises changes of the files have and complete, and guards hand
	hand      int          // the span at which the next sweep for cold ones begins
	punching  sync.RWMutex // held shared while spans of data are read or written, exclusively while holes are punched

	mu         sync.Mutex   // guards the fields below
	index      *layer.Index // without entries; nil while nothing is fetched
	reduced    time.Time    // when seek points were taken out of index; zero if none were
	indexUsed  time.Time
	sources    []string
	located    located // zero if no windows are in groups
	have       bitmap  // spans that data holds
	recorded   bitmap  // those that the file have says are there
	unproven   bitmap  // those that an earlier process fetched and nobody checked since; nil if none
	touched    bitmap  // those that were read since the last sweep
	expected   bitmap  // those that readers were said to ask for; nil if none
	runs       map[*run]struct{}
	waits      map[int]*wait // by span
	paused     map[int]pause // by the span that comes next
	streams    streams
	guesses    guesses
	counted    int64     // bytes of disk of data, as counted in Store.used
	used       time.Time // when it was last read, or used as a device
	punches    int       // how often spans were given up
	complete   bool      // data was checked against the diff ID
	devices    int       // mounts of data as a device under way
	distrusted bool      // data once did not match the diff ID though every span did
	rangeless  bool      // the whole blob was sent when a part was last asked for
	ended      bool      // nothing is fetched any more: the store is closed or the layer removed
	removed    bool
	host       string // who delivered last
	failure    Failure
}

// wait is for a span that is not there. It ends when the span has come or the
// run that was to bring it has ended.
type wait struct {
	done chan struct{}

	// Valid after done.
	err   error     // errAgain if it is worth looking again
	began time.Time // when the run began that err is of
	bytes []byte    // the span, if it could not be stored
}

// Reading: how long a read waits for its bytes.
const readTimeout = 60 * time.Second

var errReadTimeout = fmt.Errorf("data did not arrive within %s: %w", readTimeout, errdefs.ErrUnavailable)

// errAgain ends a wait whose run stopped for a reason that is not the reader's.
var errAgain = errors.New("another run may bring it")

func newLayer(s *Store, dir *os.Root, x *layer.Index) *Layer {
	l := &Layer{
		store: s, dir: dir, head: *x, spans: len(x.Spans),
		have: newBitmap(len(x.Spans)), recorded: newBitmap(len(x.Spans)), touched: newBitmap(len(x.Spans)),
		runs: map[*run]struct{}{}, waits: map[int]*wait{},
	}
	l.head.Spans, l.head.Points, l.head.Groups = nil, nil, nil
	return l
}

// DiffID returns what the layer is known by.
func (l *Layer) DiffID() digest.Digest { return l.head.DiffID }

// Size returns the length of the uncompressed stream in bytes.
func (l *Layer) Size() int64 { return int64(l.head.OutSize) }

// SpanSize returns the length of every span but the last in bytes.
func (l *Layer) SpanSize() int64 { return int64(l.head.SpanSize) }

// BlobSize returns the length of the compressed blob in bytes.
func (l *Layer) BlobSize() int64 { return int64(l.head.Size) }

// deviceBlock is EROFS's block size: a device is read in whole blocks.
const deviceBlock = 512

// fileSize is the size of data: the stream, filled up to a whole block.
func (l *Layer) fileSize() int64 { return blocksOf(l.Size()) }

// blocksOf fills up a size to a whole block.
func blocksOf(n int64) int64 { return (n + deviceBlock - 1) / deviceBlock * deviceBlock }

// ReadAt reads from the uncompressed stream, fetching what is not there. It
// returns io.EOF only beyond the last byte.
func (l *Layer) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 || off >= l.Size() {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), l.Size()-off)]
	began, outcome := time.Now(), readHere
	defer func() { l.store.metrics.reads.WithLabelValues(outcome).Observe(time.Since(began).Seconds()) }()
	lost := -1
	for n := 0; n < len(p); {
		at := inflate.Out(off) + inflate.Out(n)
		err := l.prove(l.head.SpanAt(at))
		c := 0
		if err == nil {
			c, err = l.readHere(p[n:], at)
		}
		if disk := (*diskError)(nil); errors.As(err, &disk) && disk.span != lost && !errors.Is(err, os.ErrClosed) {
			lost = disk.span
			l.lose(lost, err)
			err = nil
		}
		if err == nil && c == 0 {
			outcome = readFetched
			c, err = l.readComing(ctx, p[n:], at, began)
		}
		if err != nil {
			outcome = readFailed
			return 0, fmt.Errorf("layer %s [%d, %d): %w", l.head.DiffID, off, off+int64(len(p)), err)
		}
		n += c
	}
	return len(p), nil
}

// readHere reads what data holds at off: nothing if off's span is missing or
// unproven.
func (l *Layer) readHere(p []byte, off inflate.Out) (int, error) {
	l.punching.RLock()
	defer l.punching.RUnlock()
	last := l.head.SpanAt(off + inflate.Out(len(p)) - 1)
	end := off
	l.mu.Lock()
	for span := l.head.SpanAt(off); span <= last && l.have.get(span) && !l.unprovenLocked(span); span++ {
		l.touched.set(span)
		l.guesses.touch(span)
		_, end = l.spanRange(span)
	}
	l.used = time.Now()
	l.mu.Unlock()
	if end == off {
		return 0, nil
	}
	n, err := l.data.ReadAt(p[:min(inflate.Out(len(p)), end-off)], int64(off))
	if err != nil {
		return 0, &diskError{l.head.SpanAt(off + inflate.Out(n)), err}
	}
	return n, nil
}

// diskError is what the disk says instead of what was stored there.
type diskError struct {
	span int
	err  error
}

func (e *diskError) Error() string { return fmt.Sprintf("span %d on disk: %v", e.span, e.err) }

// Is hides io.EOF, which would be the end of the stream.
func (e *diskError) Is(target error) bool { return target != io.EOF && errors.Is(e.err, target) }

// lose has a span fetched again that cannot be read from disk. Written anew it may
// be readable again.
func (l *Layer) lose(span int, err error) {
	log.G(l.store.life).WithError(err).WithField("diffID", l.head.DiffID).
		Error("a part of a layer cannot be read from disk and is fetched again; see whether the disk fails")
	l.mu.Lock()
	defer l.mu.Unlock()
	l.have.clear(span)
	l.recorded.clear(span)
	l.punches++
	l.complete = false // no new mount uses the file
}

// readComing waits for the span at off. If it could not be stored, its bytes
// are copied to p; otherwise they are to be read where they are now. began is
// when the read began.
func (l *Layer) readComing(ctx context.Context, p []byte, off inflate.Out, began time.Time) (int, error) {
	span, last := l.head.SpanAt(off), l.head.SpanAt(off+inflate.Out(len(p))-1)
	l.prepareIndex()
	l.mu.Lock()
	if l.have.get(span) {
		l.mu.Unlock()
		return 0, nil // by now
	}
	start, _ := l.spanRange(span)
	if b := l.store.memory.get(l, span); b != nil {
		l.mu.Unlock()
		return copy(p, b[off-start:]), nil
	}
	r, err := l.runForLocked(span, last+1)
	if err != nil {
		l.mu.Unlock()
		return 0, err
	}
	w := l.waits[span]
	if w == nil {
		w = &wait{done: make(chan struct{})}
		l.waits[span] = w
	}
	l.mu.Unlock()
	ctx, cancel := context.WithDeadlineCause(ctx, began.Add(readTimeout), errReadTimeout)
	defer cancel()
	l.store.gate.enter(r)
	defer l.store.gate.leave(r)
	select {
	case <-w.done:
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	if w.bytes != nil {
		return copy(p, w.bytes[off-start:]), nil
	}
	if w.err == nil || errors.Is(w.err, errAgain) || w.began.Before(began) {
		// A run that had begun before had less time than the read has. What it met
		// may be over.
		return 0, nil
	}
	return 0, w.err
}

func (l *Layer) spanRange(span int) (start, end inflate.Out) { return l.head.SpanRange(span) }

// Fetched returns how many bytes of the stream are on disk.
func (l *Layer) Fetched() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := int64(l.have.count()) * int64(l.head.SpanSize)
	return min(n, l.Size())
}

// Usage returns how many bytes of disk the layer takes, in how many files.
func (l *Layer) Usage() (size, inodes int64) {
	for _, name := range []string{".", spansFile, pointsFile, windowsFile, entriesFile, sourcesFile, dataFile, haveFile, completeFile} {
		if info, err := l.dir.Stat(name); err == nil {
			size += blocks(info)
			inodes++
		}
	}
	return size, inodes
}

// Lacks says whether source is not among the repositories that the layer is
// fetched from, although it could be: it holds the blob d.
func (l *Layer) Lacks(d digest.Digest, source string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head.Digest == d && validSource(source) && !slices.Contains(l.sources, source)
}

// addSource remembers a repository that holds the layer's blob. The caller holds
// Store.adding, so that nothing that a read needs is locked while it is written.
func (l *Layer) addSource(source string) error {
	l.mu.Lock()
	if !validSource(source) || slices.Contains(l.sources, source) {
		l.mu.Unlock()
		return nil
	}
	// The newest first: it is the one that works now.
	sources := append([]string{source}, l.sources...)
	sources = sources[:min(len(sources), maxSources)]
	l.sources = sources
	l.mu.Unlock()
	raw, err := json.Marshal(sources)
	if err == nil {
		err = writeFile(l.dir, sourcesFile, raw)
	}
	if isFull(err) {
		log.G(l.store.life).WithError(err).WithField("diffID", l.head.DiffID).Warn("a repository of a layer cannot be written down; after a restart it is not asked")
		return nil // no reason for an image not to be lazy
	}
	return err
}

// prepareIndex reads the index if need be, for indexLocked. It takes a while, in
// which reads of what is here go on.
func (l *Layer) prepareIndex() {
	l.indexing.Lock()
	defer l.indexing.Unlock()
	l.mu.Lock()
	l.forgetReducedLocked()
	need := l.index == nil && !l.ended
	l.mu.Unlock()
	if !need {
		return
	}
	x, err := l.readIndex()
	if err != nil {
		return // indexLocked says why
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.index, l.indexUsed, l.reduced = x, time.Now(), time.Time{}
}

// forgetReducedLocked has all seek points be tried again after a while. The caller holds
// l.mu.
func (l *Layer) forgetReducedLocked() {
	if !l.reduced.IsZero() && time.Since(l.reduced) > windowsPause {
		l.index, l.reduced = nil, time.Time{}
	}
}

// readIndex returns the layer's index without its entries.
func (l *Layer) readIndex() (*layer.Index, error) {
	x, _, err := readIndex(l.store.life, l.dir, l.head.DiffID)
	if err == nil && (x.Digest != l.head.Digest || x.SpanSize != l.head.SpanSize || len(x.Spans) != l.spans) {
		err = errOtherIndex
	}
	return x, err
}

// indexLocked returns the layer's index without its entries, which is kept in
// memory only while it is needed. The caller holds l.mu, and has called
// prepareIndex.
func (l *Layer) indexLocked() (*layer.Index, error) {
	if l.ended {
		return nil, errEnded
	}
	l.indexUsed = time.Now()
	if l.index == nil {
		x, err := l.readIndex()
		if err != nil {
			return nil, err
		}
		l.index, l.reduced = x, time.Time{}
	}
	return l.index, nil
}

// errOtherIndex ends fetches of a layer whose index was mended with one that cuts
// it up differently: what is there, and who waits, is counted in the old spans.
var errOtherIndex = fmt.Errorf("the layer's index was replaced by another; restart the daemon: %w", errdefs.ErrFailedPrecondition)

// indexIdle is how long the index of a layer is kept after the last fetch.
const indexIdle = time.Minute

func (l *Layer) forgetIndex() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.runs) == 0 && time.Since(l.indexUsed) > indexIdle {
		l.index = nil
	}
}

// record makes what is there durable and then says so in the file have.
func (l *Layer) record() error {
	l.recording.Lock()
	defer l.recording.Unlock()
	l.mu.Lock()
	have := slices.Clone(l.have)
	same := slices.Equal(have, l.recorded)
	removed := l.removed
	l.mu.Unlock()
	if same || removed {
		return nil
	}
	if err := control(l.data, unix.Fdatasync); err != nil {
		// The kernel may have dropped what it could not write.
		l.mu.Lock()
		defer l.mu.Unlock()
		copy(l.have, l.recorded)
		l.punches++
		return fmt.Errorf("layer %s: data: %w", l.head.DiffID, err)
	}
	if err := writeFile(l.dir, haveFile, have.encode()); err != nil {
		return fmt.Errorf("layer %s: %w", l.head.DiffID, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recorded = have
	l.recountLocked()
	return nil
}

// recountLocked counts anew what data takes on disk. The caller holds l.mu.
func (l *Layer) recountLocked() {
	now := occupied(l.dir, dataFile)
	l.store.used.Add(now - l.counted)
	l.counted = now
}

// restore learns from disk which spans are there. What does not fit together
// is as good as nothing: it is fetched again.
func (l *Layer) restore() error {
	st, err := l.data.Stat()
	if err != nil {
		return err
	}
	l.counted = blocks(st)
	whole := st.Size() == l.fileSize()
	if whole {
		if raw, err := l.dir.ReadFile(haveFile); err == nil {
			if have, ok := decodeBitmap(raw, l.spans); ok {
				l.have, l.recorded, l.unproven = have, slices.Clone(have), slices.Clone(have)
			}
		}
		if info, err := l.dir.Stat(haveFile); err == nil {
			l.used = info.ModTime()
		}
	}
	if proof, err := l.dir.ReadFile(completeFile); err == nil && l.allHereLocked() && string(proof) == fingerprint(st) {
		l.complete, l.unproven = true, nil
		return nil
	}
	if err := removeFile(l.dir, completeFile); err != nil {
		return err
	}
	if whole {
		l.store.nudge() // it may be all there
		return nil
	}
	l.unproven = nil
	// The marks go before the file has a size that they would fit to.
	if err := removeFile(l.dir, haveFile); err != nil {
		return err
	}
	return l.data.Truncate(l.fileSize())
}

// Use notes that somebody uses the layer now, which reads by the kernel alone do not
// show.
func (l *Layer) Use() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.used = time.Now()
}

// keepUsed has restore know when the layer was last used.
func (l *Layer) keepUsed() error {
	l.mu.Lock()
	used := l.used
	l.mu.Unlock()
	if err := l.dir.Chtimes(haveFile, used, used); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// allHereLocked says whether data holds every span. The caller holds l.mu.
func (l *Layer) allHereLocked() bool { return l.have.count() == l.spans }

// remove ends the layer's use of its files and returns how many bytes of disk
// it had counted.
func (l *Layer) remove() int64 {
	l.recording.Lock()
	defer l.recording.Unlock()
	l.mu.Lock()
	l.removed, l.ended = true, true
	counted := l.counted
	l.counted = 0
	for r := range l.runs {
		r.cancel(errEnded)
	}
	l.mu.Unlock()
	l.store.memory.forget(l)
	_ = l.close() // what was written is no longer wanted
	return counted
}

var errEnded = fmt.Errorf("the layer was removed or its cache closed: %w", errdefs.ErrNotFound)

// end makes sure that no more runs begin.
func (l *Layer) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
}

func (l *Layer) close() error { return errors.Join(l.data.Close(), l.dir.Close()) }
