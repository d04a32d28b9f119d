package tests

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/beam-cloud/containerd-clip/"

// TestImports checks that imports go one way: archive, then plugin and
// snapshotter, then cmd.
func TestImports(t *testing.T) {
	checked := map[string]int{}
	for path, imports := range packages(t) {
		layer, _, _ := strings.Cut(path, "/")
		checked[layer]++
		for _, i := range imports {
			if why := forbidden(layer, i); why != "" {
				t.Errorf("%s imports %s: %s", path, i, why)
			}
		}
	}
	for _, layer := range []string{"archive", "plugin", "snapshotter", "cmd"} {
		require.NotZero(t, checked[layer], "no package of %s was checked", layer)
	}
}

// forbidden says why a package of layer may not import a path, or "".
func forbidden(layer, path string) string {
	inner, own := strings.CutPrefix(path, module)
	top, _, _ := strings.Cut(inner, "/")
	switch {
	case own && top == "cmd" && layer != "cmd":
		return "nothing imports cmd"
	case own && (top == "internal" || top == "tests") && layer != "tests":
		return "that is for tests"
	case layer == "archive" && own && top != "archive":
		return "archive stands below all else"
	case layer == "archive" && (path == "net" || strings.HasPrefix(path, "net/")):
		return "archive does not fetch"
	case layer == "archive" && strings.HasPrefix(path, "github.com/containerd/"):
		return "archive does not know containerd"
	case layer == "archive" && (path == "log" || strings.HasPrefix(path, "log/") || strings.Contains(path, "logrus") || strings.Contains(path, "zerolog")):
		return "archive returns errors and does not log"
	case layer == "plugin" && own && top == "snapshotter", layer == "snapshotter" && own && top == "plugin":
		return "they meet in archive only"
	}
	return ""
}

// packages returns the direct imports of our packages, tests apart, by path
// below the module.
func packages(t *testing.T) map[string][]string {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Imports", "./...")
	cmd.Dir = ".."
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, stderr.String())
	found := map[string][]string{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return found
		}
		require.NoError(t, err)
		path, own := strings.CutPrefix(p.ImportPath, module)
		if own && !strings.HasPrefix(path, "internal/") {
			found[path] = p.Imports
		}
	}
}

func TestForbidden(t *testing.T) {
	for _, c := range []struct {
		layer, path string
		bad         bool
	}{
		{"archive", module + "plugin/index", true},
		{"archive", module + "snapshotter/root", true},
		{"archive", "github.com/containerd/errdefs", true},
		{"archive", "net/http", true},
		{"archive", "log/slog", true},
		{"archive", module + "archive/tree", false},
		{"archive", "github.com/opencontainers/go-digest", false},
		{"plugin", module + "snapshotter/remote", true},
		{"plugin", "net/http", false},
		{"snapshotter", module + "plugin/publish", true},
		{"snapshotter", module + "archive", false},
		{"snapshotter", module + "cmd/clipctl/command", true},
		{"cmd", module + "cmd/clipctl/command", false},
		{"cmd", module + "tests/internal/images", true},
		{"tests", module + "tests/internal/images", false},
		{"tests", module + "internal/testutil/need", false},
		{"archive", module + "internal/testutil", true},
	} {
		require.Equal(t, c.bad, forbidden(c.layer, c.path) != "", "%s imports %s", c.layer, c.path)
	}
}
