package snapshotter

import (
	"errors"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// stack is the layers of an image that can be read lazily together with all below.
type stack struct {
	layers []*layer.Index // with entries, without spans and seek points
	root   *tree.Node
	ahead  *rootAhead // nil if none is being built
}

// merging is a stack that is being made while the rest of its archive comes.
type merging struct {
	done chan struct{}
	is   *stack // valid after done
	err  error  // valid after done
}

// mergeEarly begins to merge the layers of an archive that is still coming, and to
// build their root. The archive is not closed before forget has returned, which
// waits for the merge, and for the root if nobody has claimed it.
func (s *Snapshotter) mergeEarly(a *archive.Archive) (forget func()) {
	m, ahead := &merging{done: make(chan struct{})}, newRootAhead()
	s.mergeMu.Lock()
	s.early[a] = m
	s.mergeMu.Unlock()
	go func() {
		defer close(ahead.done)
		m.is, m.err = s.mergeNow(a)
		if m.err != nil || len(m.is.layers) < len(a.DiffIDs()) {
			close(m.done)
			return
		}
		m.is.ahead = ahead
		close(m.done)
		s.buildEarly(ahead, m.is, a.Info().StorageRef)
	}()
	done := m.done // and not m: who came for the stack is through with it long before
	return func() {
		s.mergeMu.Lock()
		delete(s.early, a)
		s.mergeMu.Unlock()
		<-done
		if ahead.claim() {
			ahead.remove()
		}
	}
}

// merge makes sure that the layers of an image make a root: an image that
// containerd would refuse must be refused before any of it is committed, and
// for all of its layers.
func (s *Snapshotter) merge(a *archive.Archive) (*stack, error) {
	const most = 256
	image := a.Info().Descriptor.Digest
	s.mergeMu.Lock()
	m, err := s.early[a], s.refused[image]
	delete(s.early, a) // it is large, and who asks again can wait
	s.mergeMu.Unlock()
	if err != nil {
		return nil, err
	}
	var is *stack
	if m != nil {
		<-m.done
		is, err = m.is, m.err
	} else {
		is, err = s.mergeNow(a)
	}
	if errors.Is(err, tree.ErrInvalid) || errors.Is(err, tree.ErrUnsupported) { // what else went wrong may go right the next time
		s.mergeMu.Lock()
		defer s.mergeMu.Unlock()
		if len(s.refused) >= most {
			clear(s.refused)
		}
		s.refused[image] = err
	}
	return is, err
}

// mergeNow merges the layers of one image at a time: hostile ones take much memory.
func (s *Snapshotter) mergeNow(a *archive.Archive) (*stack, error) {
	s.merging.Lock()
	defer s.merging.Unlock()
	is := new(stack)
	var total tree.Total
	for i := range a.DiffIDs() {
		if a.NotLazy(i) != "" {
			break
		}
		x, err := a.Files(i)
		if err == nil {
			err = total.Add(x)
		}
		if err != nil {
			return nil, err
		}
		is.layers = append(is.layers, x)
	}
	merged, err := tree.Merge(is.layers)
	if err != nil {
		return nil, err
	}
	is.root = merged
	return is, nil
}
