package testbed

import (
	"context"
	"time"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
)

// Work is what a container does.
type Work struct {
	Name    string
	Command []string
	AtEnd   bool // the clock runs until it has ended, not until its first output
}

const heavyImport = "import numpy, scipy.stats, pandas, sklearn.linear_model, matplotlib.pyplot"

// What containers do.
var (
	Echo       = Work{Name: "`echo`", Command: []string{"/bin/echo", "done"}}
	Numpy      = Work{Name: "`import numpy`", Command: python("import numpy")}
	Heavy      = Work{Name: "heavy import", Command: python(heavyImport)}
	Everything = Work{Name: "every file", Command: []string{"sh", "-c", "tar cf - --one-file-system -C / . | wc -c"}, AtEnd: true}

	Works = []Work{Echo, Numpy, Heavy, Everything}
)

func python(script string) []string {
	return []string{"env", "MPLCONFIGDIR=/tmp", "python3", "-c", script + "; print('done', flush=True)"}
}

// Start is a run and the pull before it.
type Start struct {
	Sample
	Pull float64 // seconds
}

// Work does a piece of work and returns how long that took.
func (s *Site) Work(ctx context.Context, ref string, work Work) (time.Duration, error) {
	result, err := s.Run(ctx, ref, work.Command...)
	return work.took(result), err
}

func (work Work) took(r harness.Result) time.Duration {
	if work.AtEnd {
		return r.Took
	}
	return r.First
}

// Cold pulls an image over a link to a site that has nothing yet, and does a piece of work.
func (s *Site) Cold(ctx context.Context, l Link, ref string, work Work) (Start, error) {
	s.world.Registry.Shape(l.Link)
	m := s.world.measure()
	pull, err := s.Pull(ctx, ref)
	if err != nil {
		return Start{}, err
	}
	took, err := s.Work(ctx, ref, work)
	if err != nil {
		return Start{}, err
	}
	got := Start{m.at((pull.Took + took).Seconds()), pull.Took.Seconds()}
	Say("%s, %s, %s: %.2f s after a pull of %.2f s, %d requests, %.1f MB", work.Name, l.Name, s.Snapshotter, got.Seconds, got.Pull, got.Requests, float64(got.Bytes)/1e6)
	return got, nil
}

// ColdAll pulls an image over a link to a site that has nothing yet, and does several pieces of work one after the
// other. Each is charged with the pull.
func (s *Site) ColdAll(ctx context.Context, l Link, ref string, works []Work) (all []Start, err error) {
	s.world.Registry.Shape(l.Link)
	m := s.world.measure()
	pull, err := s.Pull(ctx, ref)
	if err != nil {
		return nil, err
	}
	pulled := m.at(pull.Took.Seconds())
	for _, work := range works {
		took, err := s.Work(ctx, ref, work)
		if err != nil {
			return nil, err
		}
		got := Start{pulled, pull.Took.Seconds()}
		got.Seconds += took.Seconds()
		Say("%s, %s, %s: %.2f s after a pull of %.2f s", work.Name, l.Name, s.Snapshotter, got.Seconds, got.Pull)
		all = append(all, got)
	}
	return all, nil
}

// Pulled pulls an image over a link to a site that has nothing yet.
func (s *Site) Pulled(ctx context.Context, l Link, ref string) (Sample, error) {
	s.world.Registry.Shape(l.Link)
	m := s.world.measure()
	pull, err := s.Pull(ctx, ref)
	if err != nil {
		return Sample{}, err
	}
	got := m.at(pull.Took.Seconds())
	Say("pull of %s, %s, %s: %.2f s, %d requests, %d kB", ref, l.Name, s.Snapshotter, got.Seconds, got.Requests, got.Bytes/1000)
	return got, nil
}
