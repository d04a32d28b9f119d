package harness

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

const (
	// labEnv names the environment variable that marks the processes of a lab.
	labEnv = "CLIP_LAB"

	labPattern = "clip-lab-"
	ownerFile  = "owner"
)

// Options says where a lab finds the programs it runs.
type Options struct {
	Parts   string       // directory of containerd, ctr, the shim and the registry
	Product string       // directory of clipctl and containerd-clip-grpc
	Parent  string       // where the lab's directory is made; empty is the system's temporary directory
	Log     func(...any) // receives one line per thing started or stopped; nil is silence
}

// Lab is a directory and what runs in it. NewLab makes one, Close ends it.
type Lab struct {
	Dir string // short, because a socket's path is limited to 107 bytes

	opts Options

	mu      sync.Mutex // guards the fields below
	closers []func(context.Context) error
}

// NewLab makes a lab, and sweeps labs whose owners died.
func NewLab(o Options) (*Lab, error) {
	if o.Parent == "" {
		o.Parent = os.TempDir()
	}
	if o.Log == nil {
		o.Log = func(...any) {}
	}
	if err := SweepStale(o.Parent, o.Log); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(o.Parent, labPattern)
	if err != nil {
		return nil, err
	}
	l := &Lab{Dir: dir, opts: o}
	if err := os.WriteFile(filepath.Join(dir, ownerFile), []byte(thisOwner()), 0o600); err != nil {
		return nil, err
	}
	return l, os.Mkdir(l.Path("home"), 0o700)
}

// Path names a file in the lab.
func (l *Lab) Path(elem ...string) string {
	return filepath.Join(append([]string{l.Dir}, elem...)...)
}

// onClose has f called by Close, before everything that was started earlier is stopped.
func (l *Lab) onClose(f func(context.Context) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closers = append(l.closers, f)
}

// Close stops everything and removes the directory. It returns what could not be undone; a second call does nothing.
func (l *Lab) Close() error {
	l.mu.Lock()
	closers := l.closers
	l.closers = nil
	l.mu.Unlock()

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var errs []error
	for _, f := range slices.Backward(closers) {
		errs = append(errs, f(ctx))
	}
	errs = append(errs, sweep(l.Dir))
	return errors.Join(errs...)
}

// environ is the environment of everything that the lab starts. HOME is the lab's own, so that nobody's registry
// credentials or settings play a part.
func (l *Lab) environ(extra ...string) []string {
	path := l.opts.Parts + ":" + l.opts.Product + ":" + os.Getenv("PATH") + ":/usr/sbin:/sbin"
	env := []string{labEnv + "=" + l.Dir, "HOME=" + l.Path("home"), "PATH=" + path, "LANG=C.UTF-8", "OTEL_TRACES_EXPORTER=none",
		"CLIPCTL_CACHE_DIR=" + l.Path("clipctl-cache")}
	return append(env, extra...)
}
