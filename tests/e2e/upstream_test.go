package e2e

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/beam-cloud/clip/pkg/clip"
	clipcommon "github.com/beam-cloud/clip/pkg/common"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/google/go-containerregistry/pkg/crane"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
	"github.com/beam-cloud/containerd-clip/tests/internal/rootdiff"
)

// mountPoint is a directory for a mount that the lab's end takes away.
func (w *world) mountPoint() string {
	w.Helper()
	dir, err := os.MkdirTemp(w.lab.Dir, "mount-")
	require.NoError(w, err)
	return dir
}

// mountUpstream mounts an archive with CLIP's own code until the test ends or the returned function is called.
func mountUpstream(t *testing.T, o clip.MountOptions) (unmount func()) {
	t.Helper()
	require.NoError(t, clip.SetLogLevel("disabled"))
	start, failed, server, err := clip.MountArchive(o)
	require.NoError(t, err)
	require.NoError(t, start())
	require.NoError(t, server.WaitMount())
	var once sync.Once
	unmount = func() {
		once.Do(func() {
			if err := server.Unmount(); err != nil {
				require.NoError(t, mount.UnmountAll(o.MountPoint, unix.MNT_DETACH))
			}
			for limit := time.After(time.Minute); ; {
				select {
				case err, more := <-failed:
					if !more {
						return
					}
					require.NoError(t, err)
				case <-limit:
					t.Fatalf("CLIP's server does not end, a minute after its mount %s", o.MountPoint)
				}
			}
		})
	}
	t.Cleanup(unmount)
	return unmount
}

// expressible is what is left of a tree when all is gone that CLIP has no words for. Its mounts have times to the
// second, and 0644 for a file with no permission at all.
func expressible(tree rootdiff.Tree) rootdiff.Tree {
	left := rootdiff.Tree{}
	for name, e := range tree {
		switch e.Mode & unix.S_IFMT {
		case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
			e.Xattrs, e.Mtime.Nsec = nil, 0
			if e.Mode&0o7777 == 0 {
				e.Mode |= 0o644
			}
			left[name] = e
		}
	}
	return left
}

// requireSameForUpstream compares CLIP's mount of an archive with what a stock containerd made of the image.
func (w *world) requireSameForUpstream(want rootdiff.Tree, mounted string) {
	w.Helper()
	got, err := rootdiff.Read(mounted)
	require.NoError(w, err)
	require.Empty(w, rootdiff.Diff(expressible(want), expressible(got), w.start.Add(-time.Second)))
	w.Logf("%d names are the same", len(got))
}

// stockTree is an image as a stock containerd unpacks it.
func (w *world) stockTree(ref string) rootdiff.Tree {
	w.Helper()
	stock := w.stock()
	w.pull(stock, eager, ref)
	tree, err := rootdiff.Read(w.view(stock, eager, ref))
	require.NoError(w, err)
	return tree
}

// archive indexes an image of the builder's store into a file.
func (w *world) archive(ref string, args ...string) string {
	w.Helper()
	file := filepath.Join(w.TempDir(), "image.clip")
	_, err := w.builder.Clipctl(w.ctx, append([]string{"index", ref, "-o", file}, args...)...)
	require.NoError(w, err)
	return file
}

// TestUpstreamMountsOurs mounts an archive of ours with CLIP's own code: everything that CLIP can express is the same,
// its caches know the layers, and no layer is fetched twice.
func TestUpstreamMountsOurs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publish(images.DockerName) // all of its layers are gzip
	ref, layers := w.ref(images.DockerName), w.layers(images.DockerName)
	file, cache := w.archive(ref), t.TempDir()
	want := w.stockTree(ref)

	w.registry.Reset()
	o := clip.MountOptions{ArchivePath: file, MountPoint: w.mountPoint(), CachePath: cache, UseCheckpoints: true}
	unmount := mountUpstream(t, o)
	w.requireSameForUpstream(want, o.MountPoint)
	for _, l := range layers {
		// A request is counted when it has ended, which may be after the last byte was read.
		w.eventually("CLIP fetches a layer", func() bool { return len(w.registry.Requests().Gets(l)) > 0 })
		require.Len(t, w.registry.Requests().Gets(l), 1, "CLIP fetches a layer once, whole")
	}
	unmount()

	for _, hash := range w.decompressedHashes(file) {
		content, err := os.ReadFile(filepath.Join(cache, hash))
		require.NoError(t, err)
		sum := sha256.Sum256(content)
		require.Equal(t, hash, hex.EncodeToString(sum[:]))
	}
	w.registry.Reset()
	o.MountPoint, o.UseCheckpoints = w.mountPoint(), false
	mountUpstream(t, o)
	w.requireSameForUpstream(want, o.MountPoint)
	require.Empty(t, w.registry.Requests().Gets(layers...), "the layers are in CLIP's cache")
}

// decompressedHashes are the names that CLIP's caches give to an archive's layers, lowest first.
func (w *world) decompressedHashes(file string) (hashes []string) {
	w.Helper()
	info := w.upstreamInfo(file)
	for _, l := range info.Layers {
		hashes = append(hashes, info.DecompressedHashByLayer[l])
	}
	return hashes
}

func (w *world) upstreamInfo(file string) clipcommon.OCIStorageInfo {
	w.Helper()
	metadata, err := clip.NewClipArchiver().ExtractMetadata(file)
	require.NoError(w, err)
	return metadata.StorageInfo.(clipcommon.OCIStorageInfo)
}

// contentCache is the cache that CLIP's workers share, in memory.
type contentCache struct {
	mu      sync.Mutex // guards the fields below
	content map[string][]byte
	hits    int
}

type routing = struct{ RoutingKey string }

func (c *contentCache) GetContent(hash string, offset, length int64, _ routing) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, ok := c.content[hash]
	if !ok {
		return nil, fmt.Errorf("no %s", hash)
	}
	c.hits++
	return b[offset : offset+length], nil
}

func (c *contentCache) StoreContent(chunks chan []byte, hash string, _ routing) (string, error) {
	var b []byte
	for chunk := range chunks {
		b = append(b, chunk...)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.content[hash] = b
	return hash, nil
}

// TestUpstreamContentCache reads through the cache that CLIP's workers share. A layer that CLIP cannot decompress is
// read from there too.
func TestUpstreamContentCache(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	file := w.archive(ref)
	hashes := w.decompressedHashes(file)
	const plain = 1 // the layer that is not compressed
	content, err := os.ReadFile(w.layout.BlobPath(w.manifest(w.builder, ref).Layers[plain].Digest))
	require.NoError(t, err)
	cache := &contentCache{content: map[string][]byte{hashes[plain]: content}}
	want := w.stockTree(ref)

	o := clip.MountOptions{ArchivePath: file, MountPoint: w.mountPoint(), CachePath: t.TempDir(), ContentCache: cache, ContentCacheAvailable: true}
	mountUpstream(t, o)
	w.requireSameForUpstream(want, o.MountPoint)
	require.NotZero(t, cache.hits)
	w.eventually("CLIP shares the layers that it has read", func() bool {
		cache.mu.Lock()
		defer cache.mu.Unlock()
		for _, hash := range []string{hashes[0], hashes[2], hashes[3]} { // the empty layer is never read
			sum := sha256.Sum256(cache.content[hash])
			if hex.EncodeToString(sum[:]) != hash {
				return false
			}
		}
		return true
	})
}

// TestUpstreamReferences stores references with tag, digest and both. Today's CLIP mounts by tag only, and reads what
// the tag's image has.
func TestUpstreamReferences(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publish(images.DockerName)
	ref := w.ref(images.DockerName)
	id := w.subject(ref, "").Digest.String()
	layers := w.manifest(w.builder, ref).Layers
	repository := ref[:len(ref)-len(":1")]
	for stored, mounts := range map[string]bool{ref: true, ref + "@" + id: true, repository + "@" + id: false} {
		for _, engine := range []string{"span", "clip"} {
			file := filepath.Join(t.TempDir(), "image.clip")
			result, err := w.builder.Clipctl(w.ctx, "index", ref, "-o", file, "--storage-ref", stored, "--engine", engine)
			require.NoError(t, err)
			o := clip.MountOptions{ArchivePath: file, MountPoint: w.mountPoint(), CachePath: t.TempDir()}
			if mounts {
				require.NotContains(t, result.Stderr, "CLIP cannot")
				mountUpstream(t, o)
				name, err := os.ReadFile(filepath.Join(o.MountPoint, "app/name"))
				require.NoError(t, err)
				require.Equal(t, "clip\n", string(name))
				continue
			}
			require.Contains(t, result.Stderr, "CLIP cannot mount by digest")
			_, _, _, err = clip.MountArchive(o)
			require.ErrorContains(t, err, "reference", "CLIP has learned to mount by digest: the warning can go")
		}
	}

	// The tag moves to an image without the top layer: what is in that can be read from CLIP's caches only.
	file, cache := w.archive(ref), t.TempDir()
	w.ctr(w.builder, "image", "tag", "--force", w.ref(images.BaseName), ref)
	w.ctr(w.builder, "image", "push", ref)
	o := clip.MountOptions{ArchivePath: file, MountPoint: w.mountPoint(), CachePath: cache}
	unmount := mountUpstream(t, o)
	_, err := os.Stat(filepath.Join(o.MountPoint, "app/name"))
	require.NoError(t, err)
	_, err = os.ReadFile(filepath.Join(o.MountPoint, "app/name"))
	require.ErrorIs(t, err, unix.EIO, "CLIP has learned to read by digest: docs/compatibility.md says that it has not")
	_, err = os.ReadFile(filepath.Join(o.MountPoint, "bin/busybox"))
	require.NoError(t, err, "it is in a layer that both have")
	unmount()
	hashes := w.decompressedHashes(file)
	top, err := os.Open(w.layout.BlobPath(layers[len(layers)-1].Digest))
	require.NoError(t, err)
	defer top.Close()
	unzipped, err := gzip.NewReader(top)
	require.NoError(t, err)
	content, err := io.ReadAll(unzipped)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(cache, hashes[len(hashes)-1]), content, 0o600))
	o.MountPoint = w.mountPoint()
	mountUpstream(t, o)
	name, err := os.ReadFile(filepath.Join(o.MountPoint, "app/name"))
	require.NoError(t, err)
	require.Equal(t, "clip\n", string(name))
}

// TestUpstreamPlatforms has today's CLIP mount archives of a platform that is not the worker's. It takes the layers of
// the worker's own from the tag, if there is a choice.
func TestUpstreamPlatforms(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publish(images.GzipName)
	ref := w.ref(images.GzipName)
	foreign, own := "arm64", "/foreign"
	if runtime.GOARCH == foreign {
		foreign, own = "amd64", "/app/run.sh"
	}
	read := func(root string, name string) error {
		_, err := os.ReadFile(filepath.Join(root, name))
		return err
	}
	o := clip.MountOptions{ArchivePath: w.archive(ref, "--platform", "linux/"+foreign), MountPoint: w.mountPoint(), CachePath: t.TempDir()}
	mountUpstream(t, o)
	require.NoError(t, read(o.MountPoint, "bin/busybox"), "it is in a layer that both have")
	require.ErrorIs(t, read(o.MountPoint, own), unix.EIO)

	alone := w.registry.Ref("small/alone:1")
	repository := ref[:len(ref)-len(":1")]
	require.NoError(t, crane.Copy(repository+"@"+w.subject(ref, foreign).Digest.String(), alone))
	o = clip.MountOptions{ArchivePath: w.archive(ref, "--platform", "linux/"+foreign, "--storage-ref", alone), MountPoint: w.mountPoint(), CachePath: t.TempDir()}
	mountUpstream(t, o)
	require.NoError(t, read(o.MountPoint, own))

	none := w.registry.Ref("small/none:1")
	w.ctr(w.builder, "image", "convert", "--platform", "linux/"+foreign, ref, none)
	w.ctr(w.builder, "image", "push", none)
	o = clip.MountOptions{ArchivePath: w.archive(none, "--platform", "linux/"+foreign), MountPoint: w.mountPoint(), CachePath: t.TempDir()}
	_, _, _, err := clip.MountArchive(o)
	require.ErrorContains(t, err, "no child with platform")
}

// TestUpstreamMetadata compares the image's config in an archive of ours with what CLIP's own indexer stores.
func TestUpstreamMetadata(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publish(images.DockerName)
	ref := w.ref(images.DockerName)
	theirs := filepath.Join(t.TempDir(), "theirs.clip")
	require.NoError(t, clip.SetLogLevel("disabled"))
	require.NoError(t, clip.CreateFromOCIImage(w.ctx, clip.CreateFromOCIImageOptions{ImageRef: ref, OutputPath: theirs}))
	got, want := w.upstreamInfo(w.archive(ref)), w.upstreamInfo(theirs)
	require.Equal(t, want.ImageMetadata, got.ImageMetadata)
	require.Equal(t, want.DecompressedHashByLayer, got.DecompressedHashByLayer)
	require.Equal(t, want.Layers, got.Layers)
	require.Equal(t, []string{want.RegistryURL, want.Repository, want.Reference}, []string{got.RegistryURL, got.Repository, got.Reference})
}
