package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/beam-cloud/containerd-clip/tests/bench/report"
	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
)

// Bounds wanted, in MiB.
const (
	mostIdle = 80
	mostBusy = 256
)

// idleTime is after how long a daemon that nobody asks anything has given back what it held.
const idleTime = 75 * time.Second

// memory measures the daemon.
func (w *world) memory(ctx context.Context) ([]report.Table, error) {
	t := report.Table{Title: "Memory of the daemon", Header: []string{"", "MiB resident", "wanted"}}
	for _, row := range []struct {
		what string
		run  func(context.Context) (int64, error)
		most float64
	}{
		{"100 mounted roots, idle", w.idle, mostIdle},
		{"every file is read, at most", w.reading, mostBusy},
		{"everything is fetched in the background, at most", w.filling, mostBusy},
	} {
		n, err := row.run(ctx)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", row.what, err)
		}
		testbed.Say("memory, %s: %s MiB", row.what, testbed.Mebibytes(n))
		t.Add(row.what, testbed.Mebibytes(n), report.AtMost(float64(n)/(1<<20), row.most))
	}
	return []report.Table{t}, nil
}

// idle mounts 100 roots: an image of as many layers is one of as many images to the snapshotter.
func (w *world) idle(ctx context.Context) (n int64, err error) {
	hundred, err := w.PublishStacked(ctx, "hundred", 3, 100)
	if err != nil {
		return 0, err
	}
	s, err := w.Open(ctx, testbed.Ours, "")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.Close(ctx, hundred.Ref)) }()
	if _, err := s.Pull(ctx, hundred.Ref); err != nil {
		return 0, err
	}
	img, err := s.Client().GetImage(ctx, hundred.Ref)
	if err != nil {
		return 0, err
	}
	diffIDs, err := img.RootFS(ctx)
	if err != nil {
		return 0, err
	}
	ctx, done, err := s.Client().WithLease(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, done(ctx)) }() // containerd removes the views
	service := s.Client().SnapshotService(testbed.Ours)
	for i, chainID := range identity.ChainIDs(append([]digest.Digest(nil), diffIDs...)) {
		if _, err := service.View(ctx, fmt.Sprint("view-", i), chainID.String()); err != nil {
			return 0, err
		}
	}
	if mounted := len(roots(s)); mounted != len(diffIDs) {
		return 0, fmt.Errorf("%d roots are mounted instead of %d", mounted, len(diffIDs))
	}
	at := s.Daemon.Resident()
	select {
	case <-time.After(idleTime):
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	testbed.Say("%s MiB when the last of 100 roots was mounted, at most %s", testbed.Mebibytes(at), testbed.Mebibytes(s.Daemon.Memory()))
	return s.Daemon.Resident(), nil
}

// reading reads every file of image M.
func (w *world) reading(ctx context.Context) (n int64, err error) {
	s, err := w.Open(ctx, testbed.Ours, "")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.Close(ctx, w.Whole.Ref)) }()
	if _, err := s.Pull(ctx, w.Whole.Ref); err != nil {
		return 0, err
	}
	if _, err := s.Work(ctx, w.Whole.Ref, testbed.Everything); err != nil {
		return 0, err
	}
	return s.Daemon.Memory(), nil
}

// filling has image M completed without being read.
func (w *world) filling(ctx context.Context) (n int64, err error) {
	s, err := w.Open(ctx, testbed.Ours, "[fill]\ndelay = '0s'\n")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.Close(ctx, w.Whole.Ref)) }()
	began := time.Now()
	if _, err := s.Pull(ctx, w.Whole.Ref); err != nil {
		return 0, err
	}
	for {
		complete, err := filepath.Glob(filepath.Join(s.Daemon.Root, "layers", "*", "complete"))
		if err != nil {
			return 0, err
		}
		if len(complete) == 4 {
			break
		}
		if time.Since(began) > 5*time.Minute {
			return 0, errors.New("the image is not complete after 5 minutes")
		}
		time.Sleep(50 * time.Millisecond)
	}
	testbed.Say("complete after %.2f s", time.Since(began).Seconds())
	return s.Daemon.Memory(), nil
}
