// Package differential compares what upstream CLIP's indexer and ours put into the part of an archive that CLIP reads.
package differential

import (
	"archive/tar"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/plugin/clipindex"
	"github.com/beam-cloud/containerd-clip/plugin/export"
	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

var update = flag.Bool("update", false, "write what is found into the documents")

const ref = "registry.example.com/team/app:1"

// entry is a tar entry and its content.
type entry struct {
	tar.Header
	body string
}

// stamp is when everything was made.
var stamp = time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)

func file(name, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, body}
}

func dir(name string) entry {
	return entry{tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}, ""}
}

func symlink(name, target string) entry {
	return entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func link(name, target string) entry {
	return entry{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, ""}
}

func special(typeflag byte, name string) entry {
	return entry{tar.Header{Typeflag: typeflag, Name: name, Mode: 0o600, Devmajor: 1, Devminor: 3}, ""}
}

func (e entry) mode(mode int64) entry {
	e.Mode = mode
	return e
}

// at gives the entry a modification time alone: most tars have no other.
func (e entry) at(t time.Time) entry {
	e.ModTime = t
	return e
}

// times gives the entry three different times.
func (e entry) times(modified, accessed, changed time.Time) entry {
	e.ModTime, e.AccessTime, e.ChangeTime = modified, accessed, changed
	return e
}

func (e entry) xattr(key, value string) entry {
	e.PAXRecords = map[string]string{"SCHILY.xattr." + key: value}
	return e
}

type layer []entry

// write writes the layer. Entries without a time of their own have all three.
func (l layer) write(w io.Writer) error {
	tw := tar.NewWriter(w)
	for _, e := range l {
		h := e.Header
		h.Format, h.Size = tar.FormatPAX, int64(len(e.body))
		if h.ModTime.IsZero() {
			h.ModTime, h.AccessTime, h.ChangeTime = stamp, stamp, stamp
		}
		if err := tw.WriteHeader(&h); err != nil {
			return err
		}
		if _, err := io.WriteString(tw, e.body); err != nil {
			return err
		}
	}
	return tw.Close()
}

// root makes the image's root be described; CLIP else takes the time of indexing.
var root = dir(".")

// sample is an image and why the two indexers see it differently.
type sample struct {
	name   string
	why    string // empty if they see the same
	layers []layer
	// add, if set, adds the layers instead.
	add func(*images.Layout) ([]images.Layer, error)
}

var samples = []sample{
	{name: "an ordinary image", layers: []layer{
		{root, dir("bin"), file("bin/sh", "#!").mode(0o755), symlink("bin/ash", "sh"), dir("etc"), file("etc/empty", ""), file("./etc/dotted", "x"), file("etc/gone", "x"), dir("var"), file("var/old", "x"), file("etc/twice", "one"), file("etc/twice", "two!")},
		{root, dir("etc"), file("etc/.wh.gone", ""), file("etc/new", "y"), file("var/.wh..wh..opq", ""), dir("var"), file("var/new", "z"), file("was-file", "x")},
		{root, dir("was-file"), file("was-file/now", "a directory"), file("etc/"+strings.Repeat("n", 200), "long"), file("etc/raw\xff", "bytes")},
	}},
	{name: "names, links, owners and sizes at their ends", layers: []layer{
		{
			root, dir(strings.Repeat("d", 200)), dir(strings.Repeat("d", 200) + "/" + strings.Repeat("e", 200)),
			file(strings.Repeat("d", 200)+"/"+strings.Repeat("e", 200)+"/"+strings.Repeat("f", 255), "far down"),
			symlink("long", strings.Repeat("../x/", 70)+"target"), symlink("dangling", "/nowhere"), file("/absolute", "x"), file("sp ace\n", "x"),
			func() entry { e := file("owner", "x"); e.Uid, e.Gid = 4000000000, 3000000000; return e }(),
			file("none", "x").mode(0), file("large", strings.Repeat("0123456789abcdef", 1<<18)),
		},
		{}, // nothing in it
	}},
	{name: "whiteouts of many kinds", layers: []layer{
		{root, dir("d"), dir("d/e"), file("d/e/f", "x"), file("d-sibling", "x"), file("d2", "x"), symlink("s", "d"), file("a", "x")},
		{root, file(".wh.d", ""), file(".wh.s", ""), file(".wh.never-was", ""), file("a", "y")},
		{root, symlink("d", "d2"), dir("s"), file("s/f", "x")},
	}},
	{name: "attributes, devices and pipes", layers: []layer{
		{root, file("ping", "x").xattr("security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
			special(tar.TypeChar, "null"), special(tar.TypeBlock, "disk"), special(tar.TypeFifo, "pipe")},
		{root, file("null", "now a file")},
	}},
	{name: "an opaque root", layers: []layer{{root, file("a", "x")}, {root, file(".wh..wh..opq", ""), file("b", "y")}}},
	{name: "setuid, setgid and sticky bits", why: "CLIP's indexer keeps the lowest nine bits of a mode. Programs like sudo need the others.", layers: []layer{
		{root, file("su", "x").mode(0o4755), file("write", "x").mode(0o2755), dir("tmp").mode(0o1777)},
	}},
	{name: "directories that no entry describes", why: "CLIP's indexer lists the file but not the directories above it, so that nobody can reach it.", layers: []layer{
		{root, file("mp/a/c.txt", "x")},
	}},
	{name: "a path through a symbolic link", why: "CLIP's indexer puts the file below the link, where a lookup never comes.", layers: []layer{
		{root, dir("usr"), dir("usr/lib"), symlink("lib", "usr/lib"), file("lib/through", "x")},
	}},
	{name: "a directory replaced by a file", why: "CLIP's indexer leaves the directory's files in its index. They cannot be reached, unless a later layer makes the directory again: then they come back.", layers: []layer{
		{root, dir("d"), file("d/child", "x")}, {root, file("d", "now a file")}, {root, dir("d"), file("d/new", "y")},
	}},
	{name: "a directory replaced by a symbolic link", why: "CLIP's indexer leaves the directory's files in its index. They cannot be reached.", layers: []layer{
		{root, dir("d"), file("d/child", "x"), dir("e")}, {root, symlink("d", "e")},
	}},
	{name: "an opaque marker behind new files", why: "A marker hides what lower layers hold. CLIP's indexer also removes what the same layer said before it.", layers: []layer{
		{root, dir("d"), file("d/old", "x")}, {root, dir("d"), file("d/new", "y"), file("d/.wh..wh..opq", "")},
	}},
	{name: "a directory removed and made again in one layer", why: "containerd, and so this project, shows the old files: overlayfs has no mark that hides them. CLIP hides them, as the OCI specification has it.", layers: []layer{
		{root, dir("d"), file("d/old", "x")}, {root, file(".wh.d", ""), dir("d"), file("d/new", "y")},
	}},
	{name: "a whiteout behind its own file", why: "containerd refuses such a layer, unless it is the lowest, and so does this project. CLIP's indexer removes the file.", layers: []layer{
		{root, file("f", "old")}, {root, file("f", "x"), file(".wh.f", "")},
	}},
	{name: "hard links", why: "CLIP's indexer gives both names one inode, with a link count of 1.", layers: []layer{
		{root, file("a", "x"), link("b", "a")},
	}},
	{name: "a hard link whose target is deleted above", why: "The file has its other name, with the content. CLIP's indexer gives it a link count of 1, containerd shows what the lower layer has.", layers: []layer{
		{root, file("a", "x"), link("b", "a")}, {root, file(".wh.a", "")},
	}},
	{name: "a hard link whose target is replaced above", why: "The other name keeps the content.", layers: []layer{
		{root, file("a", "x"), link("b", "a")}, {root, file("a", "new")},
	}},
	{name: "a device over a file", why: "CLIP has no words for devices. CLIP's indexer leaves the lower layer's file in its index, with its content.", layers: []layer{
		{root, file("null", "x"), file("disk", "x"), file("pipe", "x")}, {root, special(tar.TypeChar, "null"), special(tar.TypeBlock, "disk"), special(tar.TypeFifo, "pipe")},
	}},
	{name: "a device over a directory", why: "CLIP's indexer leaves the directory, with all that is in it, in its index.", layers: []layer{
		{root, dir("d"), file("d/child", "x")}, {root, special(tar.TypeFifo, "d")},
	}},
	{name: "a hard link to a symbolic link", why: "CLIP's indexer makes it a file without a target. Reading it fails, and once it was looked up reading the original fails too.", layers: []layer{
		{root, file("f", "x"), symlink("s", "f"), link("t", "s")},
	}},
	{name: "a hard link into a lower layer", why: "containerd refuses such a layer, since the file is not in it, and so does this project.", layers: []layer{
		{root, file("a", "x")}, {root, link("b", "a")},
	}},
	{name: "a tar without access and change times", why: "CLIP's indexer stores the year 1. Here both are the modification time.", layers: []layer{
		{root, file("f", "x").at(stamp)},
	}},
	{name: "access and change times of their own", why: "CLIP's indexer stores them. Here both are the modification time: an index has no other, like the file system of roots.", layers: []layer{
		{root, file("f", "x").times(stamp.Add(5*time.Microsecond), stamp.Add(time.Hour+time.Nanosecond), stamp.Add(time.Minute)), dir("d").times(stamp, stamp.Add(-time.Hour), stamp)},
	}},
	{name: "an image that does not describe its root", why: "CLIP's indexer takes the time of indexing, so that no two archives are the same. Here it is 1970.", layers: []layer{
		{file("f", "x")},
	}},
	{name: "a time before 1970", why: "containerd takes 1970 for it, and so does this project.", layers: []layer{
		{root, func() entry {
			e := file("f", "x")
			e.ModTime = time.Unix(-1000, 0)
			e.AccessTime, e.ChangeTime = e.ModTime, e.ModTime
			return e
		}()},
	}},
	{name: "a sparse file", why: "CLIP's indexer takes the condensed data for the file's own: reads give other bytes. CLIP has no words for holes, so an archive of ours leaves the file out of the part that CLIP reads.", add: func(l *images.Layout) ([]images.Layer, error) {
		one, err := l.AddLayer(images.WriteSparse) // four files
		return []images.Layer{one}, err
	}},
	{name: "a sparse file of 9 GiB that is all hole", why: "It is like the others.", add: func(l *images.Layout) ([]images.Layer, error) {
		one, err := l.AddLayer(images.WriteHole)
		return []images.Layer{one}, err
	}},
	{name: "a sparse file in GNU tar's old format", why: "containerd refuses such a layer, and so does this project. CLIP's indexer leaves the file out.", add: func(l *images.Layout) ([]images.Layer, error) {
		one, err := l.AddLayer(images.WriteOldSparse)
		return []images.Layer{one}, err
	}},
	{name: "a layer that is not compressed", why: "CLIP's indexer fails. Here the files are listed; CLIP can read them only from its caches.", add: func(l *images.Layout) ([]images.Layer, error) {
		one, err := l.AddPlainLayer(layer{root, file("f", "x")}.write)
		return []images.Layer{one}, err
	}},
	{name: "a zstd layer", why: "CLIP's indexer fails. Here the files are listed; CLIP can read them only from its caches.", add: func(l *images.Layout) ([]images.Layer, error) {
		one, err := l.AddZstdLayer(layer{root, file("f", "x")}.write)
		return []images.Layer{one}, err
	}},
}

// TestDifferences indexes images with both indexers. Where CLIP's is right they agree; every other difference is in
// docs/compatibility.md.
func TestDifferences(t *testing.T) {
	var doc strings.Builder
	for _, s := range samples {
		diffs := s.compare(t)
		if s.why == "" {
			require.Empty(t, diffs, s.name)
			continue
		}
		require.NotEmpty(t, diffs, "%s: the difference is gone: CLIP has changed", s.name)
		fmt.Fprintf(&doc, "**%s%s.** %s\n\n", strings.ToUpper(s.name[:1]), s.name[1:], s.why)
		for _, d := range diffs {
			fmt.Fprintf(&doc, "* %s\n", d)
		}
		doc.WriteString("\n")
	}
	requireInDoc(t, "../../docs/compatibility.md", doc.String())
}

const (
	docStart = "<!-- made by: go test ./tests/differential -update -->\n\n"
	docEnd   = "<!-- end of what is made -->\n"
)

// requireInDoc compares what a test found with what a document says, or writes it there.
func requireInDoc(t *testing.T, docFile, list string) {
	t.Helper()
	b, err := os.ReadFile(docFile)
	require.NoError(t, err)
	before, rest, ok := strings.Cut(string(b), docStart)
	require.True(t, ok, "no mark %q in %s", docStart, docFile)
	have, after, ok := strings.Cut(rest, docEnd)
	require.True(t, ok, "no mark %q in %s", docEnd, docFile)
	if *update {
		require.NoError(t, os.WriteFile(docFile, []byte(before+docStart+strings.TrimSpace(list)+"\n\n"+docEnd+after), 0o644))
		return
	}
	require.Equal(t, strings.TrimSpace(have), strings.TrimSpace(list), "%s is out of date; look at what changed, then run with -update", docFile)
}

// compare indexes the sample twice and says every difference.
func (s sample) compare(t *testing.T) []string {
	t.Helper()
	l, err := images.NewLayout(filepath.Join(t.TempDir(), "layout"))
	require.NoError(t, err)
	var layers []images.Layer
	if s.add != nil {
		layers, err = s.add(l)
		require.NoError(t, err)
	}
	for _, entries := range s.layers {
		one, err := l.AddLayer(entries.write)
		require.NoError(t, err)
		layers = append(layers, one)
	}
	_, err = l.AddImage(ref, ocispec.ImageConfig{
		User: "7:8", Env: []string{"PATH=/bin", "A=b"}, Entrypoint: []string{"/bin/sh"}, Cmd: []string{"-c", "true"}, WorkingDir: "/tmp",
		Labels: map[string]string{"b": "2", "a": "1"}, StopSignal: "SIGINT",
		ExposedPorts: map[string]struct{}{"80/tcp": {}}, Volumes: map[string]struct{}{"/data": {}},
	}, layers...)
	require.NoError(t, err)
	require.NoError(t, l.Finish())
	theirs, err := indexTheirs(t, l.Dir)
	ours, reason, ourErr := indexOurs(t, l.Dir)
	switch {
	case reason != "":
		require.NoError(t, err)
		return append([]string{"here: no index, so that CLIP shows an empty root: " + layerName.ReplaceAllString(reason, "")}, compareTrees(theirs, ours)...)
	case ourErr != nil:
		require.NoError(t, err)
		return []string{"here: " + lastOf(ourErr)}
	case err != nil:
		return []string{"CLIP's indexer: " + lastOf(err), "here: `" + strings.Join(slices.Sorted(maps.Keys(tree(ours))), "`, `") + "`"}
	}
	compareStorage(t, theirs, ours)
	return compareTrees(theirs, ours)
}

// layerName is how errors name a layer; the names of the samples' layers say nothing.
var layerName = regexp.MustCompile(`^.*(layer [0-9]+|layer sha256:[0-9a-f]{64}|sha256:[0-9a-f]{64}):+ (: )?`)

// lastOf is what the first line of an error says of the cause.
func lastOf(err error) string {
	text, _, _ := strings.Cut(err.Error(), "\n")
	return layerName.ReplaceAllString(text, "")
}

func open(t *testing.T, dir string) (*export.Source, index.Image) {
	t.Helper()
	source, err := export.FromLayout(dir, "")
	require.NoError(t, err)
	manifests, err := source.Manifests(t.Context(), export.Selection{Name: "any", Match: platforms.All, All: true})
	require.NoError(t, err)
	m := manifests[0]
	return source, index.Image{
		StorageRef: ref, Platform: m.Platform, Descriptor: m.Descriptor, Manifest: m.Raw, Config: m.Config, Layers: m.Layers,
	}
}

func indexTheirs(t *testing.T, dir string) (*common.ClipArchiveMetadata, error) {
	t.Helper()
	source, img := open(t, dir)
	path := filepath.Join(t.TempDir(), "theirs.clip")
	if err := clipindex.WriteFile(t.Context(), path, source.Provider, img, nil); err != nil {
		return nil, err
	}
	return clip.NewClipArchiver().ExtractMetadata(path)
}

// indexOurs also says why the image is not lazy, if it is not.
func indexOurs(t *testing.T, dir string) (m *common.ClipArchiveMetadata, reason string, err error) {
	t.Helper()
	source, img := open(t, dir)
	indexed, err := index.Run(t.Context(), source.Provider, img, index.Options{})
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "ours.clip")
	if _, err := archive.WriteFile(path, indexed); err != nil {
		return nil, "", err
	}
	for _, l := range indexed.Layers {
		reason += l.Reason
	}
	m, err = clip.NewClipArchiver().ExtractMetadata(path)
	return m, reason, err
}

// compareStorage makes sure that the storage infos are equal, but for checkpoints: ours has none.
func compareStorage(t *testing.T, theirs, ours *common.ClipArchiveMetadata) {
	t.Helper()
	a, b := theirs.StorageInfo.(common.OCIStorageInfo), ours.StorageInfo.(common.OCIStorageInfo)
	for _, x := range b.GzipIdxByLayer {
		require.Empty(t, x.Checkpoints)
	}
	for _, x := range a.GzipIdxByLayer {
		x.Checkpoints = nil
	}
	require.Equal(t, a, b)
}

// node is what is compared of a file: all that CLIP serves, but for the link count of directories, which CLIP has as 2
// always, and for inode numbers, of which only matters who shares them.
type node struct {
	kind                string
	mode                string
	owner, size         string
	mtime, atime, ctime string
	target              string
	links               uint32
	peers, data         string
}

func tree(m *common.ClipArchiveMetadata) map[string]node {
	peers := map[uint64][]string{}
	walk(m, func(n *common.ClipNode) { peers[n.Attr.Ino] = append(peers[n.Attr.Ino], n.Path) })
	found := map[string]node{}
	walk(m, func(n *common.ClipNode) {
		a := n.Attr
		at := func(sec uint64, nsec uint32) string {
			when := time.Unix(int64(sec), int64(nsec)).UTC()
			if time.Since(when) < time.Hour {
				return "the time of indexing"
			}
			return when.Format(time.RFC3339Nano)
		}
		e := node{
			kind: string(n.NodeType), mode: fmt.Sprintf("%o", a.Mode), owner: fmt.Sprint(a.Uid, ":", a.Gid), size: fmt.Sprint(a.Size, " in ", a.Blocks),
			mtime: at(a.Mtime, a.Mtimensec), atime: at(a.Atime, a.Atimensec), ctime: at(a.Ctime, a.Ctimensec),
			target: n.Target, links: a.Nlink, peers: strings.Join(peers[a.Ino], " "),
		}
		if n.NodeType == common.DirNode {
			e.links = 0
		}
		if n.Remote != nil {
			e.data = fmt.Sprintf("%d bytes at %d of %s", n.Remote.ULength, n.Remote.UOffset, n.Remote.LayerDigest)
		}
		found[n.Path] = e
	})
	return found
}

func walk(m *common.ClipArchiveMetadata, fn func(*common.ClipNode)) {
	m.Index.Ascend(nil, func(n any) bool {
		fn(n.(*common.ClipNode))
		return true
	})
}

func compareTrees(theirs, ours *common.ClipArchiveMetadata) (diffs []string) {
	a, b := tree(theirs), tree(ours)
	all := maps.Clone(a)
	maps.Copy(all, b)
	for _, path := range slices.Sorted(maps.Keys(all)) {
		x, inTheirs := a[path]
		y, inOurs := b[path]
		switch {
		case !inOurs:
			diffs = append(diffs, fmt.Sprintf("`%s` is only in CLIP's", path))
		case !inTheirs:
			diffs = append(diffs, fmt.Sprintf("`%s` is missing in CLIP's", path))
		default:
			diffs = append(diffs, x.diff(path, y)...)
		}
	}
	return diffs
}

func (n node) diff(path string, ours node) (diffs []string) {
	for _, f := range []struct {
		what         string
		theirs, ours any
	}{
		{"type", n.kind, ours.kind}, {"mode", n.mode, ours.mode}, {"owner", n.owner, ours.owner}, {"size", n.size, ours.size},
		{"modification time", n.mtime, ours.mtime}, {"access time", n.atime, ours.atime}, {"change time", n.ctime, ours.ctime},
		{"target", n.target, ours.target}, {"link count", n.links, ours.links}, {"names of the inode", n.peers, ours.peers}, {"data", n.data, ours.data},
	} {
		if f.theirs != f.ours {
			diffs = append(diffs, fmt.Sprintf("`%s`: %s is `%v` in CLIP's, `%v` here", path, f.what, f.theirs, f.ours))
		}
	}
	return diffs
}
