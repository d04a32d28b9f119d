package discover

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ctdlog "github.com/containerd/log"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

const repo = "team/app"

// server is a registry whose referrers lists are written by the test:
// go-containerregistry's own have no artifact types.
type server struct {
	host string
	api  bool // it has the referrers API, else only the fallback tag

	rangeless bool   // it sends blobs whole
	missing   string // the start of a range that it has not

	mu        sync.Mutex // guards the fields below
	referrers []ocispec.Descriptor
	requests  []string
	broken    bool
}

func startServer(t *testing.T, api bool) *server {
	t.Helper()
	s := &server{api: api}
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.requests = append(s.requests, r.Method+" "+r.URL.Path+" "+r.Header.Get("Range"))
		list, broken := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: s.referrers}, s.broken
		s.mu.Unlock()
		switch {
		case broken:
			w.WriteHeader(http.StatusInternalServerError)
		case strings.Contains(r.URL.Path, "/referrers/") && s.api, strings.Contains(r.URL.Path, "/manifests/sha256-") && !s.api:
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			_ = json.NewEncoder(w).Encode(list)
		case s.missing != "" && strings.HasPrefix(r.Header.Get("Range"), "bytes="+s.missing+"-"):
			w.WriteHeader(http.StatusNotFound)
		case s.rangeless:
			r.Header.Del("Range")
			h.ServeHTTP(w, r)
		default:
			h.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(srv.Close)
	s.host = strings.TrimPrefix(srv.URL, "http://")
	return s
}

func (s *server) ref() string { return s.host + "/" + repo + ":1" }

// gets counts GET requests for blobs.
func (s *server) gets() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.requests {
		if strings.HasPrefix(r, "GET ") && strings.Contains(r, "/blobs/") {
			n++
		}
	}
	return n
}

// seen returns all requests so far.
func (s *server) seen() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// refer lists an artifact.
func (s *server) refer(artifact ocispec.Descriptor) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.referrers = append(s.referrers, artifact)
}

func (s *server) finder(t *testing.T) *Finder {
	t.Helper()
	f := New(Options{Dir: t.TempDir(), Referrers: true, Fetcher: remote.New(remote.Options{}).Fetcher})
	t.Cleanup(f.Close)
	return f
}

// artifact is an archive as publish.Push stores it, with what is wrong with it.
type artifact struct {
	subject   digest.Digest
	mediaType string
	blob      []byte
	declare   func(*ocispec.Descriptor)
	created   string
}

func compress(t *testing.T, raw []byte) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	return enc.EncodeAll(raw, nil)
}

func archiveOf(t *testing.T, img *testutil.Image) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.clip")
	img.WriteArchive(t, path, "registry.example.com/team/app:1")
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

// put stores a in the registry.
func (s *server) put(t *testing.T, a artifact) ocispec.Descriptor {
	t.Helper()
	desc := ocispec.Descriptor{MediaType: a.mediaType, Digest: digest.FromBytes(a.blob), Size: int64(len(a.blob))}
	testutil.PutBlob(t, s.host, repo, desc.Digest, a.blob)
	if a.declare != nil {
		a.declare(&desc)
	}
	raw := testutil.JSON(t, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: archive.ArtifactType,
		Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{desc}, Subject: &ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: a.subject},
	})
	if a.created != "" {
		var m ocispec.Manifest
		require.NoError(t, json.Unmarshal(raw, &m))
		m.Annotations = map[string]string{ocispec.AnnotationCreated: a.created}
		raw = testutil.JSON(t, m)
	}
	testutil.PutBlob(t, s.host, repo, ocispec.DescriptorEmptyJSON.Digest, []byte("{}"))
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: archive.ArtifactType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	testutil.PutManifest(t, s.host, repo, d.Digest.String(), ocispec.MediaTypeImageManifest, raw)
	return d
}

func good(t *testing.T, img *testutil.Image) artifact {
	return artifact{subject: img.Descriptor.Digest, mediaType: archive.MediaType, blob: compress(t, archiveOf(t, img))}
}

func testImage(t *testing.T, name string) *testutil.Image {
	return testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: name, Data: name}))
}

// captureLog collects what is logged with the context.
func captureLog(t *testing.T) (context.Context, *bytes.Buffer) {
	t.Helper()
	var b bytes.Buffer
	l := logrus.New()
	l.SetOutput(&b) // logrus serialises writes
	return ctdlog.WithLogger(t.Context(), logrus.NewEntry(l)), &b
}

// openArchives counts this process's descriptors of archives in dir.
func openArchives(t *testing.T, dir string) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(target, dir) {
			n++
		}
	}
	return n
}

func find(ctx context.Context, t *testing.T, f *Finder, ref string, img *testutil.Image) {
	t.Helper()
	a, release, err := f.Find(ctx, Image{Ref: ref, Manifest: img.Descriptor.Digest})
	require.NoError(t, err)
	defer release()
	require.Equal(t, img.Descriptor.Digest, a.Info().Descriptor.Digest)
	_, err = a.Layer(0)
	require.NoError(t, err)
}

func TestLocal(t *testing.T) {
	ctx, logged := captureLog(t)
	one, two := testImage(t, "one"), testImage(t, "two")
	f := New(Options{Dir: t.TempDir()})
	defer f.Close()
	write := func(name string, b []byte) {
		require.NoError(t, os.WriteFile(filepath.Join(f.opts.Dir, name), b, 0o644))
	}
	write("a-damaged.clip", archiveOf(t, one)[:100])
	write("b-none.clip", []byte("no archive"))
	write("c.clip", archiveOf(t, one))
	write("ignored.txt", archiveOf(t, two))
	find(ctx, t, f, "", one)
	require.Contains(t, logged.String(), "a-damaged.clip")
	require.Contains(t, logged.String(), "b-none.clip")

	_, _, err := f.Find(ctx, Image{Manifest: two.Descriptor.Digest})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.Equal(t, 2, strings.Count(logged.String(), "no usable archive"), "each is reported once")

	// The same name, now of the other image.
	write("c.clip", archiveOf(t, two))
	f.Forget(Image{Manifest: two.Descriptor.Digest})
	find(ctx, t, f, "", two)
	f.Forget(Image{Manifest: one.Descriptor.Digest})
	_, _, err = f.Find(ctx, Image{Manifest: one.Descriptor.Digest})
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	_, _, err = f.Find(ctx, Image{Manifest: "sha256:short"})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// TestLocalFirst never asks the registry if a file is there.
func TestLocalFirst(t *testing.T) {
	s := startServer(t, true)
	img := testImage(t, "one")
	f := s.finder(t)
	img.WriteArchive(t, filepath.Join(f.opts.Dir, "a.clip"), s.ref())
	find(t.Context(), t, f, s.ref(), img)
	require.Empty(t, s.requests)
}

func TestReferrer(t *testing.T) {
	for name, api := range map[string]bool{"API": true, "fallback tag": false} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, api)
			img := testImage(t, "one")
			s.refer(ocispec.Descriptor{
				MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/spdx+json", Digest: digest.FromString("sbom"), Size: 4,
			})
			s.refer(s.put(t, good(t, img)))
			f := s.finder(t)
			find(t.Context(), t, f, s.ref(), img)
			left, err := os.ReadDir(f.opts.Dir)
			require.NoError(t, err)
			require.Empty(t, left, "the download has no name")
		})
	}
}

// TestNewestReferrer has several archives of an image, in no order.
func TestNewestReferrer(t *testing.T) {
	s := startServer(t, true)
	img := testImage(t, "one")
	for year, created := range map[int]string{1: "2026-01-01T00:00:00Z", 3: "2028-01-01T00:00:00Z", 2: "2027-01-01T00:00:00Z", 4: "nonsense", 0: ""} {
		path := filepath.Join(t.TempDir(), "a.clip")
		img.WriteArchive(t, path, "registry.example.com/team/app:1")
		a, err := archive.OpenFile(path)
		require.NoError(t, err)
		again, err := a.Image()
		require.NoError(t, err)
		require.NoError(t, a.Close())
		again.Prefetch = &archive.Prefetch{Recorded: time.Unix(int64(year), 0)}
		_, err = archive.WriteFile(path, again)
		require.NoError(t, err)
		b, err := os.ReadFile(path)
		require.NoError(t, err)
		s.refer(s.put(t, artifact{subject: img.Descriptor.Digest, mediaType: archive.MediaType, blob: compress(t, b), created: created}))
	}
	s.refer(s.put(t, artifact{subject: img.Descriptor.Digest, mediaType: archive.MediaType, blob: []byte("broken"), created: "2029-01-01T00:00:00Z"}))
	a, release, err := s.finder(t).Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.NoError(t, err)
	defer release()
	list, err := a.Prefetch()
	require.NoError(t, err)
	require.EqualValues(t, 3, list.Recorded.Unix())
}

// TestEqualReferrers has archives that do not say when they were made: whatever the registry's order, it is the same
// that is taken.
func TestEqualReferrers(t *testing.T) {
	s := startServer(t, true)
	img := testImage(t, "one")
	var put []digest.Digest
	for _, more := range []string{"a", "b", "c", "d"} {
		a := good(t, img)
		a.blob = append(a.blob, compress(t, []byte(more))...)
		d := s.put(t, a)
		s.refer(d)
		put = append(put, d.Digest)
	}
	fetcher, err := s.finder(t).opts.Fetcher(t.Context(), s.ref())
	require.NoError(t, err)
	found, err := Referrers(t.Context(), fetcher, img.Descriptor.Digest)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	var order []digest.Digest
	for _, a := range found {
		order = append(order, a.Manifest.Digest)
	}
	require.NotEqual(t, slices.Sorted(slices.Values(put)), put, "it is not in order before")
	require.Equal(t, slices.Sorted(slices.Values(put)), order)
}

func TestReferrersSwitchedOff(t *testing.T) {
	s := startServer(t, true)
	img := testImage(t, "one")
	s.refer(s.put(t, good(t, img)))
	s.mu.Lock()
	s.requests = nil
	s.mu.Unlock()
	f := s.finder(t)
	f.opts.Referrers = false
	_, _, err := f.Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.Empty(t, s.requests)
}

// TestRefusals has a bad artifact, alone and before a good one.
func TestRefusals(t *testing.T) {
	img, other := testImage(t, "one"), testImage(t, "two")
	noise := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(noise) // it never fails
	for name, c := range map[string]struct {
		spoil   func(*artifact)
		message string
	}{
		"other subject":    {func(a *artifact) { a.subject = other.Descriptor.Digest }, "does not refer to " + img.Descriptor.Digest.String()},
		"other media type": {func(a *artifact) { a.mediaType = "application/octet-stream" }, "no layer of type " + archive.MediaType},
		"other image":      {func(a *artifact) { a.blob = compress(t, archiveOf(t, other)) }, "archive is of image " + other.Descriptor.Digest.String()},
		"altered blob": {func(a *artifact) {
			a.declare = func(d *ocispec.Descriptor) { d.Digest = digest.FromString("another blob") }
		}, ""},
		"declared too large":  {func(a *artifact) { a.declare = func(d *ocispec.Descriptor) { d.Size = maxCompressed + 1 } }, "more than"},
		"declared too small":  {func(a *artifact) { a.declare = func(d *ocispec.Descriptor) { d.Size-- } }, ""},
		"bad digest":          {func(a *artifact) { a.declare = func(d *ocispec.Descriptor) { d.Digest = "sha256:x" } }, "sha256:x"},
		"truncated zstd":      {func(a *artifact) { a.blob = a.blob[:len(a.blob)/2] }, "unexpected EOF"},
		"not compressed":      {func(a *artifact) { a.blob = noise }, "magic"},
		"compressed nonsense": {func(a *artifact) { a.blob = compress(t, noise) }, archive.ErrNotArchive.Error()},
		"empty":               {func(a *artifact) { a.blob = compress(t, nil) }, archive.ErrNotArchive.Error()},
		"data behind the end": {func(a *artifact) { a.blob = append(a.blob, "garbage"...) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, true)
			bad := good(t, img)
			c.spoil(&bad)
			s.refer(s.put(t, bad))
			f := s.finder(t)
			ctx, logged := captureLog(t)
			before := openArchives(t, f.opts.Dir)
			_, _, err := f.Find(ctx, Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
			require.ErrorContains(t, err, "archive sha256:")
			require.ErrorContains(t, err, c.message)
			require.Contains(t, logged.String(), "ignoring an archive that refers to the image")
			require.Equal(t, before, openArchives(t, f.opts.Dir))

			s.refer(s.put(t, good(t, img)))
			f.Forget(Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
			find(ctx, t, f, s.ref(), img)
		})
	}
}

// TestAlteredInTransit has the registry send other bytes than it lists.
func TestAlteredInTransit(t *testing.T) {
	img := testImage(t, "one")
	a := good(t, img)
	whole := a.blob
	for name, sent := range map[string][]byte{"altered": compress(t, append(archiveOf(t, img), 0)), "longer": append(bytes.Clone(whole), 1, 2, 3), "shorter": whole[:len(whole)-5]} {
		t.Run(name, func(t *testing.T) {
			f := New(Options{Dir: t.TempDir(), Referrers: true})
			defer f.Close()
			fetch := fetcherFunc(func() io.ReadCloser { return io.NopCloser(bytes.NewReader(sent)) })
			_, err := f.download(t.Context(), fetch, Artifact{
				Blob: ocispec.Descriptor{Digest: digest.FromBytes(whole), Size: int64(len(whole))}, Subject: img.Descriptor.Digest,
			}, wanted{})
			if name == "longer" {
				require.NoError(t, err, "what lies behind the declared size is not read")
				return
			}
			require.Error(t, err)
			require.Zero(t, openArchives(t, f.opts.Dir))
		})
	}
	_, err := fetchSmall(t.Context(), fetcherFunc(func() io.ReadCloser { return io.NopCloser(strings.NewReader("x")) }), ocispec.Descriptor{Digest: digest.FromString("y"), Size: 1})
	require.ErrorIs(t, err, errdefs.ErrDataLoss)
	_, err = fetchSmall(t.Context(), nil, ocispec.Descriptor{Size: maxManifest + 1})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

type fetcherFunc func() io.ReadCloser

func (f fetcherFunc) Fetch(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
	return f(), nil
}

func TestBrokenRegistry(t *testing.T) {
	s := startServer(t, true)
	s.broken = true
	img := testImage(t, "one")
	_, _, err := s.finder(t).Find(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.ErrorContains(t, err, "asking for archives that refer to "+img.Descriptor.Digest.String())
}

func TestConcurrentFinds(t *testing.T) {
	s := startServer(t, true)
	img := testImage(t, "one")
	s.refer(s.put(t, good(t, img)))
	f := s.finder(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var releases []func()
	for range 32 {
		wg.Go(func() {
			a, release, err := f.Find(context.Background(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := a.Layer(0); err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			releases = append(releases, release)
		})
	}
	wg.Wait()
	require.Len(t, releases, 32)
	require.Equal(t, 1, s.gets())
	require.Equal(t, 1, openArchives(t, f.opts.Dir))
	f.Forget(Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	for i, release := range releases {
		require.Equal(t, 1, openArchives(t, f.opts.Dir), "%d of 32 are done", i)
		release()
	}
	require.Zero(t, openArchives(t, f.opts.Dir))
	f.Forget(Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})

	find(t.Context(), t, f, s.ref(), img)
	require.Equal(t, 2, s.gets())
	require.Equal(t, 1, openArchives(t, f.opts.Dir), "remembered")
	f.Close()
	require.Zero(t, openArchives(t, f.opts.Dir))
}

func TestMissingIsRememberedShortly(t *testing.T) {
	s := startServer(t, true)
	img := testImage(t, "one")
	f := s.finder(t)
	image := Image{Ref: s.ref(), Manifest: img.Descriptor.Digest}
	found := func() error {
		_, release, err := f.Find(t.Context(), image)
		if err == nil {
			release()
		}
		return err
	}
	desc := s.put(t, good(t, img))
	for {
		began := time.Now()
		require.ErrorIs(t, found(), errdefs.ErrNotFound)
		s.refer(desc)
		err := found()
		if time.Since(began) < keepMissing {
			require.ErrorIs(t, err, errdefs.ErrNotFound, "asked again at once")
			break
		}
		// The machine stood still until it was forgotten.
		s.mu.Lock()
		s.referrers = nil
		s.mu.Unlock()
		f.Forget(image)
	}
	require.Eventually(t, func() bool { return found() == nil }, time.Minute, 50*time.Millisecond)
}

// TestCancelledCaller leaves alone; the search goes on for the others.
func TestCancelledCaller(t *testing.T) {
	s := startServer(t, true)
	img := testImage(t, "one")
	s.refer(s.put(t, good(t, img)))
	f := s.finder(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := f.Find(ctx, Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	if err != nil { // the search may have been quicker
		require.ErrorIs(t, err, context.Canceled)
	}
	find(t.Context(), t, f, s.ref(), img)
	require.Equal(t, 1, s.gets())
}

func TestParseTarget(t *testing.T) {
	const (
		ref      = "containerd.io/snapshot.ref"
		image    = "containerd.io/snapshot/cri.image-ref"
		manifest = "containerd.io/snapshot/cri.manifest-digest"
		layer    = "containerd.io/snapshot/cri.layer-digest"
	)
	chain, man, one, link := digest.FromString("chain"), digest.FromString("manifest"), digest.FromString("layer"), digest.FromString("link")
	for name, c := range map[string]struct {
		labels  map[string]string
		want    Target
		is      error
		message string
	}{
		"all":          {labels: map[string]string{ref: chain.String(), image: "a/b:1", manifest: man.String()}, want: Target{ChainID: chain, Image: Image{Ref: "a/b:1", Manifest: man}}},
		"no reference": {labels: map[string]string{ref: chain.String(), manifest: man.String()}, want: Target{ChainID: chain, Image: Image{Manifest: man}}},
		"none":         {is: ErrNoTarget},
		"no layer":     {labels: map[string]string{image: "a/b:1", manifest: man.String()}, is: ErrNoTarget},
		"bad chain ID": {labels: map[string]string{ref: "k8s.io/1/sha256:x", manifest: man.String()}, is: errdefs.ErrInvalidArgument, message: "chain ID"},
		"no image":     {labels: map[string]string{ref: chain.String()}, is: errdefs.ErrInvalidArgument, message: "enable_remote_snapshot_annotations"},
		"link": {labels: map[string]string{ref: chain.String(), manifest: man.String(), layer: one.String(), archive.AnnotationLink: link.String()},
			want: Target{ChainID: chain, Layer: one, Image: Image{Manifest: man, Link: link}}},
		"bad link":         {labels: map[string]string{ref: chain.String(), manifest: man.String(), archive.AnnotationLink: "latest"}, is: errdefs.ErrInvalidArgument, message: "links to"},
		"bad image digest": {labels: map[string]string{ref: chain.String(), manifest: "sha256:x"}, is: errdefs.ErrInvalidArgument, message: "manifest digest"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseTarget(c.labels)
			if c.is != nil {
				require.ErrorIs(t, err, c.is)
				require.ErrorContains(t, err, c.message)
				return
			}
			require.NoError(t, err)
			require.Equal(t, c.want, got)
		})
	}
}

// TestLatestRevision has archives of several programs that do not say when they were made.
func TestLatestRevision(t *testing.T) {
	s := startServer(t, true)
	img := testImage(t, "one")
	want := map[digest.Digest]string{}
	for _, revision := range []string{"10", "2", "", "nonsense", "-1", "3"} {
		a := good(t, img)
		a.blob = append(a.blob, compress(t, []byte(revision))...)
		a.declare = func(d *ocispec.Descriptor) { d.Annotations = map[string]string{archive.AnnotationRevision: revision} }
		d := s.put(t, a)
		s.refer(d)
		want[d.Digest] = revision
	}
	fetcher, err := s.finder(t).opts.Fetcher(t.Context(), s.ref())
	require.NoError(t, err)
	found, err := Referrers(t.Context(), fetcher, img.Descriptor.Digest)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	var order []string
	for _, a := range found {
		order = append(order, want[a.Manifest.Digest])
	}
	require.Len(t, order, len(want))
	require.Equal(t, []string{"10", "3", "2"}, order[:3])
}
