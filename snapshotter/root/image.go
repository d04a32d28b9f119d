package root

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

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
func proven(path string) error { return provenBy(path, proofOf(path)) }

// provenBy is proven for a digest that is in the file proof.
func provenBy(path, proof string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	want, err := os.ReadFile(proof)
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

// Mend has a mounted root go on whose metadata image is damaged on disk. The
// kernel has that file open, so it is written over, with what it was mounted with
// or not at all.
func (r Root) Mend(ctx context.Context) error {
	damage := proven(r.Image())
	if damage == nil || errors.Is(damage, fs.ErrNotExist) {
		return nil // or nobody knows
	}
	layers, merged, err := r.merge()
	if err != nil {
		return err
	}
	again := r.Image() + ".again"
	defer os.Remove(again)
	defer os.Remove(proofOf(again))
	if err := writeImage(again, layers, merged); err != nil {
		return err
	}
	if provenBy(r.Image(), proofOf(again)) == nil {
		return os.Rename(proofOf(again), proofOf(r.Image())) // it was the digest
	}
	was, err := os.ReadFile(proofOf(r.Image()))
	if err != nil {
		return err
	}
	is, err := os.ReadFile(proofOf(again))
	if err != nil {
		return err
	}
	if !bytes.Equal(was, is) {
		return fmt.Errorf("metadata image %s: %v, and one that is built now is another", r.Image(), damage)
	}
	if err := overwrite(r.Image(), again); err != nil {
		return err
	}
	log.G(ctx).WithError(damage).WithField("path", r.Image()).Error("the metadata image of a mounted root was damaged on disk and is written anew; restart containers that misread it meanwhile, and see whether the disk fails or somebody writes below roots")
	// What the kernel has learned from it meanwhile goes with everything that it
	// can learn again. Some of what is in use stays.
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o200); err != nil {
		log.G(ctx).WithError(err).Warn("the kernel may remember what it read of a damaged metadata image")
	}
	return nil
}

// overwrite makes the content of file that of from. It stays the same file.
func overwrite(file, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	n, err := io.Copy(dst, src)
	if err == nil {
		err = dst.Truncate(n)
	}
	if err == nil {
		err = dst.Sync()
	}
	return errors.Join(err, dst.Close())
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
