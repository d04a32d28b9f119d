package treefs

import (
	"path"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// TestNumbersStay has the node numbers of a tree. A version that gave others would answer, for files that the kernel and
// containers hold since an earlier version, with the content of other files.
func TestNumbersStay(t *testing.T) {
	linked := &tree.Node{Mode: unix.S_IFREG | 0o600, Nlink: 2}
	plain := func(mode uint32) *tree.Node { return &tree.Node{Mode: mode, Nlink: 1} }
	s := newServer(t.Context())
	require.NoError(t, s.know(dir(
		tree.Dirent{Name: "a", Node: dir(
			tree.Dirent{Name: "one", Node: linked},
			tree.Dirent{Name: "sub", Node: dir(tree.Dirent{Name: "file", Node: plain(unix.S_IFREG)})},
			tree.Dirent{Name: "z", Node: plain(unix.S_IFLNK)},
		)},
		tree.Dirent{Name: "b", Node: dir()},
		tree.Dirent{Name: "c", Node: plain(unix.S_IFIFO)},
		tree.Dirent{Name: "two", Node: linked},
		tree.Dirent{Name: "zero", Node: plain(unix.S_IFCHR)},
	), nil))
	numbers := map[string]uint64{}
	var walk func(name string, n inode)
	walk = func(name string, n inode) {
		numbers[name] = n.number
		for i, c := range n.Children {
			walk(path.Join(name, c.Name), s.inodes[n.children[i]])
		}
	}
	walk("/", s.inodes[1])
	require.Equal(t, map[string]uint64{
		"/": 1, "/fs": 2, "/fs/a": 3, "/fs/a/one": 4, "/fs/a/sub": 5, "/fs/a/sub/file": 6, "/fs/a/z": 7,
		"/fs/b": 8, "/fs/c": 9, "/fs/two": 4, "/fs/zero": 10,
	}, numbers)
	require.Len(t, s.inodes, 11)
}
