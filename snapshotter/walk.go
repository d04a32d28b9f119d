package snapshotter

import (
	"context"
	"regexp"
	"strconv"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Walk implements snapshots.Snapshotter.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		if info, ok := askedFor(ctx, filters); ok {
			return fn(ctx, info)
		}
		called := false
		err := storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			called = true
			return fn(ctx, info)
		}, filters...)
		if errdefs.IsNotFound(err) && !called {
			return nil // nothing was ever stored
		}
		return err
	})
}

// lazyFilter is how containerd asks for the snapshot that Prepare has said to exist
// (core/metadata/snapshot.go). It does for every layer of an image, and a node may
// have thousands of snapshots.
var lazyFilter = regexp.MustCompile(`^labels\."containerd\.io/snapshot\.ref"==(sha256:[0-9a-f]{64}),parent==(".*")$`)

// askedFor returns the lazy snapshot that filters, as containerd makes them, ask for,
// without looking at any other. It needs a transaction.
func askedFor(ctx context.Context, filters []string) (snapshots.Info, bool) {
	if len(filters) != 1 {
		return snapshots.Info{}, false
	}
	asked := lazyFilter.FindStringSubmatch(filters[0])
	if asked == nil {
		return snapshots.Info{}, false
	}
	parent, err := strconv.Unquote(asked[2])
	if err != nil {
		return snapshots.Info{}, false
	}
	_, info, _, err := storage.GetInfo(ctx, lazyName(digest.Digest(asked[1]), parent))
	return info, err == nil && info.Parent == parent && info.Labels[snapshots.LabelSnapshotRef] == asked[1]
}
