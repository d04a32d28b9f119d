package contents

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/beam-cloud/clip/pkg/storage"
	"github.com/containerd/errdefs"
	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// clipFiles lists an archive as CLIP has it.
func (a *Archive) clipFiles() ([]File, reader, error) {
	m, err := a.upstream.Metadata()
	if err != nil {
		return nil, nil, err
	}
	var files []File
	m.Index.Ascend(nil, func(item any) bool {
		n := item.(*common.ClipNode)
		at := n.Attr
		files = append(files, File{
			Path: n.Path, Mode: at.Mode, UID: at.Uid, GID: at.Gid, Size: int64(at.Size),
			Time: time.Unix(int64(at.Mtime), int64(at.Mtimensec)), Target: n.Target,
		})
		return true
	})
	return files, func(ctx context.Context, w io.Writer, path string) error {
		s, err := a.storage(m)
		if err != nil {
			return err
		}
		return errors.Join(copyNode(ctx, w, s, m.Get(path)), s.Cleanup())
	}, nil
}

// storage opens CLIP's own storage for the archive. Credentials are taken as
// CLIP takes them: for buckets from the environment or the SDK's files, for
// registries from the environment or docker's configuration.
func (a *Archive) storage(m *common.ClipArchiveMetadata) (storage.ClipStorageInterface, error) {
	opts := storage.ClipStorageOpts{
		ArchivePath: a.path,
		Metadata:    m,
		Credentials: storage.ClipStorageCredentials{S3: &storage.S3ClipStorageCredentials{}},
	}
	switch info := m.StorageInfo.(type) {
	case common.OCIStorageInfo:
		dir, err := a.cacheDir()
		if err != nil {
			return nil, err
		}
		opts.CachePath = dir
	case common.S3StorageInfo:
		if a.opts.CacheDir != "" {
			file, err := a.cacheFile(info)
			if err != nil {
				return nil, err
			}
			opts.CachePath = file
		}
	}
	s, err := storage.NewClipStorage(opts)
	if err != nil {
		return nil, fmt.Errorf("CLIP's %s storage: %w", a.Kind, err)
	}
	return s, nil
}

// cacheFile returns where CLIP's code may keep the object with the archive's
// data. CLIP takes a file of the object's size for the object, so the name says
// where that is and what the archive has to be in it.
func (a *Archive) cacheFile(info common.S3StorageInfo) (string, error) {
	dir, err := a.cacheDir()
	if err != nil {
		return "", err
	}
	index, err := a.upstream.IndexDigest()
	if err != nil {
		return "", err
	}
	object := digest.FromString(strings.Join([]string{info.Endpoint, info.Region, info.Bucket, info.Key, index.String()}, "\x00"))
	return filepath.Join(dir, object.Encoded()), nil
}

// copyNode reads a file through CLIP's storage.
func copyNode(ctx context.Context, w io.Writer, s storage.ClipStorageInterface, n *common.ClipNode) error {
	size := n.DataLen
	if n.Remote != nil {
		size = n.Remote.ULength
	}
	buf := make([]byte, min(size, 1<<20))
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		got, err := s.ReadFile(n, buf[:min(int64(len(buf)), size-off)], off)
		if err != nil {
			return err
		}
		if got == 0 {
			return fmt.Errorf("it ends after %d of %d bytes: %w", off, size, errdefs.ErrDataLoss)
		}
		if _, err := w.Write(buf[:got]); err != nil {
			return err
		}
		off += int64(got)
	}
	return nil
}

// Mount mounts the archive read-only on dir until the returned function is
// called. An archive with layer indexes has all its metadata there, and its
// layers are fetched in spans; that needs root. All others are served by CLIP's
// own file system. ctx carries the logger and nothing else.
func (a *Archive) Mount(ctx context.Context, dir string) (unmount func() error, err error) {
	if a.indexed != nil {
		unmount, err = a.mountIndexed(ctx, dir)
	} else {
		unmount, err = a.mountClip(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("archive %s: %w", a.path, err)
	}
	return unmount, nil
}

func (a *Archive) mountClip(dir string) (func() error, error) {
	m, err := a.upstream.Metadata()
	if err != nil {
		return nil, err
	}
	s, err := a.storage(m)
	if err != nil {
		return nil, err
	}
	top, err := clipRoot(s)
	if err != nil {
		return nil, errors.Join(err, s.Cleanup())
	}
	// As CLIP mounts, but for the time that the kernel may remember: nothing changes here.
	timeout := time.Hour
	server, err := fuse.NewServer(fs.NewNodeFS(top, &fs.Options{AttrTimeout: &timeout, EntryTimeout: &timeout}), dir, &fuse.MountOptions{
		FsName: a.path, Name: "clip", Options: []string{"ro"}, AllowOther: unix.Geteuid() == 0,
		MaxBackground: 512, DisableXAttrs: true, EnableSymlinkCaching: true, RememberInodes: true, MaxReadAhead: 128 << 10,
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mounting on %s: %w", dir, err), s.Cleanup())
	}
	go server.Serve()
	unmount := func() error {
		if server.Unmount() == nil {
			server.Wait()
			return s.Cleanup()
		}
		return errors.Join(detach(dir), s.Cleanup()) // somebody still uses it
	}
	if err := server.WaitMount(); err != nil {
		return nil, errors.Join(err, unmount())
	}
	return unmount, nil
}

func clipRoot(s storage.ClipStorageInterface) (fs.InodeEmbedder, error) {
	files, err := clip.NewFileSystem(s, clip.ClipFileSystemOpts{})
	if err != nil {
		return nil, err
	}
	return files.Root()
}
