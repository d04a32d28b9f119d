package cache

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// ErrFull ends a fill when what it brings would displace something else.
var ErrFull = errors.New("the cache is full")

var errNoRoom = errors.New("[cache] max_size is used up and all of it is in use")

// isFull says that there is no room on the disk.
func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// Eviction makes room for an evictShare-th of all at once, but not much more
// than evictMost bytes, since somebody waits for it. Fills leave an
// evictShare-th free for readers. Where eviction found nothing, it is not tried
// again soon.
const (
	evictShare  = 64
	evictMost   = 256 << 20
	evictFutile = time.Second
)

// hasRoom says whether a fill may bring n bytes.
func (s *Store) hasRoom(n int64) bool { return s.used.Load()+n <= s.max-s.max/evictShare }

// reserve counts n bytes as used, if there is room for them or can be made.
func (s *Store) reserve(n int64, fill bool) bool {
	if s.used.Add(n) <= s.max && (!fill || s.hasRoom(0)) {
		return true
	}
	if fill {
		s.used.Add(-n)
		return false
	}
	s.evict(s.used.Load() - s.max)
	if s.used.Load() <= s.max {
		return true
	}
	s.used.Add(-n)
	return false
}

// put stores the next span of r, or keeps it in memory, and ends the waits for
// it. here says that it need not be stored.
func (l *Layer) put(r *run, b []byte, here bool) error {
	span := r.pos
	var err error
	var kept []byte
	if !here {
		fill := r.pace != nil && !l.store.gate.wanted(r)
		if err = l.write(span, b, fill); err != nil {
			switch {
			case errors.Is(err, os.ErrClosed):
				return errEnded
			case fill && (isFull(err) || errors.Is(err, errNoRoom)):
				return ErrFull
			case fill:
				return fmt.Errorf("storing span %d: %w", span, err)
			}
			l.store.degrade(err)
			kept = slices.Clone(b)
			l.store.memory.add(l, span, kept)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !here && r.pace == nil && span >= r.asked {
		l.guesses.add(span, l.spans)
	}
	r.pos++
	l.landLocked(span, kept, nil)
	return nil
}

// write puts a span's bytes into data.
func (l *Layer) write(span int, b []byte, fill bool) error {
	if !l.store.reserve(int64(len(b)), fill) {
		return errNoRoom
	}
	err := l.writeData(span, b)
	if isFull(err) && !fill && l.store.evict(int64(len(b))) > 0 {
		err = l.writeData(span, b)
	}
	if err != nil {
		l.store.used.Add(-int64(len(b)))
		l.punch([]int{span}) // what was written of it is of no use
		return err
	}
	l.store.recover()
	return nil
}

func (l *Layer) writeData(span int, b []byte) error {
	l.punching.RLock()
	defer l.punching.RUnlock()
	start, _ := l.spanRange(span)
	if _, err := l.data.WriteAt(b, int64(start)); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.removed {
		return os.ErrClosed // what it takes is not counted any more
	}
	l.have.set(span)
	delete(l.paused, span)
	if l.unproven != nil {
		l.unproven.clear(span)
	}
	l.counted += int64(len(b))
	if l.allHereLocked() {
		l.store.nudge()
	}
	return nil
}

// degrade says, once, that spans are served from memory.
func (s *Store) degrade(why error) {
	if s.full.CompareAndSwap(false, true) {
		log.G(s.life).WithError(why).Warn("fetched data cannot be stored and is served from memory; reads are slower until there is room")
	}
}

// recover says that they are stored again.
func (s *Store) recover() {
	if s.full.Load() && s.full.CompareAndSwap(true, false) {
		log.G(s.life).Info("fetched data can be stored again")
	}
}

// evict gives up at least need bytes of what was not read lately, if it can,
// and returns how many it did.
func (s *Store) evict(need int64) (freed int64) {
	s.evicting.Lock()
	defer s.evicting.Unlock()
	if time.Since(s.futile) < evictFutile {
		return 0
	}
	need = max(need, min(s.max/evictShare, evictMost))
	layers := s.candidates()
	for _, l := range layers {
		if freed < need && !s.inUse(l.head.DiffID) {
			freed += l.giveUp(func() []int { return l.sweep(l.spans, true) })
		}
	}
	// The first sweep unmarks what was read, the second finds what was not
	// read again.
	for range 2 {
		for _, l := range layers {
			if freed < need {
				want := int((need - freed + int64(l.head.SpanSize) - 1) / int64(l.head.SpanSize))
				freed += l.giveUp(func() []int { return l.sweep(want, false) })
			}
		}
	}
	if freed == 0 {
		s.futile = time.Now()
	}
	return freed
}

// Prune gives up all that the layers hold, or all but those that InUse names, and
// returns which layers gave up something and how many bytes of disk that freed.
// What the kernel has open as a device stays.
func (s *Store) Prune(inUse bool) (layers []digest.Digest, freed int64) {
	s.evicting.Lock()
	defer s.evicting.Unlock()
	for _, l := range s.candidates() {
		if s.inUse(l.head.DiffID) && !inUse {
			continue
		}
		if n := l.giveUp(func() []int { return l.sweep(l.spans, true) }); n > 0 {
			layers, freed = append(layers, l.head.DiffID), freed+n
		}
	}
	return layers, freed
}

// candidates returns all layers, the least recently read first. The caller
// holds s.evicting.
func (s *Store) candidates() []*Layer {
	if !s.allLoaded {
		dirs, err := os.ReadDir(s.dir)
		s.allLoaded = err == nil
		for _, dir := range dirs {
			diffID := digest.NewDigestFromEncoded(digest.SHA256, dir.Name())
			if diffID.Validate() == nil {
				_, _ = s.Layer(diffID) // one that cannot be loaded cannot be evicted
			}
		}
	}
	layers := s.loaded()
	used := make(map[*Layer]time.Time, len(layers))
	for _, l := range layers {
		l.mu.Lock()
		used[l] = l.used
		l.mu.Unlock()
	}
	slices.SortFunc(layers, func(a, b *Layer) int {
		return cmp.Or(used[a].Compare(used[b]), cmp.Compare(a.head.DiffID, b.head.DiffID))
	})
	return layers
}

// sweep returns up to want spans to give up: those that are there and, unless
// all of the layer goes, were not read since the last sweep. The caller holds
// l.recording and l.mu.
func (l *Layer) sweep(want int, all bool) (victims []int) {
	for range l.spans {
		if len(victims) == want {
			break
		}
		if l.hand >= l.spans {
			l.hand = 0
		}
		switch {
		case !l.have.get(l.hand):
		case all || !l.touched.get(l.hand):
			victims = append(victims, l.hand)
		default:
			l.touched.clear(l.hand)
		}
		l.hand++
	}
	slices.Sort(victims)
	return victims
}

// giveUp punches holes for the spans that choose returns, which is called with
// l.recording and l.mu held, and returns how many bytes of disk that freed.
func (l *Layer) giveUp(choose func() []int) int64 {
	l.recording.Lock()
	defer l.recording.Unlock()
	if !l.unfinish() {
		return 0
	}
	l.mu.Lock()
	victims := choose()
	recorded := slices.Clone(l.recorded)
	for _, span := range victims {
		l.have.clear(span)
		l.touched.clear(span)
		recorded.clear(span)
	}
	marked := !slices.Equal(recorded, l.recorded)
	if len(victims) > 0 {
		l.punches++
	}
	before := l.counted
	l.mu.Unlock()
	if len(victims) == 0 {
		return 0
	}
	if marked {
		err := writeFile(l.dir, haveFile, recorded.encode())
		if isFull(err) {
			// Without the file nothing counts as there, until the next record.
			clear(recorded)
			err = removeFile(l.dir, haveFile)
		}
		if err != nil {
			log.G(l.store.life).WithError(err).WithField("diffID", l.head.DiffID).Warn("cannot give up spans")
			return 0
		}
		l.mu.Lock()
		l.recorded = recorded
		l.mu.Unlock()
	}
	l.punch(victims)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recountLocked()
	freed := max(before-l.counted, 0)
	l.store.metrics.evicted.Add(float64(freed))
	return freed
}

// punch punches holes where the spans lie that are not marked as there, after
// all reads of them.
func (l *Layer) punch(spans []int) {
	l.punching.Lock()
	defer l.punching.Unlock()
	l.mu.Lock()
	spans = slices.DeleteFunc(spans, func(span int) bool { return l.removed || l.have.get(span) })
	l.mu.Unlock()
	for len(spans) > 0 {
		n := 1
		for n < len(spans) && spans[n] == spans[0]+n {
			n++
		}
		start, _ := l.spanRange(spans[0])
		_, end := l.spanRange(spans[n-1])
		if end == l.head.OutSize {
			end = inflate.Out(l.fileSize())
		}
		err := control(l.data, func(fd int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(start), int64(end-start))
		})
		if err != nil {
			log.G(l.store.life).WithError(err).WithField("diffID", l.head.DiffID).Warn("cannot punch a hole")
			return
		}
		spans = spans[n:]
	}
}
