package cache

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Mend is Add for a layer whose index on disk may be damaged: the parts that are
// damaged are written anew. What was fetched stays. place is where the windows are if
// x lacks them.
func (s *Store) Mend(x *layer.Index, place archive.Place, source string) error {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	encoded := encode(x, enc)
	encoded.Place = place
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
	here, err := readSpans(dir, x.DiffID)
	if err != nil {
		here = x.Index
		if err := s.mendSpans(dir, x); err != nil {
			return err
		}
	}
	if readEntries(dir, here) == nil {
		return nil
	}
	return writeFile(dir, entriesFile, x.Entries)
}

// mendSpans writes anew what tells where to read. The old points go first, since they
// may be of another index; AddEncoded brings those of x.
func (s *Store) mendSpans(dir *os.Root, x Encoded) error {
	if err := removeFile(dir, pointsFile); err != nil {
		return err
	}
	s.mu.Lock()
	l := s.layers[x.DiffID]
	s.mu.Unlock()
	if l != nil {
		l.mu.Lock()
		l.located = located{}
		l.mu.Unlock()
	}
	return writeFile(dir, spansFile, appendChecksum(x.AppendSpans(nil)))
}

// readIndex reads a layer's index without its entries, and where its windows are. Damage
// of the seek points in groups is no reason not to read: there are others.
func readIndex(ctx context.Context, dir *os.Root, diffID digest.Digest) (*layer.Index, located, error) {
	x, err := readSpans(dir, diffID)
	if err != nil {
		return nil, located{}, err
	}
	at, err := readPoints(dir, x)
	if errdefs.IsDataLoss(err) {
		log.G(ctx).WithError(err).WithField("diffID", diffID).
			Error("a layer's seek points were damaged on disk, and more of it is fetched until an image with it is pulled again; see whether the disk fails")
		err = nil
	}
	return x, at, err
}

// readSpans reads the span part of a layer's index.
func readSpans(dir *os.Root, diffID digest.Digest) (*layer.Index, error) {
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

// Entries returns the layer's index with its entries, but without the seek points whose
// windows may not be here. It is read from disk each time, since it is only needed to
// build a root.
func (s *Store) Entries(diffID digest.Digest) (*layer.Index, error) {
	l, err := s.Layer(diffID)
	if err != nil {
		return nil, err
	}
	x, err := readSpans(l.dir, diffID)
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
