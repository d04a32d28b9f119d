package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestPages are the same whatever the environment says.
func TestPages(t *testing.T) {
	var pages [2]map[string]string
	for i := range pages {
		t.Setenv("CLIP_ADDRESS", t.TempDir())
		dir := t.TempDir()
		require.NoError(t, write(dir))
		files, err := filepath.Glob(filepath.Join(dir, "man[18]", "*.[18]"))
		require.NoError(t, err)
		pages[i] = map[string]string{}
		for _, file := range files {
			text, err := os.ReadFile(file)
			require.NoError(t, err)
			pages[i][filepath.Base(file)] = string(text)
		}
	}
	require.Equal(t, pages[0], pages[1])
	for name, what := range map[string]string{
		"clipctl.1": "clipctl-status(1)", "clipctl-status.1": "--watch", "clipctl-completion-bash.1": "bash", "containerd-clip-grpc.8": "containerd-clip-grpc-watch(8)",
	} {
		require.Contains(t, pages[0][name], what)
	}
	require.NotContains(t, pages[0], "containerd-clip-grpc-keeper.8")
}
