package cache

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Mend is Add for a layer whose index on disk may be damaged: the parts that are
// damaged are written anew. What was fetched stays.
func (s *Store) Mend(x *layer.Index, source string) error {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	encoded := encode(x, enc)
	s.adding.Lock()
	err = s.mend(encoded)
	s.adding.Unlock()
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("layer %s: %w", x.DiffID, err)
	}
	return s.AddEncoded(source, encoded)
}

func (s *Store) mend(x Encoded) error {
	if err := x.DiffID.Validate(); err != nil {
		return err
	}
	dir, err := os.OpenRoot(filepath.Join(s.dir, x.DiffID.Encoded()))
	if os.IsNotExist(err) {
		return errdefs.ErrNotFound
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if raw, err := dir.ReadFile(sourcesFile); err == nil {
		if _, damaged := decodeSources(raw); damaged != nil {
			// The repository that it is mended from is added by the caller.
			if err := removeFile(dir, sourcesFile); err != nil {
				return err
			}
		}
	}
	// Another archive of the image may have other spans: good ones stay, since what
	// was fetched is counted in them.
	here, err := readIndex(dir, x.DiffID)
	if err != nil {
		here = x.Index
		if err := writeFile(dir, spansFile, appendChecksum(x.AppendSpans(nil))); err != nil {
			return err
		}
	}
	if readEntries(dir, here) == nil {
		return nil
	}
	return writeFile(dir, entriesFile, x.Entries)
}

// readIndex reads the span part of a layer's index.
func readIndex(dir *os.Root, diffID digest.Digest) (*layer.Index, error) {
	raw, err := dir.ReadFile(spansFile)
	if os.IsNotExist(err) {
		err = errors.Join(err, errdefs.ErrDataLoss)
	}
	if err != nil {
		return nil, err
	}
	if raw, err = cutChecksum(raw); err != nil {
		return nil, fmt.Errorf("index on disk: %w", err)
	}
	x, err := layer.DecodeSpans(raw)
	if err != nil {
		return nil, fmt.Errorf("index on disk: %w", errors.Join(err, errdefs.ErrDataLoss))
	}
	if x.DiffID != diffID {
		return nil, fmt.Errorf("its directory holds %s: %w", x.DiffID, errdefs.ErrDataLoss)
	}
	return x, nil
}

// maxEntries is how many bytes the entry part of an index has at most.
const maxEntries = 1 << 30

// Entries returns the layer's whole index. It is read from disk each time,
// since it is only needed to build a root.
func (s *Store) Entries(diffID digest.Digest) (*layer.Index, error) {
	l, err := s.Layer(diffID)
	if err != nil {
		return nil, err
	}
	x, err := readIndex(l.dir, diffID)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", diffID, err)
	}
	if err := readEntries(l.dir, x); err != nil {
		return nil, fmt.Errorf("entries of layer %s on disk: %w", diffID, err)
	}
	return x, nil
}

// Files returns the entries of a layer whose spans may be damaged or missing.
// Nothing says then that what they refer to lies within the layer.
func (s *Store) Files(diffID digest.Digest) (*layer.Index, error) {
	x, err := s.Entries(diffID)
	if !errdefs.IsDataLoss(err) {
		return x, err
	}
	dir, derr := os.OpenRoot(filepath.Join(s.dir, diffID.Encoded()))
	if derr != nil {
		return nil, err
	}
	defer dir.Close()
	x = &layer.Index{DiffID: diffID, OutSize: math.MaxInt64}
	if ferr := readEntries(dir, x); ferr != nil {
		return nil, fmt.Errorf("entries of layer %s on disk: %w", diffID, ferr)
	}
	return x, nil
}

// readEntries reads the entry part of a layer's index into x.
func readEntries(dir *os.Root, x *layer.Index) error {
	raw, err := dir.ReadFile(entriesFile)
	if os.IsNotExist(err) {
		err = errors.Join(err, errdefs.ErrDataLoss)
	}
	if err != nil {
		return err
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxEntries))
	if err != nil {
		return err
	}
	defer dec.Close()
	if raw, err = dec.DecodeAll(raw, nil); err == nil {
		err = x.DecodeEntries(raw)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	return nil
}
