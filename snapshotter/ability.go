package snapshotter

import (
	"context"
	"errors"
	"sync"

	"github.com/containerd/log"

	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// ability is what roots this machine can mount. It is found out once, at the
// start, unless the disk is full then: that says nothing about the machine.
type ability struct {
	try func(context.Context) (root.Ability, error) // immutable

	mu  sync.Mutex // guards the fields below
	can root.Ability
	err error // why there are no lazy roots
}

// known returns what was found out.
func (a *ability) known() (root.Ability, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.can, a.err
}

// now returns what was found out, and tries again if a full disk was in the way.
func (a *ability) now(ctx context.Context) (root.Ability, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if errors.Is(a.err, root.ErrFull) {
		a.findLocked(ctx)
	}
	return a.can, a.err
}

// find finds it out for the first time.
func (a *ability) find(ctx context.Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.findLocked(ctx)
}

func (a *ability) findLocked(ctx context.Context) {
	before := a.err
	a.can, a.err = a.try(context.WithoutCancel(ctx)) // what comes of it is for others, too
	switch {
	case a.err == nil:
		a.report(ctx)
	case !errors.Is(a.err, root.ErrFull):
		log.G(ctx).WithError(a.err).Warn("this machine cannot mount lazy roots; all images are unpacked")
	case before == nil:
		log.G(ctx).WithError(a.err).Warn("lazy roots cannot be mounted until there is room on the disk")
	}
}

// report logs what the machine can do.
func (a *ability) report(ctx context.Context) {
	log.G(ctx).WithField("mode", a.can.Mode).Info("this machine can mount lazy roots")
	for what, err := range map[string]error{
		"containers in containers may fail on lazy roots":             a.can.Nested,
		"containers with user namespaces cannot run from lazy images": a.can.Remap,
	} {
		if err != nil {
			log.G(ctx).WithError(err).Warn(what)
		}
	}
}
