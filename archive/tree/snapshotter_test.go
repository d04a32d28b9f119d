package tree_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
)

// TestSnapshotter does what TestRandomStacks does with all of containerd's
// path from a blob to a container's root: content store, applier, overlayfs
// snapshotter.
func TestSnapshotter(t *testing.T) {
	need.Root(t)
	dir, err := os.MkdirTemp("", "snapshotter")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ctx := namespaces.WithNamespace(t.Context(), "test")
	store, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		t.Fatal(err)
	}
	sn, err := overlay.NewSnapshotter(filepath.Join(dir, "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sn.Close() })

	const seed = 20260101
	g := &generator{r: rand.New(rand.NewPCG(seed, 1))}
	applied := 0
	for i := range 12 {
		start := time.Now().Add(-time.Second)
		var (
			parent string
			layers []*layer.Index
			tars   [][]byte
			root   *tree.Node
		)
		for j := range 10 {
			files := g.layer()
			data := makeTar(t, files)
			name := fmt.Sprintf("%d-%d", i, j)
			refused := unpackBlob(ctx, t, store, sn, name, parent, data)
			next := append(layers[:len(layers):len(layers)], indexTar(t, data))
			merged, err := tree.Merge(next)
			if (err != nil) != (refused != nil) {
				t.Fatalf("containerd: %v\nMerge: %v\n%s", refused, err, describeFiles(files, refused))
			}
			if err == nil {
				parent, layers, tars, root = name, next, append(tars, data), merged
				applied++
			}
		}
		if parent != "" {
			compare(t, scanSnapshot(ctx, t, sn, fmt.Sprint("container", i), parent, start), flatten(t, root, tars))
		}
	}
	if applied < 24 {
		t.Errorf("only %d layers were accepted", applied)
	}
}

// unpackBlob stores a layer, applies it to a new snapshot and commits that.
func unpackBlob(ctx context.Context, tb testing.TB, store content.Store, sn snapshots.Snapshotter, name, parent string, data []byte) error {
	tb.Helper()
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := content.WriteBlob(ctx, store, name, bytes.NewReader(data), desc); err != nil {
		tb.Fatal(err)
	}
	mounts, err := sn.Prepare(ctx, "prepare-"+name, parent)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := apply.NewFileSystemApplier(store).Apply(ctx, desc, mounts); err != nil {
		return err
	}
	if err := sn.Commit(ctx, name, "prepare-"+name); err != nil {
		tb.Fatal(err)
	}
	return nil
}

// scanSnapshot lists a container's root, mounted as one.
func scanSnapshot(ctx context.Context, tb testing.TB, sn snapshots.Snapshotter, key, parent string, start time.Time) map[string]attrs {
	tb.Helper()
	mounts, err := sn.Prepare(ctx, key, parent)
	if err != nil {
		tb.Fatal(err)
	}
	var paths map[string]attrs
	err = mount.WithTempMount(ctx, mounts, func(root string) error {
		paths = scan(tb, root, start)
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return paths
}
