package command

import (
	"bytes"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestExitCodes(t *testing.T) {
	t.Setenv("CONTAINERD_ADDRESS", filepath.Join(t.TempDir(), "none"))
	t.Setenv("CLIP_ADDRESS", filepath.Join(t.TempDir(), "none"))
	for _, c := range []struct {
		args []string
		code int
	}{
		{nil, exitDone},
		{[]string{"inspect", "--help"}, exitDone},
		{[]string{"surprise"}, exitUsage},
		{[]string{"inspect"}, exitUsage},
		{[]string{"status", "--surprise"}, exitUsage},
		{[]string{"index", "x", "--platform", "a", "--all-platforms"}, exitUsage},
		{[]string{"content", "surprise"}, exitUsage},
		{[]string{"inspect", "/nowhere"}, exitError},
		{[]string{"status"}, exitError},
		{[]string{"doctor", "--root", t.TempDir()}, exitWrong},
	} {
		var stdout, stderr bytes.Buffer
		require.Equal(t, c.code, Main(t.Context(), c.args, &stdout, &stderr), "%v: %s", c.args, stderr.String())
		require.Equal(t, c.code == exitDone, stderr.Len() == 0, "%v: %s", c.args, stderr.String())
	}
}

func TestConfigFlag(t *testing.T) {
	for want, args := range map[string][]string{
		"/etc/containerd/config.toml": {"containerd", ""},
		"/a":                          {"/usr/bin/containerd", "--config", "/a", "-l", "debug", ""},
		"/b":                          {"containerd", "-l", "debug", "--config=/b"},
		"/c":                          {"containerd", "-c", "/c"},
	} {
		require.Equal(t, want, configFlag(args))
	}
}
