package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Device returns the file of a layer that is complete, which the kernel can
// use as a device: the uncompressed stream, filled up with zeros to a whole
// block. Until release is called, and after that for as long as anyone has the
// file open, no hole is punched in it. The error is errdefs.ErrNotFound if the
// layer is not complete.
func (s *Store) Device(diffID digest.Digest) (path string, release func(), err error) {
	l, err := s.Layer(diffID)
	if err != nil {
		return "", nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.complete {
		return "", nil, fmt.Errorf("layer %s is not complete: %w", diffID, errdefs.ErrNotFound)
	}
	l.devices++
	l.used = time.Now()
	return filepath.Join(s.dir, diffID.Encoded(), dataFile), func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.devices--
	}, nil
}

// finish makes the layer complete if all of it is recorded and matches the
// diff ID.
func (l *Layer) finish() error {
	if ready, _ := l.readyToFinish(); !ready {
		return nil
	}
	for span := range l.spans { // a part that is damaged need not cost the whole
		if err := l.prove(span); err != nil || l.store.life.Err() != nil {
			return err
		}
	}
	ready, punches := l.readyToFinish()
	if !ready {
		return nil
	}
	proof, err := l.settled()
	if err != nil {
		return err
	}
	sum, err := l.readBack(l.store.life)
	if err != nil {
		if l.store.life.Err() != nil {
			return nil
		}
		return fmt.Errorf("reading it back: %w", err)
	}
	l.recording.Lock()
	defer l.recording.Unlock()
	l.mu.Lock()
	ready = l.punches == punches && !l.removed
	l.mu.Unlock()
	if !ready {
		return nil
	}
	if sum != l.head.DiffID {
		return l.distrust(sum)
	}
	if err := writeFile(l.dir, completeFile, []byte(proof)); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.complete, l.unproven = true, nil
	log.G(l.store.life).WithField("diffID", l.head.DiffID).Debug("the layer is complete")
	return nil
}

// readBack returns the digest of what data holds.
func (l *Layer) readBack(ctx context.Context) (digest.Digest, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	r := io.NewSectionReader(l.data, 0, l.Size())
	for {
		n, err := r.Read(buf)
		h.Write(buf[:n])
		if errors.Is(err, io.EOF) {
			return digest.NewDigest(digest.SHA256, h), nil
		}
		if err != nil {
			return "", err
		}
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
	}
}

// readyToFinish says whether all of a layer is here that is not complete, and
// how often spans were given up before.
func (l *Layer) readyToFinish() (ready bool, punches int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.complete && !l.distrusted && !l.removed && l.recorded.count() == l.spans && l.allHereLocked(), l.punches
}

// settled makes data durable with its times and returns its fingerprint.
func (l *Layer) settled() (string, error) {
	if err := control(l.data, unix.Fsync); err != nil {
		return "", err
	}
	info, err := l.data.Stat()
	if err != nil {
		return "", err
	}
	return fingerprint(info), nil
}

// fingerprint is what changes when a file is written to, whoever does it.
func fingerprint(info fs.FileInfo) string {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%d %d.%09d\n", st.Size, st.Ctim.Sec, st.Ctim.Nsec)
}

// unprovenLocked says whether data holds a span that an earlier process fetched
// and nobody checked since. The caller holds l.mu.
func (l *Layer) unprovenLocked(span int) bool { return l.unproven != nil && l.unproven.get(span) }

// prove checks a span that an earlier process fetched before it is read for the
// first time. One that is damaged counts as missing from then on.
func (l *Layer) prove(span int) error {
	l.punching.RLock()
	defer l.punching.RUnlock()
	l.mu.Lock()
	if !l.unprovenLocked(span) || !l.have.get(span) {
		l.mu.Unlock()
		return nil
	}
	l.mu.Unlock()
	l.prepareIndex()
	l.mu.Lock()
	x, err := l.indexLocked()
	l.mu.Unlock()
	if err != nil {
		return err
	}
	pooled := spanBuffers.Get().(*[]byte)
	defer spanBuffers.Put(pooled)
	start, end := l.spanRange(span)
	*pooled = slices.Grow((*pooled)[:0], int(x.SpanSize))
	buf := (*pooled)[:end-start]
	if _, err = l.data.ReadAt(buf, int64(start)); err == nil {
		err = x.VerifySpan(span, buf)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.unprovenLocked(span) {
		return nil // somebody else was quicker
	}
	l.unproven.clear(span)
	if err != nil {
		log.G(l.store.life).WithError(err).WithField("diffID", l.head.DiffID).WithField("span", span).
			Error("a part of a layer was damaged on disk and is fetched again; see whether the disk fails or somebody writes below layers")
		l.have.clear(span)
		l.recorded.clear(span)
		l.punches++
	}
	return nil
}

// distrust forgets everything that data holds: it was right when it was
// written. The caller holds l.recording.
func (l *Layer) distrust(sum digest.Digest) error {
	l.mu.Lock()
	clear(l.have)
	clear(l.recorded)
	l.distrusted = true
	l.store.metrics.wrong.WithLabelValues(wrongLayer).Inc()
	l.punches++
	l.mu.Unlock()
	return errors.Join(
		fmt.Errorf("its file has digest %s; all of it is fetched again when it is read (is the disk failing?): %w", sum, errdefs.ErrDataLoss),
		removeFile(l.dir, haveFile),
	)
}

// unfinish makes sure that data is not a device, now or in future. It returns
// false if it is one. The caller holds l.recording.
func (l *Layer) unfinish() bool {
	l.mu.Lock()
	if l.removed || l.devices > 0 {
		l.mu.Unlock()
		return false
	}
	was := l.complete
	l.complete = false // no new mount uses it from here on
	l.mu.Unlock()
	if !was {
		return true
	}
	err := l.nobodyElse()
	if err == nil {
		err = removeFile(l.dir, completeFile)
	}
	if err != nil {
		l.mu.Lock()
		l.complete = true
		l.mu.Unlock()
	}
	return err == nil
}

// nobodyElse returns an error if data is open elsewhere: as a device of a root
// that may have been mounted by an earlier process and be visible nowhere. The
// kernel grants a write lease only on a file that nobody else has open, see
// fcntl(2).
func (l *Layer) nobodyElse() error {
	return control(l.data, func(fd int) error {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
			return err
		}
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
		return err
	})
}
