package snapshotter

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
)

// mendChains writes anew what is kept of lazy snapshots where that is damaged.
// The labels that a snapshot was prepared with name its chain ID, and that proves
// which layers it has. Where what is on this machine cannot tell, chainNeeded
// asks the image's archive.
func (s *Snapshotter) mendChains(ctx context.Context) error {
	if s.meta.damage != nil {
		return nil
	}
	lazy, err := s.lazyInfos(ctx)
	if err != nil {
		return err
	}
	// A chain may be told from its parent's, which is older.
	for _, id := range slices.SortedFunc(maps.Keys(lazy), older) {
		_, err := s.chain(id)
		if !damaged(err) {
			continue
		}
		c, terr := s.tellChain(lazy[id])
		if terr != nil {
			return terr
		}
		// Without layers, too: it says that the snapshot is no ordinary one.
		if werr := s.writeChain(id, c); werr != nil {
			log.G(ctx).WithError(werr).WithField("id", id).Warn("cannot write what is kept of a lazy snapshot anew")
		}
		if len(c.Layers) > 0 {
			log.G(ctx).WithError(err).WithField("image", c.Image).WithField("id", id).Error("what is kept of a lazy snapshot was damaged on disk and is written anew; see whether the disk fails or somebody writes below the daemon's root")
		}
	}
	return nil
}

// older sorts ids of snapshots, which are numbers that only grow.
func older(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) }

// lazyInfo is the record of a lazy snapshot, and the id of its parent.
type lazyInfo struct {
	snapshots.Info
	parentID string
}

// lazyInfos returns the records of all lazy snapshots by id.
func (s *Snapshotter) lazyInfos(ctx context.Context) (map[string]lazyInfo, error) {
	lazy := map[string]lazyInfo{}
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		names, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		ids := map[string]string{}
		for id, name := range names {
			ids[name] = id
		}
		return storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
			if info.Labels[discover.LabelLazy] == "true" {
				lazy[ids[info.Name]] = lazyInfo{info, ids[info.Parent]}
			}
			return nil
		})
	})
	if errdefs.IsNotFound(err) {
		err = nil // a store in which no snapshot was ever made
	}
	return lazy, err
}

// tellChain returns what is to be kept of a lazy snapshot. It has no layers if
// what is on this machine does not tell them.
func (s *Snapshotter) tellChain(info lazyInfo) (chain, error) {
	target, err := discover.ParseTarget(info.Labels)
	if err != nil {
		return chain{}, fmt.Errorf("the labels of snapshot %s: %w", info.Name, err)
	}
	c := chain{ChainID: target.ChainID, Image: target.Image.Ref, Manifest: target.Image.Manifest, Link: target.Image.Link}
	dirs, err := os.ReadDir(filepath.Join(s.dir, "snapshots"))
	if err != nil {
		return c, err
	}
	for _, dir := range dirs { // another image may stand on the same layers
		other, err := s.chain(dir.Name())
		if err != nil {
			continue
		}
		if i := slices.Index(identity.ChainIDs(slices.Clone(other.Layers)), c.ChainID); i >= 0 {
			c.Layers = other.Layers[:i+1]
			return c, nil
		}
	}
	var below []digest.Digest
	if parent, err := s.chain(info.parentID); err == nil {
		below = parent.Layers
	}
	all, err := s.layers.DiffIDs()
	for _, diffID := range all {
		if layers := append(slices.Clone(below), diffID); identity.ChainID(layers) == c.ChainID {
			c.Layers = layers
		}
	}
	return c, err
}

// writeChain replaces what is kept of the lazy snapshot id.
func (s *Snapshotter) writeChain(id string, c chain) error {
	raw, err := json.Marshal(c)
	if err != nil {
		return err
	}
	dir := filepath.Join(s.dir, "snapshots", id)
	tmp := filepath.Join(dir, ".chain")
	if err := errors.Join(writeSynced(tmp, raw), os.Rename(tmp, filepath.Join(dir, "chain"))); err != nil {
		return err
	}
	return syncFile(dir)
}

// chainNeeded is chain for somebody who is about to read: what is damaged is
// told again, from the image's archive if need be.
func (s *Snapshotter) chainNeeded(ctx context.Context, id string) (chain, error) {
	c, err := s.chain(id)
	if !errdefs.IsDataLoss(err) {
		return c, err
	}
	s.mending.Lock()
	defer s.mending.Unlock()
	if c, err := s.chain(id); err == nil {
		return c, nil // somebody else was quicker
	}
	c, merr := s.mendChain(ctx, id)
	if merr != nil {
		// An archive that is not found must not look like a snapshot that is not lazy.
		return c, fmt.Errorf("%w, and it cannot be repaired: %v; remove the image and pull it again", err, merr)
	}
	log.G(ctx).WithError(err).WithField("image", c.Image).WithField("id", id).Error("what is kept of a lazy snapshot was damaged on disk and is written anew; see whether the disk fails or somebody writes below the daemon's root")
	return c, nil
}

// mendChain writes anew what is kept of the lazy snapshot id.
func (s *Snapshotter) mendChain(ctx context.Context, id string) (chain, error) {
	lazy, err := s.lazyInfos(ctx)
	if err != nil {
		return chain{}, err
	}
	c, err := s.tellChain(lazy[id])
	if err != nil {
		return c, err
	}
	if len(c.Layers) == 0 {
		return s.fetchChain(ctx, id, c)
	}
	return c, s.writeChain(id, c)
}

// fetchChain adds the layers of c, the lazy snapshot id, from the image's archive.
func (s *Snapshotter) fetchChain(ctx context.Context, id string, c chain) (chain, error) {
	image := discover.Image{Ref: c.Image, Manifest: c.Manifest, Link: c.Link}
	a, release, err := s.finder.Find(ctx, image)
	if err != nil {
		return c, fmt.Errorf("its archive cannot be fetched again: %w", err)
	}
	defer release()
	top, err := position(a, discover.Target{Image: image, ChainID: c.ChainID})
	if err != nil {
		return c, err
	}
	is, err := s.merge(a)
	if err != nil {
		return c, err
	}
	c.Layers = a.DiffIDs()[:top+1]
	s.refs.add(id, c.Layers) // before they are there: what nobody uses is removed
	if err = s.addLayers(a, is, c.Image); err == nil {
		err = s.writeChain(id, c)
	}
	if err != nil {
		s.refs.drop(id)
	}
	return c, err
}
