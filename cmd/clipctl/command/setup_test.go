package command

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// setup runs clipctl setup on the configuration file at path, with no containerd to ask.
func setup(t *testing.T, path string, args ...string) (string, error) {
	t.Helper()
	t.Setenv("PATH", "")
	cmd := New()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetArgs(append([]string{"setup", "--containerd-config", path}, args...))
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func TestSetup(t *testing.T) {
	for name, c := range map[string]struct {
		main  string
		args  []string
		after string // what main is then; empty if it does not change
		err   string
	}{
		"imported":          {main: "version = 3\nimports = ['DIR/conf.d/*.toml']\n"},
		"imported relative": {main: "imports = ['conf.d/*.toml']\n"},
		"imported alone":    {main: "imports = ['DIR/other.toml', 'DIR/conf.d/50-clip.toml']\n"},
		"no import":         {main: "version = 3\n", err: "at the top of DIR/config.toml"},
		"no file":           {err: "--add-import"},
		"import added": {main: "version = 3\n[grpc]\n", args: []string{"--add-import"},
			after: "imports = [\"DIR/conf.d/*.toml\"] # clipctl setup\nversion = 3\n[grpc]\n"},
		"file made":      {args: []string{"--add-import"}, after: "version = 3 # clipctl setup\nimports = [\"DIR/conf.d/*.toml\"] # clipctl setup\n"},
		"other imports":  {main: "imports = ['DIR/elsewhere/*.toml']\n", args: []string{"--add-import"}, err: "to the imports in DIR/config.toml"},
		"no TOML at all": {main: "a = \n", err: "DIR/config.toml"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			in := func(s string) string { return string(bytes.ReplaceAll([]byte(s), []byte("DIR"), []byte(dir))) }
			main, dropIn := filepath.Join(dir, "config.toml"), filepath.Join(dir, "conf.d", "50-clip.toml")
			if c.main != "" {
				require.NoError(t, os.WriteFile(main, []byte(in(c.main)), 0o600))
			}
			out, err := setup(t, main, c.args...)
			if c.err != "" {
				require.ErrorContains(t, err, in(c.err))
			} else {
				require.NoError(t, err)
				require.Equal(t, in("wrote DIR/conf.d/50-clip.toml: restart containerd\n"), out)
				out, err = setup(t, main, c.args...)
				require.NoError(t, err)
				require.Equal(t, in("DIR/conf.d/50-clip.toml is as it should be\n"), out, "a second time changes nothing")
			}
			now, _ := os.ReadFile(main)
			want := c.after
			if want == "" {
				want = c.main
			}
			require.Equal(t, in(want), string(now))
			if errdefs.IsFailedPrecondition(err) || err == nil {
				require.FileExists(t, dropIn, "what is left to do is the import alone")
			} else {
				require.NoFileExists(t, dropIn)
			}

			_, err = setup(t, main, "--remove")
			require.NoError(t, err)
			require.NoFileExists(t, dropIn)
			now, err = os.ReadFile(main)
			require.Equal(t, in(c.main), string(now), "all is as it was")
			if c.main == "" {
				require.ErrorIs(t, err, os.ErrNotExist)
			} else {
				st, err := os.Stat(main)
				require.NoError(t, err)
				require.Equal(t, os.FileMode(0o600), st.Mode())
			}
		})
	}
}

// That the import alone was missing is a change, too.
func TestSetupImportLater(t *testing.T) {
	main := filepath.Join(t.TempDir(), "config.toml")
	require.NoError(t, os.WriteFile(main, []byte("version = 3\n"), 0o600))
	_, err := setup(t, main)
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	out, err := setup(t, main, "--add-import")
	require.NoError(t, err)
	require.Contains(t, out, "restart containerd")
}

func TestSetupPaths(t *testing.T) {
	dir := t.TempDir()
	_, err := setup(t, filepath.Join(dir, "config.toml"), "--add-import", "--pods", "--clip-root", "/r", "--clip-address", "/s")
	require.NoError(t, err)
	text, err := os.ReadFile(filepath.Join(dir, "conf.d", "50-clip.toml"))
	require.NoError(t, err)
	for _, line := range []string{`address = "/s"`, `root = "/r"`, `snapshotter = "clip"`} {
		require.Contains(t, string(text), "  "+line+"\n", line)
	}
	require.NotContains(t, string(text), defaultClipRoot)
}
