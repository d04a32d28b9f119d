package contents

import (
	"context"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// indexedFiles merges the layers of an archive with layer indexes.
func (a *Archive) indexedFiles() ([]File, reader, error) {
	layers := make([]*layer.Index, len(a.indexed.DiffIDs()))
	for i := range layers {
		if reason := a.indexed.NotLazy(i); reason != "" {
			return nil, nil, fmt.Errorf("its files are not known, since layer %d has no index: %s", i+1, reason)
		}
		var err error
		if layers[i], err = a.indexed.Layer(i); err != nil {
			return nil, nil, err
		}
	}
	root, err := tree.Merge(layers)
	if err != nil {
		return nil, nil, err
	}
	files, nodes := flatten(root)
	for _, l := range layers {
		l.Entries = nil // they are in nodes
	}
	return files, func(ctx context.Context, w io.Writer, path string) error {
		n := nodes[path]
		x := layers[n.Layer]
		source := []string{a.indexed.Info().StorageRef}
		return x.Copy(ctx, w, n.Off, n.Size, func(ctx context.Context, off, n inflate.In) (io.ReadCloser, error) {
			return a.opts.Fetch.Open(ctx, source, x.Digest, int64(off), int64(n))
		})
	}, nil
}

// flatten lists a tree without recursion: an image may nest directories deep.
func flatten(root *tree.Node) ([]File, map[string]*tree.Node) {
	var files []File
	nodes := map[string]*tree.Node{}
	type item struct {
		path string
		node *tree.Node
	}
	for todo := []item{{"/", root}}; len(todo) > 0; {
		at := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		n := at.node
		f := File{
			Path: at.path, Mode: n.Mode, UID: n.UID, GID: n.GID, Size: n.Size,
			Time: time.Unix(n.ModTime, int64(n.ModNsec)), Target: n.Target, Rdev: n.Rdev,
		}
		files = append(files, f)
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
