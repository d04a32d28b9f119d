// Package keeper holds descriptors over the end of the process that uses them.
//
// What is kept has a name and one or more descriptors; nothing else is known
// of it. There are two places:
//
//   - systemd's file descriptor store, in a service that has one
//     (FileDescriptorStoreMax), since systemd 254;
//   - else a process of its own, which the daemon starts and which lives as
//     long as it holds something, in a session and a control group of its own.
//     The daemon talks to it over a socket in a directory that only root can
//     enter, see wire.go.
//
// A process that starts finds what its predecessor kept (Keeper.Names, Take).
// Whether that is still of use is for its user to find out.
//
// The package does not know what the descriptors are.
package keeper

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// Limits of what a keeper takes.
const (
	maxName = 128
	maxFDs  = 8    // of one name
	maxSets = 4096 // names
)

// place is where descriptors outlive the process.
type place interface {
	keep(name string, fds []int) error
	drop(name string) error
	close() error
}

// Keeper is the way to what is kept.
type Keeper struct {
	mu    sync.Mutex // guards the fields below
	place place
	found map[string][]int // kept by an earlier process and not taken yet
	kept  map[string][]int // by this process
}

// Open finds the place for the daemon that works in dir, and what an earlier
// process kept there. command starts a keeper process; it is not used where
// systemd keeps descriptors. ctx carries the logger and nothing else.
func Open(ctx context.Context, dir string, command ...string) (*Keeper, error) {
	k := &Keeper{kept: map[string][]int{}}
	p := &process{dir: dir, command: command}
	if found, store := openSystemd(); store != nil {
		k.place, k.found = store, found
		if err := k.adopt(ctx, p); err != nil {
			return nil, err
		}
		return k, nil
	}
	found, err := p.open(ctx)
	if err != nil {
		return nil, err
	}
	k.place, k.found = p, found
	p.watch(ctx, func() { k.again(ctx, p) })
	return k, nil
}

// adopt gives systemd what a keeper process holds: systemd became new enough to
// have it while containers were running.
func (k *Keeper) adopt(ctx context.Context, p *process) error {
	if err := p.connect(); err != nil {
		return nil // there is none
	}
	defer p.close()
	held, err := p.list()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err // it holds what nobody else has
	}
	for name, fds := range held {
		if k.found[name] != nil {
			closeAll(fds)
			continue
		}
		if err := k.place.keep(name, fds); err != nil {
			return fmt.Errorf("giving systemd %q, which a keeper process holds: %w", name, err)
		}
		k.found[name] = fds
		if err := p.drop(name); err != nil {
			return err
		}
	}
	log.G(ctx).Info("systemd keeps the connections to the kernel from now on")
	return nil
}

// Names lists what an earlier process kept and nobody has taken yet.
func (k *Keeper) Names() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Sorted(maps.Keys(k.found))
}

// Take returns the descriptors that an earlier process kept under name, or
// nil. They stay kept until Drop, before which the caller does not close them.
func (k *Keeper) Take(name string) []int {
	k.mu.Lock()
	defer k.mu.Unlock()
	fds := k.found[name]
	delete(k.found, name)
	if fds != nil {
		k.kept[name] = fds
	}
	return fds
}

// Keep keeps descriptors under a name that is not in use. The caller goes on
// using them, and does not close them before Drop.
func (k *Keeper) Keep(name string, fds ...int) error {
	if name == "" || len(name) > maxName || len(fds) == 0 || len(fds) > maxFDs {
		return fmt.Errorf("keeping %d descriptors under %q: %w", len(fds), name, errdefs.ErrInvalidArgument)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.kept[name] != nil || k.found[name] != nil {
		return fmt.Errorf("keeping %q: %w", name, errdefs.ErrAlreadyExists)
	}
	if err := k.place.keep(name, fds); err != nil {
		return fmt.Errorf("keeping %q: %w", name, err)
	}
	k.kept[name] = slices.Clone(fds)
	return nil
}

// Drop ends the keeping of a name. What was kept by an earlier process and
// not taken is closed; else the descriptors are the caller's to close.
func (k *Keeper) Drop(name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	for _, fd := range k.found[name] {
		errs = append(errs, unix.Close(fd))
	}
	delete(k.found, name)
	delete(k.kept, name)
	if err := k.place.drop(name); err != nil {
		errs = append(errs, fmt.Errorf("dropping %q: %w", name, err))
	}
	return errors.Join(errs...)
}

// Close ends the way to what is kept, which stays kept.
func (k *Keeper) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	for _, fds := range k.found {
		for _, fd := range fds {
			errs = append(errs, unix.Close(fd))
		}
	}
	clear(k.found)
	clear(k.kept)
	return errors.Join(append(errs, k.place.close())...)
}
