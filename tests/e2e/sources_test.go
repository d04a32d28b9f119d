package e2e

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"cuelabs.dev/go/oci/ociregistry/ocimem"
	"cuelabs.dev/go/oci/ociregistry/ociserver"
	"github.com/beam-cloud/clip/pkg/clip"
	clipcommon "github.com/beam-cloud/clip/pkg/common"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// artifactType is what an archive in a registry says it is.
const artifactType = "application/vnd.beam.clip.index.v2"

// TestSources indexes one image from everything that an image can be in. What comes out depends on the image and the
// storage reference alone.
func TestSources(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.registry.Reset()
	ref := w.ref(images.SmallName)
	archives := map[string][]byte{}
	for name, source := range map[string]string{
		"store":   ref,
		"layout":  "oci:" + w.layout.Dir + ":busybox",
		"archive": "oci-archive:" + w.lab.Path("small.tar") + ":busybox",
	} {
		file := w.lab.Path(name + ".clip")
		result, err := w.builder.Clipctl(w.ctx, "index", source, "--storage-ref", ref, "-o", file)
		require.NoError(t, err)
		requireIndexingLine(t, result, ref, "5")
		archives[name], err = os.ReadFile(file)
		require.NoError(t, err)
		requireUpstreamReads(t, file, ref)
	}
	require.Equal(t, archives["store"], archives["layout"])
	require.Equal(t, archives["store"], archives["archive"])
	require.Empty(t, w.registry.Requests())
}

// requireUpstreamReads reads the part of an archive that CLIP itself knows.
func requireUpstreamReads(t *testing.T, file, ref string) {
	t.Helper()
	metadata, err := clip.NewClipArchiver().ExtractMetadata(file)
	require.NoError(t, err)
	require.NotNil(t, metadata.Index)
	info, ok := metadata.StorageInfo.(clipcommon.OCIStorageInfo)
	require.True(t, ok, "storage info is %T", metadata.StorageInfo)
	require.Equal(t, ref, info.RegistryURL+"/"+info.Repository+":"+info.Reference)
	require.NotNil(t, metadata.Get("/app/run.sh"))
	require.Nil(t, metadata.Get("/gone/file"))
}

// TestStorageReference indexes an image that has no name in a registry, for one that it will have.
func TestStorageReference(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.registry.Ref("elsewhere/app:2")
	w.ctr(w.builder, "image", "tag", images.SmallName, ref)
	w.ctr(w.builder, "image", "push", ref)
	w.ctr(w.builder, "image", "rm", ref)
	_, err := w.builder.Clipctl(w.ctx, "index", images.SmallName, "--storage-ref", ref, "--push")
	require.NoError(t, err)
	require.Empty(t, w.pull(w.worker, lazy, ref).Gets(w.layers(images.SmallName)...))
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
}

// TestReferrersAPI has the archive in a registry that knows what refers to an image, so that no tag need say it.
func TestReferrersAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	layers := w.layers(images.SmallName)
	var whole atomic.Int32
	registry := ociserver.New(ocimem.New(), nil)
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && r.Header.Get("Range") == "" && slices.Contains(layers, path.Base(r.URL.Path)) {
			whole.Add(1)
		}
		registry.ServeHTTP(rw, r)
	}))
	t.Cleanup(server.Close)
	repository, err := name.NewRepository(strings.TrimPrefix(server.URL, "http://") + "/team/app")
	require.NoError(t, err)
	ref := repository.Tag("1").Name()
	w.ctr(w.builder, "image", "tag", images.SmallName, ref)
	w.ctr(w.builder, "image", "push", ref)
	for range 2 {
		_, err := w.builder.Clipctl(w.ctx, "index", ref, "--push")
		require.NoError(t, err)
		require.Len(t, w.referrers(ref, runtime.GOARCH), 1)
	}
	tags, err := remote.List(repository)
	require.NoError(t, err)
	require.Equal(t, []string{"1"}, tags)

	w.ctr(w.worker, "image", "pull", "--snapshotter", lazy, ref)
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	require.Zero(t, whole.Load(), "layers that were fetched whole")
}

// TestLocalArchive finds the archive as a file below the daemon's root; the registry has none.
func TestLocalArchive(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.placeArchive(images.SmallName, "by-hand.clip")
	require.Empty(t, w.pull(w.worker, lazy, ref).Gets(w.layers(images.SmallName)...))
	require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
}

// TestPlatforms indexes images of several platforms: one that is named, and all of them.
func TestPlatforms(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.PlatformName)
	w.publish(images.PlatformName)
	referrers := func() int {
		n := 0
		for _, arch := range []string{"amd64", "arm64"} {
			n += len(w.referrers(ref, arch))
		}
		return n
	}
	require.Zero(t, referrers())

	result := w.index(images.PlatformName, "--platform", "linux/arm64")
	require.Contains(t, result.Stderr, "platform=linux/arm64")
	require.Len(t, w.referrers(ref, "arm64"), 1)
	require.Equal(t, 1, referrers())

	w.index(images.PlatformName, "--all-platforms")
	require.Len(t, w.referrers(ref, "amd64"), 1)
	require.Equal(t, 2, referrers(), "the same archive is not pushed twice")

	// One object cannot be two archives.
	into := w.lab.Path("objects")
	failed, err := w.builder.Clipctl(w.ctx, "index", ref, "--all-platforms", "--to", "file://"+into+"/{{.Tag}}.clip")
	require.Error(t, err)
	requireClear(t, failed.Stderr, "{{.Manifest}}", into)
	require.NoDirExists(t, into)

	require.Empty(t, w.pull(w.worker, lazy, ref).Gets(w.layers(images.BaseName)...))
	if runtime.GOARCH == "amd64" {
		require.Equal(t, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	}
}

// TestIndexAgain gives the same archive and no second artifact.
func TestIndexAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.index(images.SmallName)
	w.index(images.SmallName)
	require.Len(t, w.referrers(w.ref(images.SmallName), runtime.GOARCH), 1)
}

// placeArchive writes an image's archive into the daemon's directory for archives.
func (w *world) placeArchive(name, file string) string {
	w.Helper()
	path := filepath.Join(w.daemon.Root, "archives", file)
	require.NoError(w, os.MkdirAll(filepath.Dir(path), 0o700))
	_, err := w.builder.Clipctl(w.ctx, "index", w.ref(name), "-o", path)
	require.NoError(w, err)
	return path
}

// referrers are the digests of the archives that refer to an image's manifest for an architecture.
func (w *world) referrers(ref, arch string) (digests []string) {
	w.Helper()
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost))
	fetcher, err := docker.NewResolver(docker.ResolverOptions{Hosts: hosts}).Fetcher(w.ctx, ref)
	require.NoError(w, err)
	found, err := fetcher.(remotes.ReferrersFetcher).FetchReferrers(w.ctx, w.subject(ref, arch).Digest)
	require.NoError(w, err)
	for _, d := range found {
		require.Equal(w, artifactType, d.ArtifactType)
		digests = append(digests, d.Digest.String())
	}
	return digests
}
