package snapshotter

import (
	"context"
	"fmt"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// walk asks for a snapshot as containerd does.
func walk(t testing.TB, sn *Snapshotter, ref, parent string) (found []snapshots.Info) {
	t.Helper()
	filter := fmt.Sprintf("labels.%q==%s,parent==%q", snapshots.LabelSnapshotRef, ref, parent)
	require.NoError(t, sn.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		found = append(found, info)
		return nil
	}, filter))
	return found
}

// TestWalk finds what containerd asks for under whatever name it is.
func TestWalk(t *testing.T) {
	sn := open(t, t.TempDir())
	ref := digest.FromString("some chain").String()
	require.Empty(t, walk(t, sn, ref, ""))
	for _, parent := range []string{"", "below"} {
		_, err := sn.Prepare(t.Context(), "active on "+parent, parent)
		require.NoError(t, err)
		require.NoError(t, sn.Commit(t.Context(), "below"+parent, "active on "+parent, snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: ref})))
	}
	for name, parent := range map[string]string{"below": "", "belowbelow": "below"} {
		found := walk(t, sn, ref, parent)
		require.Len(t, found, 1)
		require.Equal(t, name, found[0].Name)
	}
	require.Empty(t, walk(t, sn, ref, "another"))
	require.Empty(t, walk(t, sn, digest.FromString("another chain").String(), ""))
	n := 0
	require.NoError(t, sn.Walk(t.Context(), func(context.Context, snapshots.Info) error { n++; return nil }))
	require.Equal(t, 2, n)
}

// BenchmarkWalk looks for one of 2000 lazy snapshots.
func BenchmarkWalk(b *testing.B) {
	sn := open(b, b.TempDir())
	var all []lazySnapshot
	for i := range 2000 {
		c := chain{ChainID: digest.FromString(fmt.Sprint(i))}
		all = append(all, lazySnapshot{lazyName(c.ChainID, ""), "", c, map[string]string{snapshots.LabelSnapshotRef: c.ChainID.String()}})
	}
	_, err := sn.commitLazy(b.Context(), all)
	require.NoError(b, err)
	for b.Loop() {
		require.Len(b, walk(b, sn, all[1000].chain.ChainID.String(), ""), 1)
	}
}
