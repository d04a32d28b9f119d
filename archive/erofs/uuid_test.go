package erofs_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// TestUUID reads where the format has it, see superBlock: overlayfs wants one,
// and two images that one overlay stands on must not have the same.
func TestUUID(t *testing.T) {
	uuid := func(root *tree.Node) string {
		return string(write(t, root, nil)[1024+48 : 1024+64])
	}
	one := uuid(dir())
	require.NotEqual(t, string(make([]byte, 16)), one)
	require.Equal(t, one, uuid(dir()))
	require.NotEqual(t, one, uuid(dir(tree.Dirent{Name: "a", Node: dir()})))
}
