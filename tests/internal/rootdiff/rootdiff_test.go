package rootdiff

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
)

// TestDiff changes one thing at a time: a comparison that overlooks something is worth nothing.
func TestDiff(t *testing.T) {
	need.Root(t)
	for name, change := range map[string]func(path func(string) string) error{
		"content is":             func(p func(string) string) error { return rewrite(p("file"), "CONTENT") },
		"size is":                func(p func(string) string) error { return rewrite(p("file"), "longer content") },
		"mode is":                func(p func(string) string) error { return os.Chmod(p("file"), 0o600) },
		"owner is":               func(p func(string) string) error { return os.Chown(p("file"), 1, 2) },
		"mtime is":               func(p func(string) string) error { return setTime(p("dir"), 1) },
		"link target is":         func(p func(string) string) error { return replaceLink(p("link"), "elsewhere") },
		"device is":              func(p func(string) string) error { return replaceNode(p("node"), 1, 5) },
		"link count is":          func(p func(string) string) error { return os.Link(p("file"), p("dir")+"/third") },
		"names of the inode is":  func(p func(string) string) error { return os.Rename(p("second"), p("second2")) },
		"extended attributes is": func(p func(string) string) error { return unix.Setxattr(p("file"), "user.x", []byte("other"), 0) },
		"is missing":             func(p func(string) string) error { return os.Remove(p("file")) },
		"should not be":          func(p func(string) string) error { return os.Mkdir(p("new"), 0o755) },
	} {
		t.Run(name, func(t *testing.T) {
			want, got := sample(t), sample(t)
			require.Empty(t, Diff(read(t, want), read(t, got), time.Now()))
			require.NoError(t, change(func(name string) string { return filepath.Join(got, name) }))
			diffs := strings.Join(Diff(read(t, want), read(t, got), time.Now()), "\n")
			require.Contains(t, diffs, name)
		})
	}
}

// TestDiffVagueTimes forgives the time of directories that were made while unpacking, and of nothing else.
func TestDiffVagueTimes(t *testing.T) {
	want, got := sample(t), sample(t)
	require.NoError(t, setTime(filepath.Join(want, "dir"), 100))
	require.NoError(t, setTime(filepath.Join(want, "file"), 100))
	diffs := Diff(read(t, want), read(t, got), time.Unix(99, 0))
	require.Len(t, diffs, 2, "file has two names")
	require.NotContains(t, strings.Join(diffs, "\n"), "dir")
	require.Len(t, Diff(read(t, want), read(t, got), time.Unix(101, 0)), 3)
}

// sample makes a root with one of everything, the same each time.
func sample(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	require.NoError(t, os.Mkdir(path("dir"), 0o755))
	require.NoError(t, os.WriteFile(path("file"), []byte("content"), 0o644))
	require.NoError(t, os.Link(path("file"), path("second")))
	require.NoError(t, os.Symlink("somewhere", path("link")))
	require.NoError(t, unix.Mknod(path("node"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	require.NoError(t, unix.Setxattr(path("file"), "user.x", []byte("value"), 0))
	for _, name := range []string{"dir", "file", "link", "node", "."} {
		require.NoError(t, setTime(path(name), 10))
	}
	return dir
}

func read(t *testing.T, dir string) Tree {
	t.Helper()
	tree, err := Read(dir)
	require.NoError(t, err)
	return tree
}

func setTime(path string, seconds int64) error {
	ts := []unix.Timespec{{Sec: seconds}, {Sec: seconds, Nsec: 7}}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW)
}

// rewrite changes a file's content and keeps its time.
func rewrite(path, content string) error {
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return err
	}
	return setTime(path, 10)
}

func replaceLink(path, target string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return os.Symlink(target, path)
}

func replaceNode(path string, major, minor uint32) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor)))
}
