package contents

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/snapshotter/cache"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// indexes returns all layer indexes of an archive that has them.
func (a *Archive) indexes() ([]*layer.Index, error) {
	layers := make([]*layer.Index, len(a.indexed.DiffIDs()))
	for i := range layers {
		if reason := a.indexed.NotLazy(i); reason != "" {
			return nil, fmt.Errorf("its files are not known, since layer %d has no index: %s", i+1, reason)
		}
		var err error
		if layers[i], err = a.indexed.Layer(i); err != nil {
			return nil, err
		}
	}
	return layers, nil
}

// indexedFiles merges the layers of an archive with layer indexes.
func (a *Archive) indexedFiles() ([]File, reader, error) {
	layers, err := a.indexes()
	if err != nil {
		return nil, nil, err
	}
	merged, err := tree.Merge(layers)
	if err != nil {
		return nil, nil, err
	}
	files, nodes := flatten(merged)
	for _, l := range layers {
		l.Entries = nil // they are in nodes
	}
	return files, func(ctx context.Context, w io.Writer, path string) error {
		n := nodes[path]
		return a.copyNode(ctx, w, n, layers[n.Layer])
	}, nil
}

// copyNode writes a regular file, with zeros for its holes.
func (a *Archive) copyNode(ctx context.Context, w io.Writer, n *tree.Node, x *layer.Index) error {
	source := []string{a.indexed.Info().StorageRef}
	fetch := func(ctx context.Context, off, n inflate.In) (io.ReadCloser, error) {
		return a.opts.Fetch.Open(ctx, source, x.Digest, int64(off), int64(n))
	}
	extents := n.Extents()
	if len(extents) == 0 {
		return writeZeros(w, n.Size)
	}
	// The data of all extents is one piece of the stream.
	first, last := extents[0], extents[len(extents)-1]
	sparse := &sparseWriter{w: w, extents: extents}
	if err := x.Copy(ctx, sparse, first.Off, int64(last.Off-first.Off)+last.Len, fetch); err != nil {
		return err
	}
	return writeZeros(w, n.Size-last.End())
}

// sparseWriter puts zeros before and between the extents whose data is written to it.
type sparseWriter struct {
	w       io.Writer
	extents []layer.Extent // the first one lacks what was written of it
	pos     int64          // in the file
}

func (s *sparseWriter) Write(p []byte) (written int, err error) {
	for len(p) > 0 && len(s.extents) > 0 {
		x := &s.extents[0]
		if err := writeZeros(s.w, x.Pos-s.pos); err != nil {
			return written, err
		}
		n, err := s.w.Write(p[:min(int64(len(p)), x.Len)])
		written += n
		if err != nil {
			return written, err
		}
		p = p[n:]
		s.pos = x.Pos + int64(n)
		rest := layer.Extent{Pos: s.pos, Len: x.Len - int64(n)}
		if s.extents = s.extents[1:]; rest.Len > 0 {
			s.extents = append([]layer.Extent{rest}, s.extents...)
		}
	}
	return written, nil
}

func writeZeros(w io.Writer, n int64) error {
	_, err := io.CopyN(w, zeros{}, n)
	return err
}

// zeros never ends.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// flatten lists a tree without recursion: an image may nest directories deep.
func flatten(top *tree.Node) ([]File, map[string]*tree.Node) {
	var files []File
	nodes := map[string]*tree.Node{}
	type item struct {
		path string
		node *tree.Node
	}
	for todo := []item{{"/", top}}; len(todo) > 0; {
		at := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		n := at.node
		files = append(files, File{
			Path: at.path, Mode: n.Mode, UID: n.UID, GID: n.GID, Size: n.Size,
			Time: time.Unix(n.ModTime, int64(n.ModNsec)), Target: n.Target, Rdev: n.Rdev,
		})
		if n.Mode&unix.S_IFMT == unix.S_IFREG {
			nodes[at.path] = n
		}
		prefix := at.path
		if prefix != "/" {
			prefix += "/"
		}
		for _, c := range n.Children {
			todo = append(todo, item{prefix + c.Name, c.Node})
		}
	}
	return files, nodes
}

// mountIndexed serves an archive with layer indexes as the snapshotter does on
// a kernel without EROFS: every byte is fetched when it is read, and verified.
func (a *Archive) mountIndexed(ctx context.Context, dir string) (func() error, error) {
	layers, err := a.indexes()
	if err != nil {
		return nil, err
	}
	work, err := a.cacheDir()
	if err != nil {
		return nil, err
	}
	store, err := cache.Open(ctx, cache.Options{Dir: filepath.Join(work, "layers"), Fetch: a.opts.Fetch})
	if err != nil {
		return nil, err
	}
	r, err := a.rootOf(work, store, layers)
	if err == nil {
		err = r.Mount(ctx, root.FUSE)
	}
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	release := func() error { return errors.Join(r.Unmount(), os.RemoveAll(r.Dir), store.Close()) }
	if err := unix.Mount(r.Path(), dir, "", unix.MS_BIND, ""); err != nil {
		return nil, errors.Join(fmt.Errorf("mounting on %s: %w", dir, err), release())
	}
	return func() error { return errors.Join(detach(dir), release()) }, nil
}

// rootOf describes the root of layers, whose streams are in store.
func (a *Archive) rootOf(work string, store *cache.Store, layers []*layer.Index) (r root.Root, err error) {
	if r.Dir, err = os.MkdirTemp(work, "root-"); err != nil {
		return r, err
	}
	r.Indexes = func() ([]*layer.Index, error) { return layers, nil }
	if err := store.Add(a.indexed.Info().StorageRef, layers...); err != nil {
		return r, err
	}
	for _, x := range layers {
		l, err := store.Layer(x.DiffID)
		if err != nil {
			return r, err
		}
		r.Layers = append(r.Layers, root.Layer{Stream: l})
	}
	return r, nil
}

// detach takes a mount away, and from those who use it when they end.
func detach(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmounting %s: %w", dir, err)
	}
	return nil
}
