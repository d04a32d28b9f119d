package treefs

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/log"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/snapshotter/fuseconn"
)

// Layer is a layer's uncompressed stream. ReadAt is called concurrently; it
// must return in bounded time.
type Layer interface {
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
}

// readFile fills p with the content of a regular file from off on. It is the
// one place that knows where contents lie. p does not reach beyond the end.
func (s *server) readFile(n *tree.Node, p []byte, off int64) error {
	extents := n.Extents()
	at, _ := slices.BinarySearchFunc(extents, off, func(x layer.Extent, off int64) int { return cmp.Compare(x.End(), off+1) })
	for _, x := range extents[at:] {
		if hole := min(x.Pos-off, int64(len(p))); hole > 0 {
			clear(p[:hole])
			p, off = p[hole:], off+hole
		}
		data := p[:min(x.End()-off, int64(len(p)))]
		if len(data) == 0 {
			return nil
		}
		if err := s.readLayer(n.Layer, data, int64(x.Off)+off-x.Pos); err != nil {
			return err
		}
		p, off = p[len(data):], off+int64(len(data))
	}
	clear(p)
	return nil
}

// readLayer fills p from a layer's uncompressed stream.
func (s *server) readLayer(i int, p []byte, off int64) error {
	if i < 0 || i >= len(s.layers) {
		return fmt.Errorf("there is no layer %d", i)
	}
	got, err := s.layers[i].ReadAt(s.ctx, p, off)
	if got == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Read ignores interrupts: what it fetches serves the next reader.
func (s *server) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, status := s.inode(in.NodeId)
	if status != fuse.OK {
		return nil, status
	}
	if n.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fuse.EINVAL
	}
	off := int64(in.Offset)
	if off < 0 || off >= n.Size {
		return fuseconn.Filled(nil), fuse.OK
	}
	buf = buf[:min(int64(in.Size), int64(len(buf)), n.Size-off)]
	if err := s.readFile(n.Node, buf, off); err != nil {
		log.G(s.ctx).WithError(err).WithField("off", in.Offset).WithField("len", in.Size).Error("reading a layer failed")
		return nil, fuse.EIO
	}
	return fuseconn.Filled(buf), fuse.OK
}
