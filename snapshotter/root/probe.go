package root

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive/erofs"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/snapshotter/layerfs"
)

// probeBlock is the whole content of the layer that Probe mounts.
var probeBlock = bytes.Repeat([]byte("clip"), 128)

// probeFile is a layer file that lies in memory.
type probeFile struct{ *bytes.Reader }

func (p probeFile) ReadAt(_ context.Context, b []byte, off int64) (int, error) {
	return p.Reader.ReadAt(b, off)
}

// Probe mounts a root of one file, whose content comes from files, below dir
// and reads it. An error says what this machine cannot do. Nothing stays.
func Probe(ctx context.Context, dir string, files *layerfs.FS) error {
	id := digest.FromBytes(probeBlock)
	if err := files.Add(id, probeFile{bytes.NewReader(probeBlock)}); err != nil {
		return err
	}
	defer files.Remove(id)
	image, target := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	if err := os.Mkdir(target, 0o700); err != nil {
		return err
	}
	x := &layer.Index{DiffID: id, OutSize: 512, Entries: []layer.Entry{{Name: "probe", Type: layer.TypeReg, Mode: 0o600, Size: 512}}}
	if err := Build(image, []*layer.Index{x}); err != nil {
		return err
	}
	if err := Mount(ctx, image, target, []string{files.Path(id)}); err != nil {
		return fmt.Errorf("%w (needs root, Linux 6.12 or newer with EROFS and FUSE, and a state directory that is not on overlayfs or tmpfs)", err)
	}
	got, err := os.ReadFile(filepath.Join(target, erofs.RootDir, "probe"))
	if uerr := Unmount(target); uerr != nil {
		return uerr
	}
	if err != nil {
		return fmt.Errorf("reading from a probe mount: %w", err)
	}
	if !bytes.Equal(got, probeBlock) {
		return fmt.Errorf("a probe mount returned wrong bytes")
	}
	return nil
}
