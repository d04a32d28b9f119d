package archive

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/btree"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

func TestSizes(t *testing.T) {
	require.Equal(t, footerSize, binary.Size(footer{}))
	require.Equal(t, recordSize, binary.Size(record{}))
	require.Equal(t, clipHeaderSize, binary.Size(clipHeader{}))
}

func TestWriteOpen(t *testing.T) {
	img := newImage(t, testStreams(t)...)
	img.Descriptor.Annotations = map[string]string{"of": "the index entry"}
	b := write(t, &img.Image)
	c, err := readAll(b)
	require.NoError(t, err)
	require.Equal(t, testRef, c.Info.StorageRef)
	require.Equal(t, img.Platform, c.Info.Platform)
	require.Equal(t, img.Descriptor.Digest, c.Info.Descriptor.Digest)
	require.Empty(t, c.Info.Descriptor.Annotations)
	require.Empty(t, c.Info.NotLazy)
	require.True(t, bytes.Equal(img.Manifest, c.Manifest))
	require.True(t, bytes.Equal(img.Config, c.Config))
	for i, l := range img.Layers {
		require.True(t, reflect.DeepEqual(l.Index, c.Layers[i]), "layer %d", i)
	}

	a, err := open(b)
	require.NoError(t, err)
	require.NoError(t, a.Close())
	require.Equal(t, identity.ChainIDs(append([]digest.Digest(nil), c.DiffIDs...)), a.ChainIDs())
	require.Equal(t, c.DiffIDs, a.DiffIDs(), "ChainIDs left the diff IDs alone")
	spans, err := a.Spans(1)
	require.NoError(t, err)
	require.Empty(t, spans.Entries)
	require.Equal(t, img.Layers[1].Index.DiffID, spans.DiffID)
}

// An archive that the first program wrote stays readable. It does not say how large
// its layers are.
func TestGolden(t *testing.T) {
	const path = "testdata/hello.clip"
	img := newImageLevel(t, 0,
		testimage.Tar(t, testimage.Dir("etc/"), testimage.Reg("etc/motd", "Hello.\n")),
		testimage.Tar(t, testimage.Reg("etc/.wh.motd", ""), testimage.Symlink("etc/issue", "motd")))
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	got, err := readAll(b)
	require.NoError(t, err)
	want, err := readAll(write(t, &img.Image))
	require.NoError(t, err)
	require.Empty(t, got.Info.Sizes)
	require.Len(t, want.Info.Sizes, 2)
	want.Info.Sizes = nil
	require.True(t, reflect.DeepEqual(want, got))
	a, err := open(b)
	require.NoError(t, err)
	files, err := a.Files(0)
	require.NoError(t, err)
	require.Equal(t, got.Layers[0].Entries, files.Entries)
	require.Equal(t, got.Layers[0].OutSize, files.OutSize)
	require.Empty(t, files.Spans)
}

// A description that says another size than the spans have does not pass.
func TestOtherSize(t *testing.T) {
	img := smallImage(t)
	a, err := open(write(t, &img.Image))
	require.NoError(t, err)
	id := img.Layers[1].Index.Digest
	require.Equal(t, img.Layers[1].Index.OutSize, a.info.Sizes[id])
	a.info.Sizes[id]++
	_, err = a.Files(1)
	require.NoError(t, err)
	_, err = a.Spans(1)
	require.ErrorIs(t, err, ErrCorrupt)
	_, err = a.Layer(1)
	require.ErrorIs(t, err, ErrCorrupt)
	require.ErrorIs(t, a.check(1), ErrCorrupt)
	for _, size := range []inflate.Out{-1, math.MinInt64, maxOutSize + 1, math.MaxInt64} {
		a.info.Sizes[id] = size
		_, err = a.Files(1)
		require.ErrorIs(t, err, ErrCorrupt, size)
	}
	a.info.Sizes[id] = 1
	_, err = a.Files(1)
	require.ErrorIs(t, err, ErrCorrupt, "its files lie behind the end")
}

func TestWriteDeterministic(t *testing.T) {
	want := digest.FromBytes(write(t, &newImage(t, testStreams(t)...).Image))
	for _, procs := range []int{1, 2, 8} {
		withProcs(t, procs)
		img := newImage(t, testStreams(t)...)
		for range 3 {
			require.Equal(t, want, digest.FromBytes(write(t, &img.Image)), "GOMAXPROCS=%d", procs)
		}
	}
}

func TestNotLazy(t *testing.T) {
	img := newImage(t, testStreams(t)...)
	img.Layers[1] = Layer{Reason: "zstd compression"}
	var b bytes.Buffer
	st, err := Write(&b, &img.Image)
	require.NoError(t, err)
	require.Equal(t, 1, st.NotLazy)
	a, err := open(b.Bytes())
	require.NoError(t, err)
	require.Equal(t, "zstd compression", a.NotLazy(1))
	require.Empty(t, a.NotLazy(0))
	_, err = a.Layer(1)
	require.ErrorIs(t, err, ErrCorrupt)
	_, err = a.Layer(2)
	require.NoError(t, err)

	m := extract(t, b.Bytes())
	require.Equal(t, 1, m.Index.Len(), "CLIP sees an empty root")
	info := m.StorageInfo.(common.OCIStorageInfo)
	require.Len(t, info.Layers, 3)
	require.Len(t, info.DecompressedHashByLayer, 2)
}

func TestNoLayers(t *testing.T) {
	c, err := readAll(write(t, &newImage(t).Image))
	require.NoError(t, err)
	require.Empty(t, c.Layers)
}

func TestWriteInvalid(t *testing.T) {
	for _, c := range []struct {
		want  string
		spoil func(*testImage)
	}{
		{"manifest does not match", func(img *testImage) { img.Manifest = append(img.Manifest, ' ') }},
		{"manifest does not match", func(img *testImage) { img.Descriptor.Digest = "" }},
		{"config does not match", func(img *testImage) { img.Config = append(img.Config, ' ') }},
		{"config does not match", func(img *testImage) {
			m := img.manifest(t)
			m.Config.Digest = "x"
			img.setManifest(t, m)
		}},
		{"manifest has 1 layers, config has 2", func(img *testImage) {
			m := img.manifest(t)
			m.Layers = m.Layers[:1]
			img.setManifest(t, m)
		}},
		{"1 layer indexes for the manifest's 2", func(img *testImage) { img.Layers = img.Layers[:1] }},
		{"neither", func(img *testImage) { img.Layers[1] = Layer{} }},
		{"its index is of", func(img *testImage) { img.Layers[0] = img.Layers[1] }},
		{"has 9 bytes, its index says", func(img *testImage) {
			m := img.manifest(t)
			m.Layers[1].Size = 9
			img.setManifest(t, m)
		}},
		{"unpacks to", func(img *testImage) { img.Layers[1].Index.DiffID = digest.FromString("x") }},
		{"reference is empty", func(img *testImage) { img.StorageRef = "" }},
		{"storage reference", func(img *testImage) { img.StorageRef = "UPPER CASE" }},
		{"layer 1", func(img *testImage) {
			x := img.Layers[1].Index
			x.Entries = append(x.Entries, layer.Entry{Name: "x", Type: layer.TypeLink, Link: "missing"})
		}},
	} {
		img := smallImage(t)
		c.spoil(img)
		_, err := Write(&bytes.Buffer{}, &img.Image)
		require.ErrorContains(t, err, c.want)
	}
	img := smallImage(t)
	img.Layers[1].Index.DiffID = digest.FromString("x")
	_, err := Write(&bytes.Buffer{}, &img.Image)
	require.ErrorIs(t, err, layer.ErrMismatch)
	require.Error(t, CheckStorageRef("UPPER CASE"))
	require.NoError(t, CheckStorageRef(testRef))
}

// fullDisk fails after n bytes.
type fullDisk struct{ n int }

var errFull = errors.New("disk full")

func (d *fullDisk) Write(p []byte) (int, error) {
	if d.n -= len(p); d.n < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestWriteFails(t *testing.T) {
	img := smallImage(t)
	for n := range len(write(t, &img.Image)) {
		_, err := Write(&fullDisk{n}, &img.Image)
		require.ErrorIs(t, err, errFull, "after %d bytes", n)
	}
}

// names lists a directory.
func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func TestWriteFile(t *testing.T) {
	img := smallImage(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "image.clip")
	for range 2 { // the second time it is there already
		st, err := WriteFile(path, &img.Image)
		require.NoError(t, err)
		fi, err := os.Stat(path)
		require.NoError(t, err)
		require.Equal(t, st.Size, fi.Size())
		require.Equal(t, os.FileMode(0o644), fi.Mode())
		require.Equal(t, []string{"image.clip"}, names(t, dir))
	}
	a, err := OpenFile(path)
	require.NoError(t, err)
	require.NoError(t, a.Close())
	require.Error(t, a.Close(), "the file was closed before")
}

func TestWriteFileKeepsOld(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "image.clip")
	require.NoError(t, os.WriteFile(path, []byte("old"), 0o600))
	bad := smallImage(t)
	bad.StorageRef = ""
	unreadable := smallImage(t) // what is written cannot be read back
	unreadable.Layers[1].Index.SpanSize = 1
	for _, img := range []*testImage{bad, unreadable} {
		_, err := WriteFile(path, &img.Image)
		require.Error(t, err)
		b, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, "old", string(b))
		require.Equal(t, []string{"image.clip"}, names(t, dir))
	}

	good := smallImage(t)
	_, err := WriteFile(filepath.Join(dir, "missing", "image.clip"), &good.Image)
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = WriteFile(filepath.Join(path, "image.clip"), &good.Image)
	require.Error(t, err, "the directory is a file")
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "taken", "x"), 0o755))
	_, err = WriteFile(filepath.Join(dir, "taken"), &good.Image)
	require.Error(t, err, "the target is a directory")
	require.Equal(t, []string{"image.clip", "taken"}, names(t, dir))
	if os.Getuid() != 0 {
		require.NoError(t, os.Chmod(dir, 0o555))
		_, err = WriteFile(filepath.Join(dir, "new.clip"), &good.Image)
		require.ErrorIs(t, err, os.ErrPermission)
	}
}

func TestOpenNotArchive(t *testing.T) {
	for _, b := range [][]byte{nil, []byte("x"), make([]byte, 4096), []byte(strings.Repeat("no archive ", 99)), clipMagic} {
		_, err := open(b)
		require.ErrorIs(t, err, ErrNotArchive)
	}
	path := filepath.Join(t.TempDir(), "x")
	_, err := OpenFile(path)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.NoError(t, os.WriteFile(path, []byte("x"), 0o600))
	_, err = OpenFile(path)
	require.ErrorIs(t, err, ErrNotArchive)
	require.ErrorContains(t, err, path)
}

// upstreamArchive is written by CLIP itself.
func upstreamArchive(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "upstream.clip")
	index := btree.New(func(a, b any) bool { return a.(*common.ClipNode).Path < b.(*common.ClipNode).Path })
	index.Set(&common.ClipNode{Path: "/", NodeType: common.DirNode})
	err := clip.NewClipArchiver().CreateRemoteArchive(&common.OCIStorageInfo{Repository: "app"}, &common.ClipArchiveMetadata{Index: index}, path)
	require.NoError(t, err)
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

func TestOpenUpstream(t *testing.T) {
	b := upstreamArchive(t)
	_, err := open(b)
	require.ErrorIs(t, err, ErrNoSections)
	_, err = open(b[:len(b)-1])
	require.ErrorIs(t, err, ErrCorrupt)
	_, err = open(append(b, 0))
	require.ErrorIs(t, err, ErrCorrupt)
}

func TestOpenVersion(t *testing.T) {
	b := write(t, &smallImage(t).Image)
	version := b[len(b)-footerSize+8:]
	require.EqualValues(t, formatVersion, binary.LittleEndian.Uint32(version))
	binary.LittleEndian.PutUint32(version, formatVersion+1)
	_, err := open(b)
	require.ErrorIs(t, err, ErrVersion)
	require.NotErrorIs(t, err, ErrCorrupt)
	require.ErrorContains(t, err, "format version 2")
}

// Every altered byte is found out or makes no difference.
func TestOpenAltered(t *testing.T) {
	img := smallImage(t)
	var buf bytes.Buffer
	st, err := Write(&buf, &img.Image)
	require.NoError(t, err)
	b := buf.Bytes()
	want, err := readAll(b)
	require.NoError(t, err)
	harmless := 0
	for i := range b {
		for _, mask := range []byte{0x01, 0x80} {
			b[i] ^= mask
			got, err := readAll(b)
			b[i] ^= mask
			known := errors.Is(err, ErrCorrupt) || errors.Is(err, ErrVersion) || errors.Is(err, ErrNotArchive) && i < len(clipMagic)
			switch {
			case err != nil && !known:
				t.Fatalf("byte %d: %v", i, err)
			case err == nil && !reflect.DeepEqual(want, got):
				t.Fatalf("byte %d: undetected", i)
			case err == nil && i >= int(st.Compat):
				harmless++
			}
		}
	}
	require.LessOrEqual(t, harmless, 2*8+1, "reserved bytes and a lower version")
}

func TestOpenTruncated(t *testing.T) {
	img := smallImage(t)
	var buf bytes.Buffer
	st, err := Write(&buf, &img.Image)
	require.NoError(t, err)
	b := buf.Bytes()
	for n := range b {
		want := ErrCorrupt
		switch {
		case n < clipHeaderSize:
			want = ErrNotArchive
		case n == int(st.Compat): // what is left is an archive of upstream's
			want = ErrNoSections
		}
		_, err := open(b[:n])
		require.ErrorIs(t, err, want, "%d bytes", n)
		_, err = Open(bytes.NewReader(b[:n]), int64(len(b))) // the file became shorter
		require.Error(t, err, "%d bytes", n)
	}
	_, err = open(append(b, 0))
	require.ErrorIs(t, err, ErrCorrupt)
}

// section is one that a forged archive holds.
type section struct {
	kind, layer int
	raw         []byte
}

// forge writes an archive of any sections, with digests that are right.
func forge(tb testing.TB, sections []section, alter func([]record)) []byte {
	tb.Helper()
	b := bytes.NewBuffer(append(bytes.Clone(clipMagic), make([]byte, clipHeaderSize-len(clipMagic))...))
	enc, err := newEncoder()
	require.NoError(tb, err)
	s := new(sectionWriter)
	for _, sec := range sections {
		f := compress(enc, sec.raw)
		if sec.kind == kindWindows {
			f = plain(sec.raw)
		}
		s.add(sec.kind, sec.layer, f)
	}
	if alter != nil {
		alter(s.table)
	}
	pieces, err := s.finish(uint64(b.Len()))
	require.NoError(tb, err)
	return append(b.Bytes(), slices.Concat(pieces...)...)
}

func (img *testImage) sections(tb testing.TB) []section {
	list := []section{
		{kindInfo, 0, mustJSON(tb, img.info(img.manifest(tb)))}, {kindManifest, 0, img.Manifest}, {kindConfig, 0, img.Config},
	}
	for i, l := range img.Layers {
		list = append(list, section{kindSpans, i, l.Index.AppendSpans(nil)}, section{kindEntries, i, l.Index.AppendEntries(nil)})
	}
	return list
}

func TestOpenForged(t *testing.T) {
	img, other := smallImage(t), newImage(t, testStreams(t)[1:]...)
	good := img.sections(t)
	unknown := append([]section{{99, 0, []byte("of a later version")}}, good...)
	_, err := readAll(forge(t, unknown, nil))
	require.NoError(t, err)
	with := func(i int, raw []byte) []section {
		list := append([]section(nil), good...)
		list[i].raw = raw
		return list
	}
	info := img.info(img.manifest(t))
	info.Descriptor.Digest = "sha256:no"
	wrongSize := *img.Layers[0].Index
	wrongSize.Size++
	wrongID := *img.Layers[0].Index
	wrongID.DiffID = digest.FromString("x")
	var config ocispec.Image
	require.NoError(t, json.Unmarshal(img.Config, &config))
	config.RootFS.DiffIDs[0] = "nonsense"
	badConfig := *img
	badConfig.Config = mustJSON(t, config)
	m := img.manifest(t)
	m.Config = testimage.Descriptor(ocispec.MediaTypeImageConfig, badConfig.Config)
	badConfig.setManifest(t, m)
	for name, b := range map[string][]byte{
		"no sections":      forge(t, nil, nil),
		"no info":          forge(t, good[1:], nil),
		"no entries":       forge(t, good[:len(good)-1], nil),
		"info no JSON":     forge(t, with(0, []byte("{")), nil),
		"bad digest":       forge(t, with(0, mustJSON(t, info)), nil),
		"other manifest":   forge(t, with(1, other.Manifest), nil),
		"other config":     forge(t, with(2, other.Config), nil),
		"bad diff ID":      forge(t, badConfig.sections(t), nil),
		"other spans":      forge(t, with(3, other.Layers[0].Index.AppendSpans(nil)), nil),
		"other size":       forge(t, with(3, wrongSize.AppendSpans(nil)), nil),
		"other diff ID":    forge(t, with(3, wrongID.AppendSpans(nil)), nil),
		"spans malformed":  forge(t, with(3, []byte("spans")), nil),
		"no spans":         forge(t, with(3, nil), nil),
		"other entries":    forge(t, with(4, other.Layers[1].Index.AppendEntries(nil)), nil),
		"longer declared":  forge(t, good, func(r []record) { r[1].Raw++ }),
		"shorter declared": forge(t, good, func(r []record) { r[1].Raw-- }),
		"huge declared":    forge(t, good, func(r []record) { r[1].Raw = 1 << 62 }),
		"huge stored":      forge(t, good, func(r []record) { r[1].Stored = 1 << 62 }),
		"beyond the end":   forge(t, good, func(r []record) { r[1].Offset = 1<<64 - 1 }),
		"bomb":             forge(t, with(4, make([]byte, 64<<20)), func(r []record) { r[4].Raw = 1 << 10 }),
		"no manifest":      forge(t, good, func(r []record) { r[1].Kind = 7 }),
	} {
		_, err := readAll(b)
		require.ErrorIs(t, err, ErrCorrupt, name)
	}
}

// mergeFiles merges the layers of an archive as one does whose spans are still coming.
func mergeFiles(b []byte) error {
	a, err := open(b)
	if err != nil {
		return err
	}
	var layers []*layer.Index
	for i := range a.DiffIDs() {
		if a.NotLazy(i) != "" {
			break
		}
		x, err := a.Files(i)
		if err != nil {
			return err
		}
		layers = append(layers, x)
	}
	_, err = tree.Merge(layers)
	return err
}

func FuzzOpen(f *testing.F) {
	f.Add(write(f, &smallImage(f).Image))
	f.Add(forge(f, smallImage(f).sections(f), nil))
	f.Add(write(f, &recordedImage(f).Image))
	f.Add(forge(f, nil, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, err := readAll(b)
		if err == nil {
			err = mergeFiles(b)
		}
		if err == nil {
			return
		}
		for _, known := range []error{ErrNotArchive, ErrNoSections, ErrVersion, ErrCorrupt, tree.ErrInvalid, tree.ErrUnsupported} {
			if errors.Is(err, known) {
				return
			}
		}
		t.Errorf("unknown error: %v", err)
	})
}
