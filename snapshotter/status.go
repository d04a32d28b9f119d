package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// Status implements control.Service.
func (s *Snapshotter) Status(ctx context.Context) (control.Status, error) {
	st := control.Status{Version: control.Version, Daemon: s.daemon()}
	st.Cache.Used, st.Cache.Max, st.Cache.InMemory = s.layers.Space()
	var err error
	if st.Snapshots, err = s.describeSnapshots(ctx); err != nil {
		return st, err
	}
	phases := map[digest.Digest]fill.Phase{}
	for _, state := range s.filler.State() {
		phases[state.DiffID] = state.Phase
	}
	st.Layers = []control.Layer{}
	seen := map[digest.Digest]bool{}
	for _, snap := range st.Snapshots {
		for _, diffID := range snap.Layers {
			if !seen[diffID] {
				seen[diffID] = true
				st.Layers = append(st.Layers, s.describeLayer(diffID, phases[diffID]))
			}
		}
	}
	return st, nil
}

// daemon describes the process and what its machine can do.
func (s *Snapshotter) daemon() control.Daemon {
	can, err := s.able.known()
	d := control.Daemon{
		PID: os.Getpid(), Started: s.started, Root: s.dir, Mode: string(can.Mode), NotLazy: text(err), Full: errors.Is(err, root.ErrFull),
		Nested: text(can.Nested), Remap: text(can.Remap), Outlived: s.files != nil && s.files.Kept(),
	}
	n, oldest := s.InFlight()
	d.InFlight, d.OldestSeconds = n, oldest.Seconds()
	return d
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// describeSnapshots describes all snapshots.
func (s *Snapshotter) describeSnapshots(ctx context.Context) ([]control.Snapshot, error) {
	all := []control.Snapshot{}
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			id, _, usage, err := storage.GetInfo(ctx, info.Name)
			if err != nil {
				return err
			}
			snap := control.Snapshot{
				Name: info.Name, Parent: info.Parent, Kind: strings.ToLower(info.Kind.String()), Size: usage.Size,
				Lazy: info.Labels[discover.LabelLazy] == "true", NotLazy: info.Labels[discover.LabelNotLazy],
				Mount: string(s.roots.mode(id)),
			}
			if info.Kind == snapshots.KindCommitted {
				snap.Image, snap.DiffID = info.Labels[snapshotters.TargetRefLabel], digest.Digest(info.Labels[snapshots.LabelSnapshotDiffID])
				snap.ChainID = digest.Digest(info.Name[strings.LastIndex(info.Name, "/")+1:])
			}
			if c, err := s.chain(id); err == nil {
				snap.ChainID, snap.Layers = c.ChainID, c.Layers
				if snap.DiffID == "" {
					snap.DiffID = c.Layers[len(c.Layers)-1]
				}
			} else if errdefs.IsDataLoss(err) {
				snap.NotLazy = err.Error()
			} else if !errdefs.IsNotFound(err) {
				return err
			}
			if snap.ChainID.Validate() != nil {
				snap.ChainID = "" // somebody committed it by another name
			}
			all = append(all, snap)
			return nil
		})
	})
	if errdefs.IsNotFound(err) && len(all) == 0 {
		err = nil // a store in which no snapshot was ever made
	}
	return all, err
}

// mode returns how the root of the snapshot id is mounted; "" if it is not. One
// that is just being mounted is not yet.
func (r roots) mode(id string) (mode root.Mode) {
	r.mu.Lock()
	st := r.byID[id]
	r.mu.Unlock()
	if st == nil || !st.mu.TryLock() {
		return ""
	}
	defer st.mu.Unlock()
	if st.mounted {
		mode = st.mode
	}
	return mode
}

// describeLayer describes a layer of a lazy snapshot.
func (s *Snapshotter) describeLayer(diffID digest.Digest, phase fill.Phase) control.Layer {
	d := control.Layer{DiffID: diffID, Fill: string(phase), Mounted: s.mounted.used(diffID)}
	l, err := s.layers.Layer(diffID)
	if err != nil {
		d.Error = err.Error()
		return d
	}
	st := l.State()
	d.Size, d.BlobSize = l.Size(), l.BlobSize()
	d.Fetched, d.Disk, d.Complete, d.Sources, d.Host, d.Used = st.Fetched, st.Disk, st.Complete, st.Sources, st.Host, st.Used
	d.Error, d.ErrorAt = text(st.Failure.Err), st.Failure.At
	if phase == "" {
		d.Fill = string(fill.Off) // it was given up by Prune
	}
	return d
}

// Prune implements control.Service. What is given up is not completed in the
// background again, until its image is pulled or the daemon starts.
func (s *Snapshotter) Prune(ctx context.Context, what control.Prune) (control.Pruned, error) {
	layers, freed := s.layers.Prune(what.All)
	for _, diffID := range layers {
		s.filler.Remove(diffID)
	}
	log.G(ctx).WithField("layers", len(layers)).WithField("bytes", freed).Info("gave up what was fetched, as somebody asked for")
	return control.Pruned{Layers: len(layers), Bytes: freed}, nil
}

// Find implements control.Service.
func (s *Snapshotter) Find(ctx context.Context, image control.Image) (control.Archive, error) {
	a, upstream, err := s.finder.Look(ctx, discover.Image{Ref: image.Ref, Manifest: image.Manifest, Link: image.Link})
	if upstream != "" {
		return control.Archive{Upstream: upstream}, nil
	}
	if err != nil {
		return control.Archive{}, err
	}
	defer a.Close() // it was only read from
	return control.ArchiveOf(a), nil
}

// Save implements control.Service.
func (s *Snapshotter) Save(ctx context.Context, what control.Save) (control.Archive, error) {
	if !filepath.IsAbs(what.Path) {
		return control.Archive{}, fmt.Errorf("path %q is not absolute: %w", what.Path, errdefs.ErrInvalidArgument)
	}
	image := discover.Image{Ref: what.Image.Ref, Manifest: what.Image.Manifest, Link: what.Image.Link}
	a, upstream, err := s.finder.LookWhole(ctx, image)
	release := func() { a.Close() } // it was only read from
	if upstream != "" {
		a, release, err = s.finder.Find(ctx, image) // which makes one of what CLIP wrote
	}
	if err != nil {
		return control.Archive{}, err
	}
	defer release()
	img, err := a.Image()
	if err != nil {
		return control.Archive{}, err
	}
	if _, err := archive.WriteFile(what.Path, img); err != nil {
		return control.Archive{}, fmt.Errorf("writing the archive of %s: %w", image.Ref, err)
	}
	return control.ArchiveOf(a), nil
}

// Fetches implements control.Service.
func (s *Snapshotter) Fetches(_ context.Context, after time.Time) ([]control.Fetch, error) {
	all := []control.Fetch{}
	for _, f := range s.layers.Fetches(after) {
		all = append(all, control.Fetch{
			DiffID: f.DiffID, Off: f.Off, Len: f.Len, Bytes: f.Bytes, Reason: f.Reason, Host: f.Host,
			Began: f.Began, Millis: float64(f.Took.Microseconds()) / 1e3, Error: text(f.Err),
		})
	}
	return all, nil
}
