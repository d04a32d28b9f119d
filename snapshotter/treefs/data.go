package treefs

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/log"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

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
	if len(p) == 0 {
		return nil
	}
	if n.Layer < 0 || n.Layer >= len(s.layers) {
		return fmt.Errorf("there is no layer %d", n.Layer)
	}
	got, err := s.layers[n.Layer].ReadAt(s.ctx, p, int64(n.Off)+off)
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
	n, ok := s.inode(in.NodeId)
	if !ok || n.Mode&unix.S_IFMT != unix.S_IFREG {
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
