package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// The windows of most seek points are in groups, each of which is fetched from the
// image's archive when decoding first starts at one of its points. The file windows
// has the groups where they are in the archive, with holes for those that were not
// fetched; what is in a hole, or was damaged, does not match the group's digest.

// located is what the file points begins with: where the windows are.
type located struct {
	Layer  digest.Digest `json:"layer"`            // the blob that the points are of
	Source string        `json:"source,omitempty"` // repository that holds the archive; empty if none is known
	archive.Place
}

// Windows: how many bytes of groups are fetched at least, if so many follow the one that
// is needed, how long that may take, and for how long decoding starts at other seek
// points after it failed.
const (
	leastWindows   = 48 << 10
	windowsTimeout = 20 * time.Second // more than a host that is silent takes
	windowsPause   = time.Minute
)

// noWindow ends the fetch of a run which needs a group that cannot be had: decoding is
// to start at another seek point.
type noWindow struct {
	group int
	err   error
}

func (e *noWindow) Error() string { return fmt.Sprintf("group %d of windows: %v", e.group, e.err) }
func (e *noWindow) Unwrap() error { return e.err }

var (
	errNoPlace       = fmt.Errorf("nobody knows where it can be fetched: %w", errdefs.ErrNotFound)
	errWindowFailed  = fmt.Errorf("it could not be fetched for another reader: %w", errdefs.ErrUnavailable)
	errWholeArchives = fmt.Errorf("the registry sends nothing but the whole archive: %w", errdefs.ErrNotImplemented)
)

// windows are a layer's groups of windows that are being fetched.
type windows struct {
	mu     sync.Mutex            // guards the fields below
	coming map[int]chan struct{} // groups that are being fetched
	failed time.Time             // when fetching one last failed
}

// encodePoints returns the content of the file points.
func encodePoints(x *layer.Index, at located) ([]byte, error) {
	raw, err := json.Marshal(at)
	if err != nil {
		return nil, err
	}
	b := binary.AppendUvarint(nil, uint64(len(raw)))
	return appendChecksum(x.AppendPoints(append(b, raw...))), nil
}

// locate returns where x's windows are if source holds their archive.
func locate(x Encoded, source string) located {
	at := located{Layer: x.Digest}
	if x.Place.Validate() == nil && validSource(source) {
		at.Source, at.Place = source, x.Place
	}
	return at
}

// readPoints adds to x the seek points that the file points has, and returns where
// their windows are. Without the file, or if it is of another blob, x is as it was.
func readPoints(dir *os.Root, x *layer.Index) (at located, err error) {
	raw, err := dir.ReadFile(pointsFile)
	if os.IsNotExist(err) {
		return at, nil
	}
	if err == nil {
		at, err = decodePoints(raw, x)
	}
	if err != nil {
		return located{}, fmt.Errorf("seek points on disk: %w", err)
	}
	return at, nil
}

// decodePoints is readPoints for what the file has. Errors are errdefs.ErrDataLoss.
func decodePoints(file []byte, x *layer.Index) (at located, err error) {
	raw, err := cutChecksum(file)
	if err != nil {
		return at, err
	}
	n, used := binary.Uvarint(raw)
	if len(raw) == len(file) || used <= 0 || n > uint64(len(raw)-used) {
		return at, fmt.Errorf("unexpected end: %w", errdefs.ErrDataLoss)
	}
	raw = raw[used:]
	if err := json.Unmarshal(raw[:n], &at); err != nil {
		return at, errors.Join(err, errdefs.ErrDataLoss)
	}
	if at.Layer != x.Digest {
		return located{}, nil
	}
	if err := x.DecodePoints(raw[n:]); err != nil {
		return at, errors.Join(err, errdefs.ErrDataLoss)
	}
	if at.Source == "" || at.Validate() != nil || !validSource(at.Source) {
		return located{Layer: at.Layer}, nil
	}
	return at, nil
}

// LacksPlace says whether p, where windows of the layer may be, is another place than
// the one that they are fetched from.
func (l *Layer) LacksPlace(p archive.Place) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.located.Place != p
}

// addWindows takes the seek points in groups of x, and their windows or where these are,
// if x is the index that the layer has otherwise. The caller holds Store.adding.
func (l *Layer) addWindows(x Encoded, source string) error {
	at := locate(x, source)
	l.mu.Lock()
	known := l.located
	l.mu.Unlock()
	if at.Source == "" && known.Layer == at.Layer {
		at = known
	}
	if len(x.Groups) == 0 || at == known && (x.Windows == nil || l.hasWindows(x.Index)) {
		return nil
	}
	here, err := readSpans(l.dir, l.head.DiffID)
	if err != nil || !bytes.Equal(here.AppendSpans(nil), x.AppendSpans(nil)) {
		return err
	}
	raw, err := encodePoints(x.Index, at)
	if err == nil {
		err = writeFile(l.dir, pointsFile, raw)
	}
	if err == nil && x.Windows != nil {
		err = l.storeWindows(x.Windows, 0)
	}
	if isFull(err) {
		log.G(l.store.life).WithError(err).WithField("diffID", l.head.DiffID).Warn("where the windows of a layer are cannot be written down; more of it is fetched")
		return nil // no reason for an image not to be lazy
	}
	if err == nil {
		l.mu.Lock()
		l.located, l.index = at, nil
		l.mu.Unlock()
	}
	return err
}

// hasWindows says whether all groups of x are on disk.
func (l *Layer) hasWindows(x *layer.Index) bool {
	for group := range x.Groups {
		if l.windowHere(x, group) == nil {
			return false
		}
	}
	return true
}

// withoutGroup returns the index to go on with when a group of x cannot be had, and has r
// begin where that says: decoding starts at no point whose group is not on disk. New
// runs do the same for a while.
func (l *Layer) withoutGroup(x *layer.Index, r *run, gone int) *layer.Index {
	y := x.Reachable(func(group int) bool { return group != gone && l.windowHere(x, group) != nil })
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.index != nil {
		l.index, l.reduced = y, time.Now()
	}
	r.pos = l.fromSeekPointLocked(l.decodeFromLocked(y, r.pos), r.pos)
	return y
}

// window returns the frame of a group, fetching it if it is not on disk.
func (l *Layer) window(ctx context.Context, x *layer.Index, group int) ([]byte, error) {
	began := time.Now()
	for {
		if frame := l.windowHere(x, group); frame != nil {
			return frame, nil
		}
		until, coming, err := l.windows.claim(x, group, began)
		if err != nil {
			return nil, err
		}
		if coming == nil {
			return l.fetchWindows(x, group, until)
		}
		select {
		case <-coming:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// windowHere returns the frame of a group if it is on disk.
func (l *Layer) windowHere(x *layer.Index, group int) []byte {
	f, err := l.dir.Open(windowsFile)
	if err != nil {
		return nil
	}
	defer f.Close()
	frame := make([]byte, x.Groups[group].Len)
	if _, err := f.ReadAt(frame, x.Groups[group].Off); err != nil || x.VerifyGroup(group, frame) != nil {
		return nil
	}
	return frame
}

// storeWindows stores frames that begin at off.
func (l *Layer) storeWindows(frames []byte, off int64) error {
	if len(frames) == 0 {
		return nil
	}
	f, err := l.dir.OpenFile(windowsFile, os.O_WRONLY|os.O_CREATE, 0o600)
	if err == nil {
		_, err = f.WriteAt(frames, off)
		err = errors.Join(err, f.Close())
	}
	return err
}

// fetchWindows fetches the groups [first, until), which it has claimed, and returns
// the frame of the first. It goes on when the run that needs it has ended: others may
// wait for it.
func (l *Layer) fetchWindows(x *layer.Index, first, until int) (frame []byte, err error) {
	defer func() { l.windows.came(first, until, err) }()
	ctx, cancel := context.WithTimeout(l.store.life, windowsTimeout)
	defer cancel()
	b, err := l.askForWindows(ctx, x, first, until)
	l.store.metrics.requests.WithLabelValues(forWindows, outcome(err)).Inc()
	if err != nil && l.store.life.Err() == nil {
		log.G(ctx).WithError(err).WithField("diffID", l.head.DiffID).Info("windows cannot be fetched from the image's archive; more of the layer is fetched in their place")
	}
	if werr := l.storeWindows(b, x.Groups[first].Off); werr != nil {
		log.G(ctx).WithError(werr).WithField("diffID", l.head.DiffID).Debug("windows cannot be stored")
	}
	if n := x.Groups[first].Len; int64(len(b)) >= n {
		return b[:n], nil
	}
	return nil, err
}

// askForWindows sends the request for fetchWindows. It returns the frames up to the
// first that is wrong.
func (l *Layer) askForWindows(ctx context.Context, x *layer.Index, first, until int) ([]byte, error) {
	l.mu.Lock()
	at := l.located
	sources := append([]string{at.Source}, slices.DeleteFunc(slices.Clone(l.sources), func(s string) bool { return s == at.Source })...)
	l.mu.Unlock()
	off := x.Groups[first].Off
	n := x.Groups[until-1].Off + x.Groups[until-1].Len - off
	in, size := at.Range(off, n)
	rc, err := l.store.fetch.Open(ctx, sources, at.Blob, in, size)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	if w, ok := rc.(widener); ok && w.Widen(in, in+size) {
		return nil, errWholeArchives
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(rc, b); err != nil {
		return nil, err
	}
	l.store.metrics.bytes.WithLabelValues(forWindows, hostOf(rc)).Add(float64(size))
	if b, err = at.Cut(b, off, n); err != nil {
		return nil, err
	}
	for group := first; group < until; group++ {
		start := x.Groups[group].Off - off
		if err := x.VerifyGroup(group, b[start:start+x.Groups[group].Len]); err != nil {
			l.store.metrics.wrong.WithLabelValues(wrongWindow).Inc()
			if r, ok := rc.(interface{ Blame() }); ok {
				r.Blame()
			}
			return b[:start], err
		}
	}
	return b, nil
}

// claim says that the caller fetches the groups [group, until), or, if somebody else
// fetches that group, what is closed when it has come.
func (w *windows) claim(x *layer.Index, group int, began time.Time) (until int, coming chan struct{}, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed.After(began) {
		return 0, nil, errWindowFailed
	}
	if coming := w.coming[group]; coming != nil {
		return 0, coming, nil
	}
	if w.coming == nil {
		w.coming = map[int]chan struct{}{}
	}
	mine := make(chan struct{})
	end := x.Groups[group].Off + leastWindows
	for until = group; until == group || until < len(x.Groups) && w.coming[until] == nil && x.Groups[until].Off+x.Groups[until].Len <= end; until++ {
		w.coming[until] = mine
	}
	return until, nil, nil
}

// came says how the fetch of what was claimed has ended.
func (w *windows) came(first, until int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.coming[first])
	for group := first; group < until; group++ {
		delete(w.coming, group)
	}
	if err != nil {
		w.failed = time.Now()
	}
}
