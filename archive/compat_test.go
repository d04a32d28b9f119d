package archive

import (
	"archive/tar"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/internal/detgob"
	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// extract reads an archive with upstream's own code.
func extract(t *testing.T, b []byte) *common.ClipArchiveMetadata {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.clip")
	require.NoError(t, os.WriteFile(path, b, 0o600))
	m, err := clip.NewClipArchiver().ExtractMetadata(path)
	require.NoError(t, err)
	return m
}

func TestUpstreamNodes(t *testing.T) {
	img := newImage(t, testStreams(t)...)
	m := extract(t, write(t, &img.Image))
	require.EqualValues(t, "oci", string(m.Header.StorageInfoType[:3]))

	modes := map[string]uint32{
		"/": unix.S_IFDIR | 0o755, "/bin": unix.S_IFDIR | 0o755, "/bin/su": unix.S_IFREG | 0o4755,
		"/bin/su2": unix.S_IFREG | 0o4755, "/bin/sh": unix.S_IFLNK | 0o777, "/etc": unix.S_IFDIR | 0o755,
		"/etc/kept": unix.S_IFREG | 0o644, "/tmp": unix.S_IFDIR | 0o1777, "/dev": unix.S_IFDIR | 0o755,
		"/empty": unix.S_IFREG | 0o644, "/lib": unix.S_IFDIR | 0o755, "/lib/big": unix.S_IFREG | 0o644,
		"/z\xff": unix.S_IFREG | 0o644,
	}
	require.Equal(t, len(modes), m.Index.Len(), "the whiteout, the device and the pipe are not listed")
	for path, mode := range modes {
		n := m.Get(path)
		require.NotNil(t, n, path)
		require.Equal(t, mode, n.Attr.Mode, path)
		require.NotZero(t, n.Attr.Ino)
	}
	require.EqualValues(t, fuse.FUSE_ROOT_ID, m.Get("/").Attr.Ino)
	require.Len(t, m.ListDirectory("/bin"), 3)

	require.Equal(t, common.SymLinkNode, m.Get("/bin/sh").NodeType)
	require.Equal(t, "su", m.Get("/bin/sh").Target)
	require.EqualValues(t, 2, m.Get("/bin/sh").Attr.Size)
	su, su2 := m.Get("/bin/su"), m.Get("/bin/su2")
	require.Equal(t, su.Attr, su2.Attr, "hard links are one inode")
	require.EqualValues(t, 2, su.Attr.Nlink)
	require.Equal(t, fuse.Owner{Uid: 7, Gid: 1<<32 - 2}, su.Attr.Owner)
	require.EqualValues(t, 1700000000, su.Attr.Mtime)
	require.EqualValues(t, 5000, su.Attr.Mtimensec)
	require.EqualValues(t, 10, su.Attr.Blocks)

	streams := map[string][]byte{}
	for i, blob := range img.blobs {
		streams[digest.FromBytes(blob).String()] = img.streams[i]
	}
	for path, want := range map[string]string{
		"/bin/su": testimage.Content(1, 5000), "/bin/su2": testimage.Content(1, 5000), "/etc/kept": "second",
		"/empty": "", "/lib/big": testimage.Content(2, 90_000), "/z\xff": "last",
	} {
		n := m.Get(path)
		require.Equal(t, common.FileNode, n.NodeType)
		require.EqualValues(t, len(want), n.Attr.Size)
		require.EqualValues(t, len(want), n.Remote.ULength)
		if string(streams[n.Remote.LayerDigest][n.Remote.UOffset:][:n.Remote.ULength]) != want {
			t.Errorf("%s: its reference points at other bytes", path)
		}
	}
}

// Nodes are written field by field: that must be what gob makes of them.
func TestNodesAreGob(t *testing.T) {
	img := newImage(t, testStreams(t)...)
	root, err := img.root()
	require.NoError(t, err)
	nodes := &clipNodes{img: &img.Image, linked: map[*tree.Node]uint64{}}
	seen := map[common.ClipNodeType]int{}
	for appendNode := range nodes.walk(root) {
		n := nodes.node
		seen[n.NodeType]++
		requireGob(t, n, string(nodes.path), appendNode)
	}
	require.Len(t, seen, 3)

	// Everything that set can set has a value; what is missing here is never sent.
	nodes.path = []byte("/path")
	nodes.node = common.ClipNode{NodeType: common.FileNode, Target: "target", Attr: fuse.Attr{
		Ino: 1, Size: 2, Blocks: 3, Atime: 4, Mtime: 5, Ctime: 6, Atimensec: 7, Mtimensec: 8, Ctimensec: 9,
		Mode: 10, Nlink: 11, Owner: fuse.Owner{Uid: 12, Gid: 13},
	}, Remote: &common.RemoteRef{LayerDigest: "digest", UOffset: 14, ULength: 15}}
	requireGob(t, nodes.node, "/path", nodes.append)
}

func requireGob(t *testing.T, n common.ClipNode, path string, appendNode func([]byte) []byte) {
	t.Helper()
	n.Path = path
	want, err := detgob.Append(nil, &n)
	require.NoError(t, err)
	require.Equal(t, want, appendNode(nil), path)
}

func TestUpstreamStorageInfo(t *testing.T) {
	img := newImage(t, testStreams(t)...)
	info, ok := extract(t, write(t, &img.Image)).StorageInfo.(common.OCIStorageInfo)
	require.True(t, ok)
	require.Equal(t, "registry.example:5000", info.RegistryURL)
	require.Equal(t, "team/app", info.Repository)
	require.Equal(t, "v1", info.Reference)
	require.Len(t, info.Layers, 3)
	for i, blob := range img.blobs {
		key := digest.FromBytes(blob).String()
		require.Equal(t, key, info.Layers[i])
		require.Equal(t, digest.FromBytes(img.streams[i]).Encoded(), info.DecompressedHashByLayer[key])
		g := info.GzipIdxByLayer[key]
		require.Equal(t, key, g.LayerDigest)
		require.Empty(t, g.Checkpoints, "CLIP cannot use them")
	}

	meta := info.ImageMetadata
	layers := meta.LayersData
	meta.LayersData = nil
	require.Equal(t, &common.ImageMetadata{
		Name: testRef, Digest: img.Descriptor.Digest.String(), Created: time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC),
		Architecture: "arm64", Os: "linux", Variant: "v8", Author: "author", User: "7:8", WorkingDir: "/tmp",
		Env: []string{"PATH=/bin", "A=b"}, Entrypoint: []string{"/bin/sh"}, Cmd: []string{"-c", "true"},
		Labels: map[string]string{"a": "1", "b": "2"}, StopSignal: "SIGINT",
		ExposedPorts: map[string]struct{}{"80/tcp": {}}, Volumes: map[string]struct{}{"/data": {}}, Layers: info.Layers,
	}, meta)
	for i, desc := range img.manifest(t).Layers {
		require.Equal(t, common.LayerMetadata{
			MIMEType: desc.MediaType, Digest: desc.Digest.String(), Size: desc.Size, Annotations: desc.Annotations,
		}, layers[i])
	}
}

// References are spelled out as upstream's client would.
func TestUpstreamReference(t *testing.T) {
	hash := digest.FromString("x").String()
	for ref, want := range map[string][3]string{
		"alpine":                           {"index.docker.io", "library/alpine", "latest"},
		"docker.io/team/app:1":             {"index.docker.io", "team/app", "1"},
		"localhost:5000/a/b/c@" + hash:     {"localhost:5000", "a/b/c", hash},
		"registry.example/app:tag@" + hash: {"registry.example", "app", "tag"},
		"localhost:5000/app@" + hash:       {"localhost:5000", "app", hash},
	} {
		img := smallImage(t)
		img.StorageRef = ref
		info := extract(t, write(t, &img.Image)).StorageInfo.(common.OCIStorageInfo)
		require.Equal(t, want, [3]string{info.RegistryURL, info.Repository, info.Reference}, ref)
		require.Equal(t, ref, info.ImageMetadata.Name)
		stored, limit, err := UpstreamRef(ref)
		require.NoError(t, err)
		require.Equal(t, want, [3]string{stored.Context().RegistryStr(), stored.Context().RepositoryStr(), stored.Identifier()}, ref)
		require.Equal(t, want[2] == hash, limit != "", "%s: CLIP cannot mount by digest", ref)
	}
	_, _, err := UpstreamRef("Not A Ref")
	require.ErrorContains(t, err, `storage reference "Not A Ref"`)
}

func TestLimits(t *testing.T) {
	img := newImage(t, testStreams(t)...)
	require.Empty(t, img.Limits())
	img.StorageRef = "registry.example/app:1@" + digest.FromString("x").String()
	require.Empty(t, img.Limits())
	img.StorageRef = "registry.example/app@" + digest.FromString("x").String()
	img.Layers[1].Index.Compression = layer.Zstd
	limits := img.Limits()
	require.Len(t, limits, 2)
	require.Contains(t, limits[0], "by digest")
	require.Contains(t, limits[1], "layer 2: it is zstd")
	img.Layers[0] = Layer{Reason: "sparse"}
	require.Contains(t, img.Limits()[1], "empty root: layer 1")
}

// CLIP has no words for holes: the file is not listed, rather than with other
// bytes in it.
func TestUpstreamSparse(t *testing.T) {
	s := testimage.Sparse{Header: tar.Header{Typeflag: tar.TypeReg, Name: "sparse"}, Version: "1.0", Size: 1 << 20,
		Pieces: []testimage.Piece{{Pos: 4096, Data: testimage.Content(1, 4096)}}}
	img := newImage(t, append(s.Bytes(t), testimage.Tar(t, testimage.Reg("plain", "plain"))...))
	m := extract(t, write(t, &img.Image))
	require.Equal(t, 2, m.Index.Len())
	require.NotNil(t, m.Get("/plain"))
	require.Nil(t, m.Get("/sparse"))
}
