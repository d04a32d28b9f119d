package differential

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/beam-cloud/clip/pkg/storage"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	layers "github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/plugin/clipindex"
	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/snapshotter/contents"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// written is a file that somebody wrote, in a directory of its own.
type written struct {
	by    string
	path  string
	image digest.Digest     // the manifest of the image that it should be of
	files map[string]string // what is in it: content of files, "-> " and target of links, "" of directories
	lower map[string]string // what is in the image's layers: content of files
}

// places is where data is that is not in an archive.
type places struct {
	ref    string // of the image, in a registry
	bucket string // URL of an S3 endpoint
	client *remote.Client
}

// newPlaces starts a registry, and a server that delivers what S3 does to who only reads: objects, whole or in ranges.
func newPlaces(t *testing.T, objects string) places {
	t.Helper()
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	s3 := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, filepath.Join(objects, filepath.Clean("/"+r.URL.Path)))
	}))
	t.Cleanup(s3.Close)
	t.Setenv("AWS_ACCESS_KEY_ID", "access")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	t.Setenv("AWS_CA_BUNDLE", "") // CLIP's HTTP client cannot take one
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	return places{strings.TrimPrefix(server.URL, "http://") + "/team/app:1", s3.URL, remote.New(remote.Options{})}
}

// push puts blobs and, unless it is nil, a manifest into the registry.
func (p places) push(t *testing.T, manifest []byte, blobs ...[]byte) {
	t.Helper()
	host, repository, _ := strings.Cut(strings.TrimSuffix(p.ref, ":1"), "/")
	for _, b := range blobs {
		testutil.PutBlob(t, host, repository, digest.FromBytes(b), b)
	}
	if manifest != nil {
		testutil.PutManifest(t, host, repository, "1", ocispec.MediaTypeImageManifest, manifest)
		testutil.PutManifest(t, host, repository, digest.FromBytes(manifest).String(), ocispec.MediaTypeImageManifest, manifest)
	}
}

// helloLayer is the lower layer of the image that the first program indexed.
func helloLayer(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.NoCompression)
	require.NoError(t, err)
	w := tar.NewWriter(z)
	require.NoError(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o755}))
	require.NoError(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "etc/motd", Mode: 0o644, Size: 7}))
	_, err = io.WriteString(w, "Hello.\n")
	require.NoError(t, err)
	require.NoError(t, w.Close())
	require.NoError(t, z.Close())
	return b.Bytes()
}

// versions makes every kind of file that there is or can come.
func versions(t *testing.T) (files []written, at places) {
	t.Helper()
	objects := t.TempDir()
	at = newPlaces(t, objects)
	l, err := images.NewLayout(filepath.Join(t.TempDir(), "layout"))
	require.NoError(t, err)
	one, err := l.AddLayer(layer{root, file("f", "content")}.write)
	require.NoError(t, err)
	desc, err := l.AddImage(at.ref, ocispec.ImageConfig{}, one)
	require.NoError(t, err)
	require.NoError(t, l.Finish())
	source, img := open(t, l.Dir)
	img.StorageRef = at.ref
	blob, err := os.ReadFile(l.BlobPath(one.Descriptor.Digest))
	require.NoError(t, err)
	at.push(t, img.Manifest, blob, img.Config)
	holds, lower := map[string]string{"/": "", "/f": "content"}, map[string]string{"f": "content"}
	add := func(by string, make func(path string)) {
		path := filepath.Join(t.TempDir(), "a.clip")
		make(path)
		files = append(files, written{by, path, desc.Digest, holds, lower})
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
		require.NoError(t, os.Mkdir(filepath.Join(objects, "b"), 0o755))
		require.NoError(t, os.Rename(path, filepath.Join(objects, "b", "k")))
		require.NoError(t, clip.NewClipArchiver().CreateRemoteArchive(&common.S3StorageInfo{Bucket: "b", Key: "k", Region: "r", Endpoint: at.bucket, ForcePathStyle: true}, m, path))
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
		at.push(t, nil, helloLayer(t))
		holds, lower = map[string]string{"/": "", "/etc": "", "/etc/issue": "-> motd"}, map[string]string{"etc/motd": "Hello.\n", "etc/.wh.motd": ""}
	})
	desc.Digest = img.Descriptor.Digest
	holds, lower = files[0].files, files[0].lower
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
	return files, at
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

// inCLIP, inSnapshotter and inClipctl say what a reader makes of a file: whoever reads it finds what was written.
func inCLIP(t *testing.T, w written) string {
	t.Helper()
	m, err := clip.NewClipArchiver().ExtractMetadata(w.path)
	if err != nil {
		return "refuses: " + err.Error()
	}
	var s storage.ClipStorageInterface
	found := map[string]string{}
	walk(m, func(n *common.ClipNode) {
		switch n.NodeType {
		case common.SymLinkNode:
			found[n.Path] = "-> " + n.Target
		case common.DirNode:
			found[n.Path] = ""
		default:
			if s == nil {
				s, err = storage.NewClipStorage(storage.ClipStorageOpts{ArchivePath: w.path, Metadata: m, CachePath: cachePath(t, m), Credentials: storage.ClipStorageCredentials{S3: &storage.S3ClipStorageCredentials{}}})
				require.NoError(t, err, w.by)
			}
			b := make([]byte, n.Attr.Size)
			got, err := s.ReadFile(n, b, 0)
			require.NoError(t, err, w.by)
			found[n.Path] = string(b[:got])
		}
	})
	if s != nil {
		require.NoError(t, s.Cleanup())
	}
	require.Equal(t, w.files, found, "%s: CLIP reads it", w.by)
	return fmt.Sprintf("reads %d files", len(found))
}

// cachePath is where CLIP keeps layers. Of an object it would keep all of it.
func cachePath(t *testing.T, m *common.ClipArchiveMetadata) string {
	t.Helper()
	if _, ok := m.StorageInfo.(common.OCIStorageInfo); !ok {
		return ""
	}
	return t.TempDir()
}

func inSnapshotter(t *testing.T, w written, at places) string {
	t.Helper()
	f := discover.New(discover.Options{Dir: filepath.Dir(w.path), Fetcher: at.client.Fetcher})
	defer f.Close()
	a, release, err := f.Find(t.Context(), discover.Image{Ref: at.ref, Manifest: w.image})
	if errors.Is(err, archive.ErrVersion) {
		return "unpacks the image, and says: " + strings.TrimPrefix(strings.Split(err.Error(), ";")[0], "archive "+w.path+": ")
	}
	if errdefs.IsNotFound(err) {
		return "passes it over"
	}
	require.NoError(t, err)
	defer release()
	found := map[string]string{}
	for i := range a.DiffIDs() {
		x, err := a.Layer(i)
		require.NoError(t, err)
		for _, e := range x.Entries {
			if e.Type != layers.TypeReg {
				continue
			}
			var b strings.Builder
			require.NoError(t, x.Copy(t.Context(), &b, e.Off, e.Size, func(ctx context.Context, off, n inflate.In) (io.ReadCloser, error) {
				return at.client.Open(ctx, []string{at.ref}, x.Digest, int64(off), int64(n))
			}), w.by)
			found[e.Name] = b.String()
		}
	}
	require.Equal(t, w.lower, found, "%s: the snapshotter reads it", w.by)
	if made, _ := filepath.Glob(filepath.Join(filepath.Dir(w.path), ".indexed", "*.clip")); len(made) > 0 {
		return "indexes the layers, then reads lazily"
	}
	return "reads lazily"
}

func inClipctl(t *testing.T, w written, at places) string {
	t.Helper()
	a, err := contents.Open(w.path, contents.Options{Fetch: at.client})
	if err != nil {
		return "refuses: " + strings.TrimPrefix(err.Error(), "archive "+w.path+": ")
	}
	defer a.Close()
	found := map[string]string{}
	require.NoError(t, a.List("/", func(f contents.File) error {
		var b strings.Builder
		switch f.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			b.WriteString("-> " + f.Target)
		case unix.S_IFREG:
			require.NoError(t, a.Copy(t.Context(), &b, f.Path), w.by)
		}
		found[f.Path] = b.String()
		return nil
	}))
	require.Equal(t, w.files, found, "%s: clipctl reads it", w.by)
	return fmt.Sprintf("reads %d files", len(found))
}

// TestVersions has every reader read what every writer wrote, each file of it: docs/format.md says what comes of it.
func TestVersions(t *testing.T) {
	files, at := versions(t)
	var table strings.Builder
	table.WriteString("| written by | upstream CLIP | snapshotter | clipctl |\n|---|---|---|---|\n")
	for _, w := range files {
		fmt.Fprintf(&table, "| %s | %s | %s | %s |\n", w.by, inCLIP(t, w), inSnapshotter(t, w, at), inClipctl(t, w, at))
	}
	requireInDoc(t, "../../docs/format.md", table.String())
}
