package layer

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/klauspost/compress/zstd"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// Most of an index are windows, and a reader needs few of them: those of the seek
// points where it starts. Windows are therefore kept in groups, apart from the index,
// which says where each group is and what digest it has. Every group leaves the window
// of one point in the index, so that whoever cannot have a group decodes from there,
// a few MiB earlier.

// Group is the windows of seek points near each other, one behind the other in one
// zstd frame.
type Group struct {
	Off    int64    // of the frame in Index.Windows, in bytes
	Len    int64    // of the frame, in bytes
	Digest [32]byte // SHA-256 of the frame
}

// Bounds that a decoder enforces and a writer keeps to.
const (
	maxGroup     = 1 << 20 // bytes of a group's windows
	maxGroupZstd = maxGroup + maxGroup/64
	maxWindows   = 1 << 30    // bytes of all groups of a layer
	groupMin     = 1 + 32 + 1 // bytes that an encoded group takes at least
	farPointMin  = 1 + 1 + 1 + 1 + 1
)

// GroupAt returns which of Groups has the window of the last seek point at or before
// off; ok is false if the index has it itself, or there is none.
func (x *Index) GroupAt(off inflate.Out) (group int, ok bool) {
	if len(x.Groups) == 0 {
		return 0, false
	}
	group = x.Points[x.pointAt(off)].Group - 1
	return group, group >= 0
}

// VerifyGroup checks the frame of a group against its digest. The error wraps
// ErrMismatch.
func (x *Index) VerifyGroup(group int, frame []byte) error {
	if sha256.Sum256(frame) != x.Groups[group].Digest {
		return fmt.Errorf("layer %s: group %d of windows: %w", x.DiffID, group, ErrMismatch)
	}
	return nil
}

// SeekPointWithout returns the last seek point at or before off without its window.
func (x *Index) SeekPointWithout(off inflate.Out) inflate.Point {
	return x.Points[x.pointAt(off)].bare()
}

// SeekPointIn is SeekPoint for one whose window is in a group, which GroupAt tells:
// frame is that group's.
func (x *Index) SeekPointIn(off inflate.Out, frame []byte) (inflate.Point, error) {
	p := &x.Points[x.pointAt(off)]
	if err := x.VerifyGroup(p.Group-1, frame); err != nil {
		return inflate.Point{}, err
	}
	windows, err := groupDecoder.DecodeAll(frame, nil)
	if err == nil && len(windows) < p.WindowOff+p.WindowSize {
		err = fmt.Errorf("it has %d bytes", len(windows))
	}
	if err != nil {
		return inflate.Point{}, fmt.Errorf("layer %s: group %d of windows: %w", x.DiffID, p.Group-1, err)
	}
	q := p.bare()
	q.Window = slices.Clone(windows[p.WindowOff : p.WindowOff+p.WindowSize])
	return q, nil
}

// frame returns a group's frame in Windows, nil if it is not there.
func (x *Index) frame(group int) []byte {
	g := x.Groups[group]
	if g.Off > int64(len(x.Windows)) || g.Len > int64(len(x.Windows))-g.Off {
		return nil
	}
	return x.Windows[g.Off : g.Off+g.Len]
}

// near returns the number of the last point at or before the one with number i whose
// window is in the index itself.
func (x *Index) near(i int) int {
	for i > 0 && x.Points[i].Group > 0 {
		i--
	}
	return i
}

// WindowsSize returns how many bytes Windows has when it is there.
func (x *Index) WindowsSize() int64 {
	if len(x.Groups) == 0 {
		return 0
	}
	last := x.Groups[len(x.Groups)-1]
	return last.Off + last.Len
}

// CheckWindows checks that Windows is there and every seek point can be used.
func (x *Index) CheckWindows() error {
	if int64(len(x.Windows)) != x.WindowsSize() {
		return fmt.Errorf("layer %s: %d bytes of windows instead of %d: %w", x.DiffID, len(x.Windows), x.WindowsSize(), ErrMismatch)
	}
	last := map[int]inflate.Out{} // by group: the point whose window ends it
	for i := range x.Points {
		last[x.Points[i].Group] = x.Points[i].Out
	}
	for group, g := range x.Groups {
		if _, err := x.SeekPointIn(last[group+1], x.Windows[g.Off:g.Off+g.Len]); err != nil {
			return err
		}
	}
	return nil
}

// WithoutGroups returns the index without the seek points whose windows are in
// groups. It shares the rest with x.
func (x *Index) WithoutGroups() *Index {
	y := x.Reachable(func(int) bool { return false })
	y.Groups, y.Windows = nil, nil
	return y
}

// Reachable returns the index with those of the seek points in groups whose group can
// be had. It shares the rest with x.
func (x *Index) Reachable(can func(group int) bool) *Index {
	reachable := make([]bool, len(x.Groups))
	for group := range reachable {
		reachable[group] = can(group)
	}
	y := *x
	y.Points = slices.DeleteFunc(slices.Clone(x.Points), func(p Point) bool { return p.Group > 0 && !reachable[p.Group-1] })
	return &y
}

// AppendPoints appends the encoded seek points whose windows are in groups, and the
// groups, but not the windows.
func (x *Index) AppendPoints(b []byte) []byte {
	b = slices.Grow(b, headSize+len(x.Groups)*(groupMin+4)+len(x.Points)*pointSize)
	b = binary.AppendUvarint(b, uint64(len(x.Groups)))
	far := x.far()
	var last Point
	for i, g := range x.Groups {
		n := 0
		for n < len(far) && far[n].Group == i+1 {
			n++
		}
		b = binary.AppendUvarint(b, uint64(g.Len))
		b = append(b, g.Digest[:]...)
		b = binary.AppendUvarint(b, uint64(n))
		for _, p := range far[:n] {
			b = binary.AppendUvarint(b, uint64(p.Out-last.Out))
			b = binary.AppendUvarint(b, uint64(p.In-last.In))
			b = append(b, p.Bit)
			b = appendString(b, string(p.State))
			b = binary.AppendUvarint(b, uint64(p.WindowSize))
			last = p
		}
		far = far[n:]
	}
	return b
}

// far returns the points whose windows are in groups.
func (x *Index) far() []Point {
	if len(x.Groups) == 0 {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(x.Points), func(p Point) bool { return p.Group == 0 })
}

// DecodePoints adds the seek points that AppendPoints encoded to x, which
// DecodeSpans returned. Errors wrap ErrFormat, and x is then as it was.
func (x *Index) DecodePoints(b []byte) error {
	r := &cursor{b: b}
	r.check(x.Compression == Gzip, "groups of a layer that is not gzip'ed")
	n := r.count(groupMin, "groups")
	if r.err != nil {
		return r.err
	}
	groups := make([]Group, 0, n)
	var far []Point
	var last Point
	var off int64
	for i := range n {
		g := Group{Off: off, Len: int64(r.uint(maxGroupZstd, "group"))}
		r.check(g.Len > 0 && off <= maxWindows-g.Len, "group")
		copy(g.Digest[:], r.bytes(32))
		far = r.groupPoints(x, far, &last, i+1)
		if r.err != nil {
			return r.err
		}
		groups = append(groups, g)
		off += g.Len
	}
	r.check(len(r.b) == 0, "bytes after its end")
	r.check(len(x.Points)+len(far) <= maxPoints, "number of seek points")
	if r.err != nil {
		return r.err
	}
	points := mergePoints(x.Points, far)
	r.check(pointsAscend(points), "order of seek points")
	y := *x
	y.Points, y.Groups = points, groups
	r.check(r.err != nil || y.spansFollowPoints(), "span ends before its seek point")
	if r.err == nil && n > 0 {
		x.Points, x.Groups = points, groups
	}
	return r.err
}

// groupPoints reads the points of a group and appends them to points.
func (r *cursor) groupPoints(x *Index, points []Point, last *Point, group int) []Point {
	n := r.count(farPointMin, "seek points")
	r.check(n > 0 && len(points)+n <= maxPoints, "number of seek points")
	for i := range n {
		p := Point{Group: group}
		p.Out = last.Out + inflate.Out(r.uint(uint64(x.OutSize-last.Out), "seek point"))
		p.In = last.In + inflate.In(r.uint(uint64(x.Size-last.In), "seek point"))
		p.Bit = r.byte()
		r.check(p.Bit <= 7, "bit offset")
		p.State = r.blob(inflate.MaxState, "decoder state")
		p.WindowSize = int(r.uint(inflate.WindowSize, "window"))
		if i > 0 {
			p.WindowOff = last.WindowOff + last.WindowSize
		}
		r.check(p.Out > last.Out && p.WindowSize > 0 && p.WindowOff+p.WindowSize <= maxGroup, "window")
		if r.err != nil {
			return nil
		}
		points = append(points, p)
		*last = p
	}
	return points
}

// mergePoints returns the points of a and b, both of which ascend, in one list.
func mergePoints(a, b []Point) []Point {
	all := make([]Point, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		if a[0].Out <= b[0].Out {
			all, a = append(all, a[0]), a[1:]
		} else {
			all, b = append(all, b[0]), b[1:]
		}
	}
	return append(append(all, a...), b...)
}

// pointsAscend says whether each point is behind the one before it in the
// uncompressed stream, and not before that in the other.
func pointsAscend(points []Point) bool {
	for i := 1; i < len(points); i++ {
		if points[i].Out == points[i-1].Out || points[i].In < points[i-1].In {
			return false
		}
	}
	return true
}

// groupDecoder is windowDecoder for groups.
var groupDecoder = func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(2*maxGroup), zstd.WithDecoderConcurrency(0))
	if err != nil {
		panic(err) // only if the options contradict each other
	}
	return d
}()
