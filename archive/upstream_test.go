package archive

import (
	"bytes"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/btree"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
)

// dataArchive is one that CLIP made of a directory; its data is inside.
func dataArchive(tb testing.TB) (path string) {
	tb.Helper()
	require.NoError(tb, clip.SetLogLevel("disabled"))
	dir := tb.TempDir()
	require.NoError(tb, os.MkdirAll(filepath.Join(dir, "in/etc"), 0o755))
	require.NoError(tb, os.WriteFile(filepath.Join(dir, "in/etc/motd"), []byte("Hello.\n"), 0o644))
	require.NoError(tb, os.Symlink("motd", filepath.Join(dir, "in/etc/issue")))
	path = filepath.Join(dir, "data.clip")
	require.NoError(tb, clip.CreateArchive(clip.CreateOptions{InputPath: filepath.Join(dir, "in"), OutputPath: path}))
	return path
}

// remoteArchive is CLIP's archive with storage info; its file index is that of another one.
func remoteArchive(tb testing.TB, from string, info common.ClipStorageInfo) (path string) {
	tb.Helper()
	m, err := clip.NewClipArchiver().ExtractMetadata(from)
	require.NoError(tb, err)
	path = filepath.Join(tb.TempDir(), "remote.clip")
	require.NoError(tb, clip.NewClipArchiver().CreateRemoteArchive(info, m, path))
	return path
}

func nodes(m *common.ClipArchiveMetadata) (list []common.ClipNode) {
	m.Index.Ascend(nil, func(n any) bool {
		list = append(list, *n.(*common.ClipNode))
		return true
	})
	return list
}

// What is read is what CLIP reads, of every kind of archive.
func TestUpstreamKinds(t *testing.T) {
	ours := filepath.Join(t.TempDir(), "ours.clip")
	img := newImage(t, testStreams(t)...)
	_, err := WriteFile(ours, &img.Image)
	require.NoError(t, err)
	data := dataArchive(t)
	for name, c := range map[string]struct {
		path string
		kind any
	}{
		"data": {data, nil},
		"s3":   {remoteArchive(t, data, &common.S3StorageInfo{Bucket: "b", Key: "k", Endpoint: "http://e", ForcePathStyle: true}), common.S3StorageInfo{}},
		"oci":  {remoteArchive(t, ours, extract(t, write(t, &img.Image)).StorageInfo), common.OCIStorageInfo{}},
		"ours": {ours, common.OCIStorageInfo{}},
	} {
		want, err := clip.NewClipArchiver().ExtractMetadata(c.path)
		require.NoError(t, err)
		u, err := OpenUpstreamFile(c.path)
		require.NoError(t, err, name)
		got, err := u.Metadata()
		require.NoError(t, err, name)
		require.IsType(t, c.kind, u.Storage(), name)
		require.Equal(t, want.StorageInfo, got.StorageInfo, name)
		require.Equal(t, want.Header, got.Header, name)
		require.Equal(t, nodes(want), nodes(got), name)
		file, err := os.ReadFile(c.path)
		require.NoError(t, err)
		id, err := u.IndexDigest()
		require.NoError(t, err)
		require.Equal(t, digest.FromBytes(file[want.Header.IndexPos:][:want.Header.IndexLength]), id, name)
		image, ok := u.Image()
		require.Equal(t, name == "oci" || name == "ours", ok, name)
		if ok {
			require.Equal(t, img.Descriptor.Digest, image.Manifest)
			require.Equal(t, testRef, image.Ref)
			require.Len(t, image.Layers, len(img.Layers))
		}
		require.NoError(t, u.Close())
		require.Error(t, u.Close(), "the file was closed before")
		if name != "ours" {
			_, err = OpenFile(c.path)
			require.ErrorIs(t, err, ErrNoSections, name)
		}
	}
	_, err = OpenUpstreamFile(filepath.Join(t.TempDir(), "x"))
	require.ErrorIs(t, err, os.ErrNotExist)
}

func readUpstream(b []byte) error {
	u, err := openUpstream(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return err
	}
	_, err = u.Metadata()
	return errors.Join(err, u.Close())
}

func known(err error) bool {
	return err == nil || errors.Is(err, ErrCorrupt) || errors.Is(err, ErrVersion) || errors.Is(err, ErrNotArchive)
}

// However an archive is cut or altered, it is read or refused.
func TestUpstreamAltered(t *testing.T) {
	b := write(t, &smallImage(t).Image)
	b = b[:clipEnd(t, b)]
	for n := range b {
		require.Error(t, readUpstream(b[:n]), "%d bytes", n)
		require.True(t, known(readUpstream(b[:n])), "%d bytes", n)
	}
	for i := range b {
		for _, mask := range []byte{0x01, 0x80, 0xff} {
			b[i] ^= mask
			err := readUpstream(b)
			b[i] ^= mask
			require.True(t, known(err), "byte %d: %v", i, err)
		}
	}
	b[len(clipMagic)]++
	err := readUpstream(b)
	require.ErrorIs(t, err, ErrVersion)
	require.ErrorContains(t, err, "CLIP format version 2: archive was written by a newer version: upgrade")
}

func clipEnd(tb testing.TB, b []byte) uint64 {
	tb.Helper()
	h, err := readClipHeader(&sections{r: bytes.NewReader(b), size: int64(len(b))})
	require.NoError(tb, err)
	return h.end()
}

// forgeUpstream is an archive with a file index that CLIP's writer encodes.
func forgeUpstream(tb testing.TB, info common.ClipStorageInfo, list ...*common.ClipNode) []byte {
	tb.Helper()
	index := btree.New(func(a, b any) bool { return a.(*common.ClipNode).Path < b.(*common.ClipNode).Path })
	for _, n := range list {
		if n.Attr.Mode == 0 {
			n.Attr.Mode = unix.S_IFREG | 0o644
		}
		index.Set(n)
	}
	path := filepath.Join(tb.TempDir(), "x.clip")
	require.NoError(tb, clip.NewClipArchiver().CreateRemoteArchive(info, &common.ClipArchiveMetadata{Index: index}, path))
	b, err := os.ReadFile(path)
	require.NoError(tb, err)
	return b
}

func TestUpstreamForged(t *testing.T) {
	oci := &common.OCIStorageInfo{Repository: "app"}
	root := func() *common.ClipNode {
		n := &common.ClipNode{Path: "/", NodeType: common.DirNode}
		n.Attr.Mode = unix.S_IFDIR | 0o755
		return n
	}
	require.NoError(t, readUpstream(forgeUpstream(t, oci, root())))
	device := &common.ClipNode{Path: "/dev"}
	device.Attr.Mode = unix.S_IFCHR
	for name, bad := range map[string]*common.ClipNode{
		"relative":        {Path: "etc"},
		"not clean":       {Path: "/a/../b"},
		"device":          device,
		"negative offset": {Path: "/f", Remote: &common.RemoteRef{UOffset: -1}},
		"negative length": {Path: "/f", Remote: &common.RemoteRef{ULength: -1}},
		"overflow":        {Path: "/f", Remote: &common.RemoteRef{UOffset: 1 << 62, ULength: 1 << 62}},
		"negative data":   {Path: "/f", DataPos: -1},
	} {
		require.ErrorIs(t, readUpstream(forgeUpstream(t, oci, root(), bad)), ErrCorrupt, name)
	}
	require.ErrorIs(t, readUpstream(forgeUpstream(t, oci, &common.ClipNode{Path: "/f"})), ErrCorrupt, "no root")

	// Data inside the archive must be inside it.
	b := forgeUpstream(t, &common.S3StorageInfo{}, root(), &common.ClipNode{Path: "/f", DataLen: 1 << 20})
	require.NoError(t, readUpstream(b))
	binary.LittleEndian.PutUint64(b[26:], 0) // no storage info
	require.ErrorIs(t, readUpstream(b), ErrCorrupt)
}

// A small file must not make a decoder allocate much.
func TestUpstreamBomb(t *testing.T) {
	b := forgeUpstream(t, &common.OCIStorageInfo{}, &common.ClipNode{Path: "/"})
	h, err := readClipHeader(&sections{r: bytes.NewReader(b), size: int64(len(b))})
	require.NoError(t, err)
	index := b[h.IndexPos:][:h.IndexLength]
	n, err := gobElements(index)
	require.NoError(t, err)
	require.EqualValues(t, 1, n)

	// The value becomes a list of a million empty nodes.
	const million = 1 << 20
	definitions, value := lastMessage(t, index)
	list := append(append(bytes.Clone(value[:2]), 0, 0xfd, million>>16, 0, 0), make([]byte, million)...) // its type number is above 63: two bytes
	forged := gobMessage(definitions, list)
	n, err = gobElements(forged)
	require.NoError(t, err)
	require.EqualValues(t, million, n)
	u := &Upstream{s: &sections{r: bytes.NewReader(forged), size: int64(len(forged))}}
	u.header.IndexLength = int64(len(forged))
	_, err = u.Metadata()
	require.ErrorIs(t, err, ErrCorrupt)
	require.ErrorContains(t, err, "1048576 elements")

	u.header.IndexLength = maxClipIndex + 1
	_, err = u.Metadata()
	require.ErrorIs(t, err, ErrCorrupt)
	binary.LittleEndian.PutUint64(b[26:], maxClipStorage+1)
	require.ErrorIs(t, readUpstream(b), ErrCorrupt)
}

// lastMessage splits a gob stream into the definitions of its types and its value.
func lastMessage(tb testing.TB, stream []byte) (definitions, value []byte) {
	tb.Helper()
	w := &gobWalker{b: stream}
	for len(w.b) > 0 {
		definitions = stream[:len(stream)-len(w.b)]
		var err error
		value, err = w.bytes()
		require.NoError(tb, err)
	}
	return definitions, value
}

// gobMessage is definitions with a message behind them.
func gobMessage(definitions, message []byte) []byte {
	return slices.Concat(definitions, binary.BigEndian.AppendUint64([]byte{0xf8}, uint64(len(message))), message)
}

func gobStream(tb testing.TB, v any) []byte {
	tb.Helper()
	var b bytes.Buffer
	require.NoError(tb, gob.NewEncoder(&b).Encode(v))
	return b.Bytes()
}

// mapBombs are gob streams whose last map, which is empty, claims 4 billion
// entries. Where it lies is said by the structs that end behind it.
func mapBombs(tb testing.TB) map[string][]byte {
	tb.Helper()
	bombs := map[string][]byte{}
	add := func(name string, depth int, v any) {
		definitions, value := lastMessage(tb, gobStream(tb, v))
		at := len(value) - depth - 1
		require.Equal(tb, make([]byte, depth+1), value[at:], "%s: the count and the ends", name)
		bombs[name] = gobMessage(definitions, append(bytes.Clone(value[:at]), 0xfc, 0xff, 0xff, 0xff, 0xff))
	}
	type image = common.ImageMetadata
	none := map[string]string{}
	add("GzipIdxByLayer", 1, common.OCIStorageInfo{GzipIdxByLayer: map[string]*common.GzipIndex{}})
	add("ZstdIdxByLayer", 1, common.OCIStorageInfo{ZstdIdxByLayer: map[string]*common.ZstdIndex{}})
	add("DecompressedHashByLayer", 1, common.OCIStorageInfo{DecompressedHashByLayer: none})
	add("Labels", 2, common.OCIStorageInfo{ImageMetadata: &image{Labels: none}})
	add("ExposedPorts", 2, common.OCIStorageInfo{ImageMetadata: &image{ExposedPorts: map[string]struct{}{}}})
	add("Volumes", 2, common.OCIStorageInfo{ImageMetadata: &image{Volumes: map[string]struct{}{}}})
	add("Annotations", 3, common.OCIStorageInfo{ImageMetadata: &image{LayersData: []common.LayerMetadata{{Annotations: none}}}})
	type nothing struct{ A int }
	add("skipped", 1, struct {
		Repository string
		Unknown    map[nothing]nothing
	}{"app", map[nothing]nothing{}})
	return bombs
}

// storageArchive is an archive with info as its storage info.
func storageArchive(tb testing.TB, info []byte) []byte {
	tb.Helper()
	b := forgeUpstream(tb, &common.OCIStorageInfo{}, &common.ClipNode{Path: "/"})
	h, err := readClipHeader(&sections{r: bytes.NewReader(b), size: int64(len(b))})
	require.NoError(tb, err)
	wrapped := gobStream(tb, common.StorageInfoWrapper{Type: "oci", Data: info})
	binary.LittleEndian.PutUint64(b[26:], uint64(len(wrapped)))
	return append(b[:h.StorageInfoPos], wrapped...)
}

// What a map claims to have must be there before there is room for it.
func TestUpstreamMapBomb(t *testing.T) {
	require.NoError(t, readUpstream(storageArchive(t, gobStream(t, common.OCIStorageInfo{ImageMetadata: &common.ImageMetadata{
		Labels: map[string]string{"a": "b"}, Created: time.Now(), Volumes: map[string]struct{}{"/data": {}}, Env: []string{"A=B"},
	}}))))
	for name, bomb := range mapBombs(t) {
		err := readUpstream(storageArchive(t, bomb))
		require.ErrorIs(t, err, ErrCorrupt, name)
		require.ErrorContains(t, err, "4294967295 elements in 0 bytes", name)
	}
}

// Streams that CLIP does not write are refused.
func TestGobTypes(t *testing.T) {
	type list []list
	deep := list{}
	for range maxGobDepth + 1 {
		deep = list{deep}
	}
	var fields []reflect.StructField
	for n := range maxGobTypes {
		fields = append(fields, reflect.StructField{Name: fmt.Sprintf("F%d", n), Type: reflect.ArrayOf(n+1, reflect.TypeFor[int]())})
	}
	gob.Register(0)
	definitions, value := lastMessage(t, gobStream(t, common.OCIStorageInfo{}))
	for name, c := range map[string]struct {
		stream []byte
		err    string
	}{
		"deep":            {gobStream(t, deep), "nested more than 16 deep"},
		"interface":       {gobStream(t, struct{ A any }{1}), "type 8 is none"},
		"undefined":       {gobMessage(nil, value), "is none that CLIP uses"},
		"types twice":     {bytes.Repeat(definitions, 2), "defined twice"},
		"many types":      {gobStream(t, reflect.Zero(reflect.StructOf(fields)).Interface()), "more than 64 are"},
		"field":           {gobMessage(definitions, append(bytes.Clone(value[:len(value)-1]), 100)), "a field that its type does not have"},
		"no message":      {definitions, "unexpected EOF"},
		"cut":             {gobMessage(definitions, value[:len(value)-1]), "unexpected EOF"},
		"longer than all": {[]byte{0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, "unexpected EOF"},
		"number":          {[]byte{0x80}, "malformed number"},
	} {
		_, err := gobElements(c.stream)
		require.ErrorContains(t, err, c.err, name)
	}
}

func FuzzUpstream(f *testing.F) {
	f.Add(write(f, &smallImage(f).Image))
	b, err := os.ReadFile(dataArchive(f))
	require.NoError(f, err)
	f.Add(b)
	f.Add(forgeUpstream(f, &common.S3StorageInfo{Bucket: "b"}, &common.ClipNode{Path: "/", Target: testimage.Content(1, 100)}))
	for _, bomb := range mapBombs(f) {
		f.Add(storageArchive(f, bomb))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := readUpstream(b); !known(err) {
			t.Errorf("unknown error: %v", err)
		}
	})
}

func TestSameRef(t *testing.T) {
	hash := digest.FromString("x").String()
	for _, same := range [][2]string{
		{"index.docker.io/library/alpine:latest", "alpine"}, {"index.docker.io/library/alpine:3", "docker.io/library/alpine:3"},
		{"localhost:5000/a@" + hash, "localhost:5000/a@" + hash},
	} {
		require.True(t, SameRef(same[0], same[1]), same)
	}
	for _, other := range [][2]string{{"alpine:3", "alpine:4"}, {"quay.io/a", "a"}, {"", ""}, {"Not A Ref", "Not A Ref"}} {
		require.False(t, SameRef(other[0], other[1]), other)
	}
}
