package snapshotter

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/imports"
	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
	"github.com/beam-cloud/containerd-clip/snapshotter/modules"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
)

// How long it is watched what the containers of an image load: from the pull until
// the first one is there, and from then on; of how many images at a time; and how much
// memory the lists of one may take, in bytes.
const (
	importsWait   = 10 * time.Minute
	importsPeriod = 2 * time.Minute
	importsMost   = 16
	importsSize   = 32 << 20
)

// watchImports has fetched, from now on, what programs of the image are about to load,
// for the snapshot id. An archive that does not say what they load is no
// reason to refuse the image. The archive may be closed when it returns.
func (s *Snapshotter) watchImports(ctx context.Context, id string, a *archive.Archive, is *stack) {
	if !s.prefetch {
		return
	}
	lists := make([]imports.List, len(is.layers))
	size := 0
	for i := range is.layers {
		var err error
		if lists[i], err = a.Imports(i); err != nil {
			log.G(ctx).WithError(err).Warn("ignoring what the archive says of imports")
			return
		}
		if size += lists[i].Size(); size > importsSize {
			log.G(ctx).WithField("bytes", importsSize).Warn("ignoring what the archive says of imports: it is more than is kept in memory")
			return
		}
	}
	if size == 0 {
		return
	}
	r := s.imports.add(id, a.DiffIDs()[:len(is.layers)])
	s.background.Go(func() { s.imports.found(r, modules.New(is.root, is.layers, lists)) })
}

// expectFiles has fetched what somebody is about to read of layers.
func (s *Snapshotter) expectFiles(diffIDs []digest.Digest, files []modules.File) {
	wants := make([]fill.Want, 0, len(files))
	for _, f := range files {
		if l, err := s.layers.Layer(diffIDs[f.Layer]); err == nil && f.Len <= mostOfFile {
			wants = append(wants, fill.Want{Layer: l, Spans: l.Cover(f.Off, f.Off+f.Len)})
		}
	}
	s.filler.Prefetch(wants)
}

// importWatch tells of what is about to be read by who reads now.
type importWatch struct {
	tell  func([]digest.Digest, []modules.File)
	reads chan layerRead
	ended chan struct{}
	work  sync.WaitGroup
	open  atomic.Int64 // roots that are watched, for reads to see without a lock

	mu    sync.Mutex // guards the fields below
	roots []*watchedRoot
}

// watchedRoot is a snapshot whose containers are watched. What modules is set to is
// for the goroutine that watches.
type watchedRoot struct {
	id      string
	layers  []digest.Digest
	modules *modules.Modules // nil until they are found; guarded by importWatch.mu
	timer   *time.Timer      // ends it
}

// layerRead is a read of a layer from a byte on.
type layerRead struct {
	diffID digest.Digest
	off    int64
}

// readsWaiting is how many reads may wait to be looked at. What comes when there are
// so many is not looked at.
const readsWaiting = 256

func newImportWatch(tell func([]digest.Digest, []modules.File)) *importWatch {
	w := &importWatch{tell: tell, reads: make(chan layerRead, readsWaiting), ended: make(chan struct{})}
	w.work.Go(w.run)
	return w
}

// close ends it, when nothing is read any more or not to be looked at. Nothing is
// told after.
func (w *importWatch) close() {
	w.mu.Lock()
	for len(w.roots) > 0 {
		w.dropLocked(0)
	}
	w.mu.Unlock()
	close(w.ended)
	w.work.Wait()
}

// add has the snapshot id watched as soon as its modules are found: what becomes of
// it meanwhile counts.
func (w *importWatch) add(id string, layers []digest.Digest) *watchedRoot {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.roots) == importsMost {
		w.dropLocked(0)
	}
	r := &watchedRoot{id: id, layers: layers}
	r.timer = time.AfterFunc(importsWait, func() { w.drop(id) })
	w.roots = append(w.roots, r)
	w.open.Add(1)
	return r
}

// found begins to watch r, unless it was dropped or there is nothing to be told.
func (w *importWatch) found(r *watchedRoot, found *modules.Modules) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if found.Empty() {
		if i := slices.Index(w.roots, r); i >= 0 {
			w.dropLocked(i)
		}
		return
	}
	r.modules = found
}

// mounted says that the first container of the snapshot id begins.
func (w *importWatch) mounted(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if i := w.indexLocked(id); i >= 0 {
		w.roots[i].timer.Reset(importsPeriod)
	}
}

// drop ends watching the snapshot id.
func (w *importWatch) drop(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if i := w.indexLocked(id); i >= 0 {
		w.dropLocked(i)
	}
}

func (w *importWatch) indexLocked(id string) int {
	return slices.IndexFunc(w.roots, func(r *watchedRoot) bool { return r.id == id })
}

func (w *importWatch) dropLocked(i int) {
	w.roots[i].timer.Stop()
	w.roots = slices.Delete(w.roots, i, i+1)
	w.open.Add(-1)
}

// run looks at reads.
func (w *importWatch) run() {
	for {
		select {
		case r := <-w.reads:
			w.look(r)
		case <-w.ended:
			return
		}
	}
}

// look tells what is read after r.
func (w *importWatch) look(r layerRead) {
	w.mu.Lock()
	roots := slices.DeleteFunc(slices.Clone(w.roots), func(root *watchedRoot) bool { return root.modules == nil })
	w.mu.Unlock()
	for _, root := range roots {
		i := slices.Index(root.layers, r.diffID)
		if i < 0 {
			continue
		}
		if files := root.modules.Touch(i, r.off); len(files) > 0 {
			w.tell(root.layers, files)
		}
		if root.modules.Empty() {
			w.drop(root.id)
		}
	}
}

// stream returns s, the layer's stream that all roots share, whose reads are looked at.
func (w *importWatch) stream(diffID digest.Digest, s record.Stream) record.Stream {
	watched := &watchedStream{Stream: s, watch: w, diffID: diffID}
	watched.end.Store(-1)
	return watched
}

type watchedStream struct {
	record.Stream
	watch  *importWatch
	diffID digest.Digest
	end    atomic.Int64 // of the last read; -1 before the first
}

func (s *watchedStream) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	// What begins where another read ends is what the kernel reads ahead, and nobody
	// may want it.
	if last := s.end.Swap(off + int64(len(p))); last != off && s.watch.open.Load() > 0 {
		select {
		case s.watch.reads <- layerRead{s.diffID, off}:
		default:
		}
	}
	return s.Stream.ReadAt(ctx, p, off)
}
