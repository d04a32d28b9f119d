package discover

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// TestOffer has a finder remove what was offered by somebody who was killed, and nothing else.
func TestOffer(t *testing.T) {
	dir, manifest := t.TempDir(), digest.FromString("manifest")
	mine := []string{"load-balancer.clip", "load-" + manifest.Encoded() + ".clip"}
	for _, name := range append(mine, "load-"+manifest.Encoded()+"-4711.clip", ".load-4711") {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	remove, err := Offer(dir, strings.NewReader("archive"), manifest)
	require.NoError(t, err)
	names := func() (found []string) {
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		for _, e := range entries {
			found = append(found, e.Name())
		}
		return found
	}
	require.Len(t, names(), 5)
	New(Options{Dir: dir})
	left := names()
	require.Len(t, left, 3)
	for _, name := range left {
		if strings.Contains(name, manifest.Encoded()+"-") {
			require.NotContains(t, name, "4711")
			text, err := os.ReadFile(filepath.Join(dir, name))
			require.NoError(t, err)
			require.Equal(t, "archive", string(text))
		}
	}
	remove()
	require.ElementsMatch(t, mine, names())
	_, err = Offer(filepath.Join(dir, "none"), strings.NewReader(""), manifest)
	require.ErrorIs(t, err, os.ErrNotExist)
}
