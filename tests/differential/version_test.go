package differential

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/plugin/clipindex"
	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/snapshotter/contents"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// written is a file that somebody wrote, in a directory of its own.
type written struct {
	by    string
	path  string
	image digest.Digest // the manifest of the image that it should be of
}

// versions makes every kind of file that there is or can come.
func versions(t *testing.T) (files []written, layout string) {
	t.Helper()
	l, err := images.NewLayout(filepath.Join(t.TempDir(), "layout"))
	require.NoError(t, err)
	one, err := l.AddLayer(layer{root, file("f", "content")}.write)
	require.NoError(t, err)
	desc, err := l.AddImage(ref, ocispec.ImageConfig{}, one)
	require.NoError(t, err)
	require.NoError(t, l.Finish())
	source, img := open(t, l.Dir)
	add := func(by string, make func(path string)) {
		path := filepath.Join(t.TempDir(), "a.clip")
		make(path)
		files = append(files, written{by, path, desc.Digest})
	}
	data := func(path string) {
		in := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(in, "f"), []byte("content"), 0o644))
		require.NoError(t, clip.SetLogLevel("disabled"))
		require.NoError(t, clip.CreateArchive(clip.CreateOptions{InputPath: in, OutputPath: path}))
	}
	theirs := func(path string) {
		require.NoError(t, clipindex.WriteFile(t.Context(), path, source.Provider, img, nil))
	}
	ours := func(path string) {
		indexed, err := index.Run(t.Context(), source.Provider, img, index.Options{})
		require.NoError(t, err)
		_, err = archive.WriteFile(path, indexed)
		require.NoError(t, err)
	}
	add("CLIP v1, data inside", data)
	add("CLIP v1, data in S3", func(path string) {
		data(path)
		m, err := clip.NewClipArchiver().ExtractMetadata(path)
		require.NoError(t, err)
		require.NoError(t, clip.NewClipArchiver().CreateRemoteArchive(&common.S3StorageInfo{Bucket: "b", Key: "k"}, m, path))
	})
	add("CLIP v2, an image", theirs)
	add("CLIP, a later version", func(path string) {
		theirs(path)
		alter(t, path, func(b []byte) []byte {
			b[len(common.ClipFileStartBytes)]++
			return b
		})
	})
	add("format 1, the first program", func(path string) {
		b, err := os.ReadFile("../../archive/testdata/hello.clip")
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(path, b, 0o644))
		a, err := archive.OpenFile(path)
		require.NoError(t, err)
		desc.Digest = a.Info().Descriptor.Digest
		require.NoError(t, a.Close())
	})
	desc.Digest = img.Descriptor.Digest
	add("format 1, this program", ours)
	add("format 1, with sections that came later", func(path string) {
		ours(path)
		alter(t, path, withSection)
	})
	add("format 2", func(path string) {
		ours(path)
		alter(t, path, func(b []byte) []byte {
			b[len(b)-footerSize+8]++
			return b
		})
	})
	return files, l.Dir
}

// Sizes of the footer and of a record of the section table, as docs/format.md has them.
const footerSize, recordSize = 64, 64

// withSection adds an empty section of a kind that nobody knows.
func withSection(b []byte) []byte {
	foot := bytes.Clone(b[len(b)-footerSize:])
	count, off := binary.LittleEndian.Uint32(foot[12:]), binary.LittleEndian.Uint64(foot[16:])
	record := make([]byte, recordSize)
	binary.LittleEndian.PutUint32(record, 9999)
	table := append(bytes.Clone(b[off:len(b)-footerSize]), record...)
	binary.LittleEndian.PutUint32(foot[12:], count+1)
	sum := sha256.Sum256(table)
	copy(foot[24:], sum[:])
	return append(append(b[:off:off], table...), foot...)
}

func alter(t *testing.T, path string, how func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, how(b), 0o644))
}

// registry delivers the blobs of a layout.
type registry string

func (r registry) Fetch(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return os.Open(filepath.Join(string(r), ocispec.ImageBlobsDir, desc.Digest.Algorithm().String(), desc.Digest.Encoded()))
}

// inCLIP, inSnapshotter and inClipctl say what a reader makes of a file.
func inCLIP(w written) string {
	m, err := clip.NewClipArchiver().ExtractMetadata(w.path)
	if err != nil {
		return "refuses: " + err.Error()
	}
	return fmt.Sprintf("reads %d files", m.Index.Len())
}

func inSnapshotter(t *testing.T, w written, layout string) string {
	t.Helper()
	f := discover.New(discover.Options{Dir: filepath.Dir(w.path), Fetcher: func(context.Context, string) (remotes.Fetcher, error) { return registry(layout), nil }})
	defer f.Close()
	a, release, err := f.Find(t.Context(), discover.Image{Ref: ref, Manifest: w.image})
	if errors.Is(err, archive.ErrVersion) {
		return "unpacks the image, and says: " + strings.TrimPrefix(strings.Split(err.Error(), ";")[0], "archive "+w.path+": ")
	}
	if errdefs.IsNotFound(err) {
		return "passes it over"
	}
	require.NoError(t, err)
	defer release()
	x, err := a.Layer(0)
	require.NoError(t, err)
	require.NotEmpty(t, x.Entries)
	if made, _ := filepath.Glob(filepath.Join(filepath.Dir(w.path), ".indexed", "*.clip")); len(made) > 0 {
		return "indexes the layers, then reads lazily"
	}
	return "reads lazily"
}

func inClipctl(w written) string {
	a, err := contents.Open(w.path, contents.Options{})
	if err != nil {
		return "refuses: " + strings.TrimPrefix(err.Error(), "archive "+w.path+": ")
	}
	defer a.Close()
	d, err := a.Describe()
	if err != nil {
		return "refuses: " + err.Error()
	}
	return fmt.Sprintf("reads %d files", d.Files)
}

// TestVersions has every reader read what every writer wrote: docs/format.md says what comes of it.
func TestVersions(t *testing.T) {
	files, layout := versions(t)
	var table strings.Builder
	table.WriteString("| written by | upstream CLIP | snapshotter | clipctl |\n|---|---|---|---|\n")
	for _, w := range files {
		fmt.Fprintf(&table, "| %s | %s | %s | %s |\n", w.by, inCLIP(w), inSnapshotter(t, w, layout), inClipctl(w))
	}
	requireInDoc(t, "../../docs/format.md", table.String())
}
