package root

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/beam-cloud/containerd-clip/archive/erofs"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// writeImage writes the metadata image of layers, lowest first, to path, and its
// digest beside it.
func writeImage(path string, layers []*layer.Index, merged *tree.Node) (err error) {
	devices := make([]erofs.Device, len(layers))
	for i, x := range layers {
		devices[i] = erofs.Device{Tag: x.DiffID.Encoded(), Size: x.OutSize}
	}
	if err := os.Remove(proofOf(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	h := sha256.New()
	err = replace(path, func(f *os.File) error {
		w := bufio.NewWriterSize(io.MultiWriter(f, h), 1<<20)
		if err := erofs.Write(w, merged, devices); err != nil {
			return err
		}
		if err := w.Flush(); err != nil {
			return err
		}
		return f.Sync()
	})
	if err != nil {
		return err
	}
	// A digest that a power cut takes away costs building the image again.
	return replace(proofOf(path), func(f *os.File) error {
		_, err := fmt.Fprintf(f, "%x\n", h.Sum(nil))
		return err
	})
}

// proofOf is the file with the digest of a metadata image.
func proofOf(image string) string { return image + ".sha256" }

// proven returns an error if the metadata image at path is not what writeImage
// wrote, which is fs.ErrNotExist if there is none.
func proven(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	want, err := os.ReadFile(proofOf(path))
	if err == nil && len(want) == 0 {
		err = fs.ErrNotExist
	}
	if err != nil {
		return err // the process died in between, or was one that wrote none
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if fmt.Sprintf("%x\n", h.Sum(nil)) != string(want) {
		return fmt.Errorf("it does not have the digest %.64q: %w", want, errdefs.ErrDataLoss)
	}
	return nil
}

// replace writes a file, which appears whole or not at all.
func replace(path string, write func(*os.File) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
