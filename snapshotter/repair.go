package snapshotter

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
)

// damaged says whether an error is about what should be on disk and is not.
func damaged(err error) bool { return errdefs.IsDataLoss(err) || errdefs.IsNotFound(err) }

// repair takes the layers' indexes from the image's archive anew, which it looks
// for as at a pull. What was fetched of the layers stays.
func (s *Snapshotter) repair(ctx context.Context, c chain) error {
	logger := log.G(ctx).WithField("image", c.Image)
	if c.Manifest == "" {
		return errors.New("it was pulled by an earlier version; remove the image and pull it again")
	}
	image := discover.Image{Ref: c.Image, Manifest: c.Manifest, Link: c.Link}
	a, release, err := s.finder.Find(ctx, image)
	if err != nil {
		return fmt.Errorf("its archive cannot be fetched again: %w", err)
	}
	defer release()
	if _, err := position(a, discover.Target{Image: image, ChainID: c.ChainID}); err != nil {
		return err
	}
	for i := range c.Layers {
		x, err := a.Layer(i)
		if err == nil {
			place, _ := a.Place(i)
			err = s.layers.Mend(x, place, c.Image)
		}
		if err != nil {
			return err
		}
	}
	logger.Warn("what was damaged on disk was replaced from the image's archive")
	return nil
}

// repaired calls do, and once more after a repair if something is damaged.
func (s *Snapshotter) repaired(ctx context.Context, c chain, do func() error) error {
	err := do()
	if !damaged(err) {
		return err
	}
	log.G(ctx).WithError(err).WithField("image", c.Image).Error("a layer of an image is damaged on disk; see whether the disk fails or somebody writes below the daemon's root")
	if rerr := s.repair(ctx, c); rerr != nil {
		return fmt.Errorf("%w, and it cannot be repaired: %w", err, rerr)
	}
	return do()
}

// repairMounted has containers go on that run on layers which are damaged.
func (s *Snapshotter) repairMounted(ctx context.Context, c chain) error {
	err := s.repaired(ctx, c, func() error {
		for _, diffID := range c.Layers {
			l, err := s.layers.Layer(diffID)
			if err != nil {
				return err
			}
			if !s.mounted.used(diffID) || s.files == nil {
				continue
			}
			if err := s.files.Add(diffID, l); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		log.G(ctx).WithError(err).WithField("image", c.Image).Error("containers of an image cannot read all of it")
	}
	return err
}
