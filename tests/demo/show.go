package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

var command = []string{"python3", "-c", "import numpy; print(numpy.arange(6).sum())"}

// show is the demo's state from one step to the next.
type show struct {
	lab   *harness.Lab
	image string // file of the image

	registry *harness.Registry
	ref      string
	stored   int64 // bytes in the registry before there was an archive
}

// start is how an image started: from nothing to the first line of output.
type start struct {
	pull, first time.Duration
	requests    harness.Requests
	output      string
}

func (s *show) play(ctx context.Context) error {
	var err error
	if s.registry, err = s.lab.StartRegistry(ctx); err != nil {
		return err
	}
	s.ref = s.registry.Ref("demo/python:1")
	say("Started a private registry at %s", s.registry.Host())
	builder, err := s.build(ctx)
	if err != nil {
		return err
	}
	if err := s.index(ctx, builder); err != nil {
		return err
	}
	lazy, err := s.lazily(ctx)
	if err != nil {
		return err
	}
	full, err := s.fully(ctx)
	if err != nil {
		return err
	}
	if lazy.output != full.output {
		return fmt.Errorf("outputs differ: %q and %q", lazy.output, full.output)
	}
	s.table(lazy, full)
	return nil
}

// build has the image in a containerd store and pushes it as anybody would.
func (s *show) build(ctx context.Context) (*harness.Containerd, error) {
	builder, err := s.lab.StartContainerd(ctx, "builder", nil)
	if err != nil {
		return nil, err
	}
	say("Builder: importing the image and pushing it to the registry, with ctr")
	for _, args := range [][]string{
		{"image", "import", "--no-unpack", s.image},
		{"image", "tag", images.DemoName, s.ref},
		{"image", "push", s.ref},
	} {
		if _, err := builder.Ctr(ctx, args...); err != nil {
			return nil, err
		}
	}
	s.stored, err = s.registry.StoredBytes()
	return builder, err
}

// index shows that indexing needs no registry, and that pushing the archive moves little.
func (s *show) index(ctx context.Context, builder *harness.Containerd) error {
	s.registry.Reset()
	file := s.lab.Path("python.clip")
	say("Builder: clipctl index %s -o python.clip", s.ref)
	result, err := builder.Clipctl(ctx, "index", s.ref, "-o", file)
	if err != nil {
		return err
	}
	quote(result.Stderr + result.Stdout)
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	requests := len(s.registry.Requests())
	say("... %s of archive for %s of image, %d requests to the registry", megabytes(info.Size()), megabytes(s.stored), requests)
	if requests != 0 {
		return fmt.Errorf("indexing made %d requests to the registry:\n%s", requests, s.registry.Requests())
	}
	say("Builder: clipctl index %s --push", s.ref)
	result, err = builder.Clipctl(ctx, "index", s.ref, "--push")
	quote(result.Stderr + result.Stdout)
	return err
}

// lazily starts the image on a worker that has the daemon.
func (s *show) lazily(ctx context.Context) (start, error) {
	daemon, err := s.lab.StartDaemon(ctx, "clip", "")
	if err != nil {
		return start{}, err
	}
	worker, err := s.lab.StartContainerd(ctx, "worker", daemon)
	if err != nil {
		return start{}, err
	}
	say("Worker with containerd-clip-grpc: ctr image pull --snapshotter clip, ctr run --snapshotter clip")
	return s.run(ctx, worker, "clip")
}

// fully starts it on a worker that has not.
func (s *show) fully(ctx context.Context) (start, error) {
	worker, err := s.lab.StartContainerd(ctx, "stock", nil)
	if err != nil {
		return start{}, err
	}
	say("Another, empty worker: the same with overlayfs")
	return s.run(ctx, worker, "overlayfs")
}

func (s *show) run(ctx context.Context, worker *harness.Containerd, snapshotter string) (start, error) {
	s.registry.Reset()
	pull, err := worker.Ctr(ctx, "image", "pull", "--snapshotter", snapshotter, s.ref)
	if err != nil {
		return start{}, err
	}
	run, err := worker.RunContainer(ctx, snapshotter, s.ref, "demo", command...)
	if err != nil {
		return start{}, err
	}
	quote(run.Stdout)
	return start{pull: pull.Took, first: pull.Took + run.First, requests: s.registry.Requests(), output: run.Stdout}, nil
}

func (s *show) table(lazy, full start) {
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\tclip\toverlayfs\t\n")
	fmt.Fprintf(w, "image in the registry\t%s\t%s\t\n", megabytes(s.stored), megabytes(s.stored))
	fmt.Fprintf(w, "fetched\t%s\t%s\t\n", megabytes(lazy.requests.Sent()), megabytes(full.requests.Sent()))
	fmt.Fprintf(w, "requests\t%d\t%d\t\n", len(lazy.requests), len(full.requests))
	fmt.Fprintf(w, "pull\t%s\t%s\t\n", seconds(lazy.pull), seconds(full.pull))
	fmt.Fprintf(w, "pull and run to the first output\t%s\t%s\t\n", seconds(lazy.first), seconds(full.first))
	w.Flush()
	fmt.Println()
}

// quote prints what a program said, indented. ctr's word on the host's cgroup version is no part of the story.
func quote(text string) {
	for line := range strings.Lines(text) {
		if !strings.Contains(line, "DEPRECATION") {
			fmt.Print("    ", strings.TrimRight(line, "\n"), "\n")
		}
	}
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
