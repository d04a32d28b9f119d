package cache

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Incoming keeps the uncompressed stream of a layer that somebody reads in
// order to index it, so that it need not be fetched again when the layer is
// added. It has no name until then: a crash leaves nothing behind.
//
// Like a fill it displaces nothing: where there is no room the stream is not
// kept. It is for one goroutine at a time.
type Incoming struct {
	store *Store
	file  *os.File // nil once it is given up, or the store has it
	size  int64
}

// Receive returns what keeps the next stream. The caller closes it, which lets
// go of a stream that no Add has asked for.
func (s *Store) Receive() *Incoming {
	in := &Incoming{store: s}
	fd, err := unix.Open(s.dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		in.giveUp(fmt.Errorf("file without a name in %s: %w", s.dir, err))
		return in
	}
	in.file = os.NewFile(uintptr(fd), "incoming layer")
	return in
}

// Write implements io.Writer. It always succeeds: what cannot be kept is
// fetched later, as it is for every other layer.
func (in *Incoming) Write(p []byte) (int, error) {
	if in.file == nil {
		return len(p), nil
	}
	if !in.store.reserve(int64(len(p)), true) {
		in.giveUp(ErrFull)
		return len(p), nil
	}
	in.size += int64(len(p))
	if _, err := in.file.Write(p); err != nil {
		in.giveUp(err)
	}
	return len(p), nil
}

// Done says that the whole stream of the layer diffID was written: Add takes it.
func (in *Incoming) Done(diffID digest.Digest) {
	if in.file == nil {
		return
	}
	s := in.store
	if _, err := s.Layer(diffID); err == nil {
		in.Close() // it has what is there, and fetches the rest when it is read
		return
	}
	s.mu.Lock()
	old := s.incoming[diffID]
	s.incoming[diffID] = in
	s.mu.Unlock()
	if old != nil {
		old.Close()
	}
}

// Close lets go of the stream, unless a layer has it. Closing again does nothing.
func (in *Incoming) Close() {
	s := in.store
	s.mu.Lock()
	for diffID, other := range s.incoming {
		if other == in {
			delete(s.incoming, diffID)
		}
	}
	file := in.file
	in.file = nil
	s.mu.Unlock()
	if file != nil {
		s.used.Add(-in.size)
		file.Close()
	}
}

func (in *Incoming) giveUp(why error) {
	log.G(in.store.life).WithError(why).Info("a layer that is being indexed is not kept; what is read of it is fetched again")
	in.Close()
}

// takeIncoming makes the stream that arrived for the layer x, if one did, the
// file data of dir, and returns how many bytes the store counts for it. The
// caller holds s.adding.
func (s *Store) takeIncoming(dir string, x *layer.Index) (size int64) {
	s.mu.Lock()
	in := s.incoming[x.DiffID]
	delete(s.incoming, x.DiffID)
	var file *os.File
	if in != nil {
		file, in.file = in.file, nil
	}
	s.mu.Unlock()
	if file == nil {
		return 0
	}
	defer file.Close()
	err := file.Truncate(blocksOf(in.size))
	if in.size != int64(x.OutSize) {
		err = fmt.Errorf("it has %d bytes, the index says %d", in.size, x.OutSize)
	}
	if err == nil {
		err = control(file, func(fd int) error { // open(2) has this way to give such a file a name
			return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, filepath.Join(dir, dataFile), unix.AT_SYMLINK_FOLLOW)
		})
	}
	if err != nil {
		s.used.Add(-in.size)
		log.G(s.life).WithError(err).WithField("diffID", x.DiffID).Warn("a layer that was read to be indexed cannot be kept; what is read of it is fetched again")
		return 0
	}
	return in.size
}

// markArrived makes what takeIncoming took known. sizes are what it returned for
// each of layers.
func (s *Store) markArrived(layers []Encoded, sizes []int64) error {
	for i, x := range layers {
		if sizes[i] == 0 {
			continue
		}
		l, err := s.Layer(x.DiffID)
		if err != nil {
			return err
		}
		l.arrived(sizes[i])
	}
	return nil
}

// arrived marks all spans as there: data is a stream that takeIncoming took,
// for which size bytes are counted.
func (l *Layer) arrived(size int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for span := range l.spans {
		l.have.set(span)
	}
	l.counted = size
	l.recountLocked()
	l.store.nudge()
}
