package discover

import (
	"bytes"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// parted is an archive as publish.Push stores it, with parts that can be had alone.
func parted(t *testing.T, img *testutil.Image) (artifact, *archive.Parts) {
	t.Helper()
	raw := archiveOf(t, img)
	opened, err := archive.Open(bytes.NewReader(raw), int64(len(raw)))
	require.NoError(t, err)
	a := artifact{subject: img.Descriptor.Digest, mediaType: archive.MediaType}
	var parts archive.Parts
	a.blob, parts, err = opened.Compress()
	require.NoError(t, err)
	a.declare = func(d *ocispec.Descriptor) {
		d.Annotations = map[string]string{archive.AnnotationParts: string(testutil.JSON(t, parts))}
	}
	return a, &parts
}

// TestParts downloads what is read and nothing else, the spans last, and tells of
// the rest before they are there.
func TestParts(t *testing.T) {
	img := testImage(t, "one")
	s := startServer(t, true)
	f := s.finder(t)
	var early *archive.Archive
	var closed atomic.Bool
	a, parts := parted(t, img)
	s.refer(s.put(t, a))
	before := s.gets()
	image := Image{Ref: s.ref(), Manifest: img.Descriptor.Digest}
	found, release, err := f.FindEarly(t.Context(), image, func(a *archive.Archive) func() {
		x, err := a.Files(0)
		require.NoError(t, err)
		require.NotEmpty(t, x.Entries)
		early = a
		return func() { closed.Store(true) }
	})
	require.NoError(t, err)
	require.Same(t, early, found)
	x, err := found.Layer(0)
	require.NoError(t, err)
	require.NotEmpty(t, x.Spans)
	require.Equal(t, before+2, s.gets())
	for i, want := range []string{
		fmt.Sprintf("bytes=%d-%d", parts.Rest.In, len(a.blob)-1), fmt.Sprintf("bytes=%d-%d", parts.Spans.In, parts.Rest.In-1),
	} {
		seen := s.seen()
		require.Equal(t, fmt.Sprintf("GET /v2/%s/blobs/%s %s", repo, digest.FromBytes(a.blob), want), seen[len(seen)-2+i])
	}
	require.False(t, closed.Load())
	release()
	f.Forget(image)
	require.True(t, closed.Load())
}

// TestLookWhole downloads all of an archive that is to be written again.
func TestLookWhole(t *testing.T) {
	img := testImage(t, "one")
	s := startServer(t, true)
	a, _ := parted(t, img)
	s.refer(s.put(t, a))
	found, upstream, err := s.finder(t).LookWhole(t.Context(), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	require.NoError(t, err)
	require.Empty(t, upstream)
	require.Contains(t, s.seen(), fmt.Sprintf("GET /v2/%s/blobs/%s ", repo, digest.FromBytes(a.blob)))
	_, err = found.Image()
	require.NoError(t, err)
	require.NoError(t, found.Close())
}

// TestBadParts takes the whole archive where the parts are of no use.
func TestBadParts(t *testing.T) {
	img := testImage(t, "one")
	for name, c := range map[string]struct {
		spoil func(*server, *archive.Parts)
		early bool // the rest is right, and may be told of
	}{
		"digest":              {spoil: func(_ *server, p *archive.Parts) { p.Rest.Digest = digest.FromString("x") }},
		"inside a frame":      {spoil: func(_ *server, p *archive.Parts) { p.Rest.In++ }},
		"place":               {spoil: func(_ *server, p *archive.Parts) { p.Rest.Out++ }},
		"beyond all archives": {spoil: func(_ *server, p *archive.Parts) { p.Rest.Out = maxArchive + 1 }},
		"digest of the spans": {spoil: func(_ *server, p *archive.Parts) { p.Spans.Digest = digest.FromString("x") }, early: true},
		"place of the spans":  {spoil: func(_ *server, p *archive.Parts) { p.Spans.Out-- }, early: true},
		"inside the spans":    {spoil: func(_ *server, p *archive.Parts) { p.Spans.In++ }, early: true},
		"no spans":            {spoil: func(s *server, p *archive.Parts) { s.missing = fmt.Sprint(p.Spans.In) }, early: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, true)
			f := s.finder(t)
			var early, closed atomic.Int32
			a, parts := parted(t, img)
			c.spoil(s, parts)
			s.refer(s.put(t, a))
			before := openArchives(t, f.opts.Dir)
			image := Image{Ref: s.ref(), Manifest: img.Descriptor.Digest}
			_, release, err := f.FindEarly(t.Context(), image, func(a *archive.Archive) func() {
				early.Add(1)
				go func() { _, _ = a.Spans(0) }() // what comes to nothing holds nobody up
				return func() { closed.Add(1) }
			})
			require.NoError(t, err)
			release()
			find(t.Context(), t, f, s.ref(), img)
			require.Contains(t, s.seen(), fmt.Sprintf("GET /v2/%s/blobs/%s ", repo, digest.FromBytes(a.blob)))
			if !c.early { // else it depends on which part comes first
				require.Zero(t, early.Load())
			}
			require.Equal(t, early.Load(), closed.Load())
			f.Forget(image)
			require.Equal(t, before, openArchives(t, f.opts.Dir))
		})
	}
}

// TestNoRanges has a registry that sends everything whole.
func TestNoRanges(t *testing.T) {
	img := testImage(t, "one")
	s := startServer(t, true)
	s.rangeless = true
	a, _ := parted(t, img)
	s.refer(s.put(t, a))
	find(t.Context(), t, s.finder(t), s.ref(), img)
}
