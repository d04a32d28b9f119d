package tree

import (
	"cmp"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// ErrInvalid is wrapped when containerd would refuse to unpack the layers. It
// usually means that an entry contradicts an earlier one of its layer.
var ErrInvalid = errors.New("invalid layer")

// ErrUnsupported is wrapped when containerd might accept the layers but Merge
// cannot: they are too many or have too many entries, resolving their paths
// takes more work than any real image needs, sparse files more pieces, or the
// xattrs of a file more space.
var ErrUnsupported = errors.New("unsupported layer")

// Merge stacks layers, the bottom one first, and returns the root directory.
// Errors wrap ErrInvalid or ErrUnsupported and name the layer and the entry.
// Layers are unpacked side by side; what comes out does not depend on it.
//
// An empty stack gives an empty root.
func Merge(layers []*layer.Index) (*Node, error) {
	steps := baseSteps
	chunks, total := int64(0), Total{}
	for _, l := range layers {
		if err := total.Add(l); err != nil {
			return nil, err
		}
		steps += stepsPerEntry * len(l.Entries)
		chunks += sparseChunks(l.Entries)
	}
	if chunks > maxChunks {
		return nil, fmt.Errorf("%w: sparse files of %d pieces", ErrUnsupported, chunks)
	}
	uppers, err := unpackAll(layers, steps, runtime.GOMAXPROCS(0))
	if err != nil {
		// Several layers may be wrong, and they share what work they may take.
		// In their order it is always the same one that fails first.
		uppers, err = unpackAll(layers, steps, 1)
	}
	if err != nil {
		return nil, err
	}
	return stack(uppers)
}

// unpackAll unpacks the layers, at most atOnce of them at the same time. A
// layer starts before those above it, which may wait for it.
func unpackAll(layers []*layer.Index, steps, atOnce int) ([]*upper, error) {
	work := newBudget(steps)
	if len(layers) == 0 {
		return []*upper{newUpper(0, nil, work)}, nil
	}
	uppers := make([]*upper, 0, len(layers))
	var g errgroup.Group
	g.SetLimit(atOnce)
	for i, l := range layers {
		u := newUpper(i, uppers, work)
		uppers = append(uppers, u)
		g.Go(func() error {
			if err := u.unpack(l); err != nil {
				return fmt.Errorf("layer %d: %w", i, err)
			}
			return nil
		})
	}
	return uppers, g.Wait()
}

// What an image may have in all. Docker's limit is 127 layers; images of a
// million files exist.
const (
	MaxLayers  = 512
	MaxEntries = layer.DefaultMaxEntries
)

// Total adds up what the layers of an image have, so that whoever loads one
// after the other knows early that they are too much. The zero value is ready.
type Total struct{ layers, entries int }

// Add counts a layer. The error wraps ErrUnsupported.
func (t *Total) Add(l *layer.Index) error {
	t.layers++
	t.entries += len(l.Entries)
	switch {
	case t.layers > MaxLayers:
		return fmt.Errorf("%w: more than %d layers", ErrUnsupported, MaxLayers)
	case t.entries > MaxEntries:
		return fmt.Errorf("%w: more than %d entries in all layers together", ErrUnsupported, MaxEntries)
	}
	return nil
}

// maxChunks bounds the pieces of all sparse files: 64 GiB if their data is
// aligned to 4 KiB, which takes 128 MiB in an EROFS image.
const maxChunks = 16 << 20

func sparseChunks(entries []layer.Entry) (n int64) {
	for i := range entries {
		if e := &entries[i]; e.Type == layer.TypeSparse {
			_, count := layer.Chunks(e.Size, e.Extents)
			n += min(count, maxChunks+1)
		}
	}
	return n
}

// merged is a directory of the result and the directories it is made of, the
// topmost first.
type merged []*inode

// held is a name in a directory that is being merged. rank is 0 for the
// topmost layer.
type held struct {
	name string
	rank int
	in   *inode
}

// stack does what overlayfs does with its lower directories.
func stack(uppers []*upper) (*Node, error) {
	roots := make(merged, 0, len(uppers))
	for _, u := range slices.Backward(uppers) {
		roots = append(roots, u.root) // overlayfs ignores an opaque mark on a root
	}
	root := &roots[0].Node
	for _, u := range slices.Backward(uppers) {
		if u.rootTimed {
			root.ModTime, root.ModNsec = u.root.ModTime, u.root.ModNsec
			break
		}
	}

	var names []held
	todo := []merged{roots}
	for len(todo) > 0 {
		dirs := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		names = names[:0]
		for rank, d := range dirs {
			for name, in := range d.kids.all() {
				names = append(names, held{name, rank, in})
			}
		}
		if len(dirs) > 1 || !dirs[0].kids.ordered() {
			slices.SortFunc(names, func(a, b held) int {
				if c := strings.Compare(a.name, b.name); c != 0 {
					return c
				}
				return cmp.Compare(a.rank, b.rank)
			})
		}
		for _, d := range dirs {
			d.kids = nil
		}
		var err error
		if todo, err = fill(dirs, names, todo); err != nil {
			return nil, err
		}
	}
	root.Nlink = 1 // merged at least with the container's own upper directory
	return root, checkXattrSpace("/", root)
}

// fill sets the children of the merged directory dirs from names, which are
// sorted, and appends its subdirectories to todo.
func fill(dirs merged, names []held, todo []merged) ([]merged, error) {
	top := &dirs[0].Node
	top.Children = make([]Dirent, 0, len(names))
	subdirs := uint32(0)
	for i := 0; i < len(names); {
		end := i + 1
		for end < len(names) && names[end].name == names[i].name {
			end++
		}
		group := names[i:end]
		i = end
		in := group[0].in
		if in.whiteout() {
			continue
		}
		if err := checkXattrSpace(group[0].name, &in.Node); err != nil {
			return nil, err
		}
		top.Children = append(top.Children, Dirent{group[0].name, &in.Node})
		if !in.dir() {
			continue
		}
		subdirs++
		todo = append(todo, mergeable(group))
	}
	// overlayfs does not count the subdirectories of a merged directory.
	top.Nlink = 1
	if len(dirs) == 1 {
		top.Nlink = 2 + subdirs
	}
	return todo, nil
}

// maxXattrSpace is less than what an EROFS inode can hold. An entry stays below
// it; several of one directory may not.
const maxXattrSpace = 255 << 10

func checkXattrSpace(name string, n *Node) error {
	size := 0
	for _, x := range n.Xattrs {
		size += (4 + len(x.Name) + len(x.Value) + 3) &^ 3
	}
	if size > maxXattrSpace {
		return fmt.Errorf("%w: %q has %d bytes of extended attributes", ErrUnsupported, name, size)
	}
	return nil
}

// mergeable is the directories of a group that are seen through each other.
// The first one is known to be a directory.
func mergeable(group []held) merged {
	n := 1
	for n < len(group) && !group[n-1].in.opaque && group[n].in.dir() {
		n++
	}
	dirs := make(merged, n)
	for i := range dirs {
		dirs[i] = group[i].in
	}
	return dirs
}
