// Package root builds and mounts the merged roots that containers stand on.
//
// A root is an EROFS metadata image of a stack of layers, whose devices are
// the layers' files: the kernel answers everything but file contents by
// itself. Where the kernel cannot open files as devices, they become loop
// devices; where it has no EROFS that will do, the whole root is served over
// FUSE (package treefs). Which of these ways works is not asked of the
// kernel's version but tried (Choose).
//
// In each way, the container's root is a directory inside the mount. Containerd
// makes idmapped copies of the mount that a lower directory lies in, and some
// versions do not follow mounts below it.
//
// A root can outlive the process that mounted it: EROFS needs only that somebody
// goes on serving the layers' files, mode FUSE is resumed (Root.Resume). So that
// a process that is killed while it mounts ends at once, it has another one
// mount for it (Helper).
//
// The package knows nothing of snapshots and does not fetch.
package root

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/erofs"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/snapshotter/fuseconn"
	"github.com/beam-cloud/containerd-clip/snapshotter/treefs"
)

// Mode is a way to mount roots.
type Mode string

// The modes, in the order in which Auto tries them.
const (
	Auto Mode = "auto" // the first that works
	File Mode = "file" // EROFS on files: Linux 6.12
	Loop Mode = "loop" // EROFS on loop devices: Linux 6.4
	FUSE Mode = "fuse" // no EROFS
)

// ParseMode returns the mode that a configuration names.
func ParseMode(name string) (Mode, error) {
	switch m := Mode(name); m {
	case Auto, File, Loop, FUSE:
		return m, nil
	}
	return "", fmt.Errorf("mount mode %q is none of %s, %s, %s, %s", name, Auto, File, Loop, FUSE)
}

// Root is a root to be mounted.
type Root struct {
	Dir     string // a directory of its own; it holds the metadata image and the mount point
	Layers  []Layer
	Indexes func() ([]*layer.Index, error) // of Layers, with entries; asked for only if they are needed
	Brief   bool                           // in mode FUSE it ends with the process
	Session *fuseconn.Session              // keeps a root of mode FUSE for the next process; may be nil
	Helper  Helper                         // mounts in the other modes
}

// Layer is where one layer's uncompressed stream is, the lowest layer first.
type Layer struct {
	// Device is the path of a file with the stream, filled up with zeros to a
	// whole block of 512 bytes. Modes File and Loop open it.
	Device string
	Stream treefs.Layer // mode FUSE reads it
}

// Path is the container's root, once r is mounted.
func (r Root) Path() string { return filepath.Join(r.target(), erofs.RootDir) }

// Image is the metadata image. Mode FUSE has none.
func (r Root) Image() string  { return filepath.Join(r.Dir, "image") }
func (r Root) target() string { return filepath.Join(r.Dir, "mnt") }

// BuildMerged does what can be done before Mount, unless it is done, for whoever
// has merged r's layers already. Their entries are not looked at. ctx carries the
// logger and nothing else.
func (r Root) BuildMerged(ctx context.Context, m Mode, layers []*layer.Index, merged *tree.Node) error {
	return r.build(ctx, m, func() ([]*layer.Index, *tree.Node, error) { return layers, merged, nil })
}

func (r Root) build(ctx context.Context, m Mode, merge func() ([]*layer.Index, *tree.Node, error)) error {
	for _, dir := range []string{r.Dir, r.target()} {
		if err := os.Mkdir(dir, 0o700); err != nil && !os.IsExist(err) {
			return err
		}
	}
	if m == FUSE {
		return nil
	}
	err := proven(r.Image())
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		log.G(ctx).WithError(err).WithField("path", r.Image()).Error("a metadata image was damaged on disk and is built again; see whether the disk fails or somebody writes below roots")
	}
	layers, merged, err := merge()
	if err != nil {
		return err
	}
	return writeImage(r.Image(), layers, merged)
}

// merge stacks r's layers.
func (r Root) merge() ([]*layer.Index, *tree.Node, error) {
	layers, err := r.Indexes()
	if err != nil {
		return nil, nil, err
	}
	merged, err := tree.Merge(layers)
	return layers, merged, err
}

// Mount builds and mounts r. Nothing is left mounted if it fails.
func (r Root) Mount(ctx context.Context, m Mode) error {
	if err := r.build(ctx, m, r.merge); err != nil {
		return err
	}
	if m == FUSE {
		return r.mountTree(ctx)
	}
	devices := make([]string, len(r.Layers))
	for i, l := range r.Layers {
		devices[i] = l.Device
	}
	return r.Helper.mount(m, r.Image(), r.target(), devices)
}

func (r Root) mountTree(ctx context.Context) error {
	merged, streams, err := r.tree()
	if err != nil {
		return err
	}
	return treefs.Mount(ctx, r.target(), merged, streams, r.keep())
}

// Resume goes on serving r, which an earlier process mounted in mode FUSE.
// It returns errdefs.ErrNotFound if nobody can.
func (r Root) Resume(ctx context.Context) error {
	merged, streams, err := r.tree()
	if err != nil {
		return err
	}
	return treefs.Resume(ctx, merged, streams, r.keep())
}

// ResumeUnknown is Resume while nobody knows what is in r. Everything there is an
// input/output error until know has been called, without an error, for the root
// that it is.
func (r Root) ResumeUnknown(ctx context.Context) (know func(Root) error, err error) {
	serve, err := treefs.ResumeUnknown(ctx, r.keep())
	return func(r Root) error {
		merged, streams, err := r.tree()
		if err != nil {
			return err
		}
		return serve(merged, streams)
	}, err
}

// tree returns what mode FUSE serves.
func (r Root) tree() (*tree.Node, []treefs.Layer, error) {
	_, merged, err := r.merge()
	if err != nil {
		return nil, nil, err
	}
	streams := make([]treefs.Layer, len(r.Layers))
	for i, l := range r.Layers {
		streams[i] = l.Stream
	}
	return merged, streams, nil
}

// keep names the connection of a root of mode FUSE. The number changes when
// requests no longer mean the same.
func (r Root) keep() treefs.Keep {
	if r.Brief {
		return treefs.Keep{Session: r.Session}
	}
	return treefs.Keep{Session: r.Session, Name: "tree-1-" + filepath.Base(r.Dir)}
}

// Unmount unmounts r. A root that somebody still uses disappears from the tree
// of mounts and ends with its last use. It is no error if r is not mounted.
func (r Root) Unmount() error {
	busy, err := unmount(r.target())
	if err == nil && !busy {
		r.Session.Wait(r.keep().Name, endTimeout)
	}
	return err
}

// endTimeout is how long the connection of an unmounted root may take to end.
const endTimeout = 2 * time.Second

// Unmount is Root.Unmount for a mount point.
func Unmount(target string) error {
	_, err := unmount(target)
	return err
}

func unmount(target string) (busy bool, err error) {
	err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		busy, err = true, unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return busy, nil
	}
	return busy, err
}
