package discover

import (
	"bytes"
	"context"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// TestLink has images that name an artifact, which is of the image that was converted. It is used whether referrers are
// on or not, and before all else. What cannot be used is passed over.
func TestLink(t *testing.T) {
	s := startServer(t, true)
	img, converted, other := testImage(t, "one"), digest.FromString("the manifest with the link"), testImage(t, "two")
	link := s.put(t, good(t, img))
	f := s.finder(t)
	f.opts.Referrers = false
	a, release, err := f.Find(t.Context(), Image{Ref: s.ref(), Manifest: converted, Link: link.Digest})
	require.NoError(t, err)
	defer release()
	require.Equal(t, img.Descriptor.Digest, a.Info().Descriptor.Digest)
	_, _, err = f.Find(t.Context(), Image{Ref: s.ref(), Manifest: converted})
	require.ErrorIs(t, err, errdefs.ErrNotFound, "it is the link that leads there")

	f.opts.Referrers = true
	s.refer(s.put(t, good(t, other)))
	bad := good(t, img)
	bad.subject = other.Descriptor.Digest
	for name, d := range map[string]digest.Digest{"not there": digest.FromString("none"), "other image": s.put(t, bad).Digest, "no artifact": img.Layers[0].Digest} {
		t.Run(name, func(t *testing.T) {
			ctx, logged := captureLog(t)
			_, release, err := f.Find(ctx, Image{Ref: s.ref(), Manifest: other.Descriptor.Digest, Link: d})
			require.NoError(t, err, "referrers are asked for")
			release()
			require.Contains(t, logged.String(), "the archive that the image links to cannot be used")
			require.Contains(t, logged.String(), d.String())
		})
	}
}

// source is a place with one file, for all images, or with what an error says.
type source struct {
	name  string
	err   error
	file  []byte
	asked *[]string
}

func (s source) Open(context.Context, string, digest.Digest) (io.ReadCloser, error) {
	*s.asked = append(*s.asked, s.name)
	return io.NopCloser(bytes.NewReader(s.file)), s.err
}

func (s source) String() string { return s.name }

// TestSources asks other places when neither this node nor the registry has an archive, in their order, and passes over
// what is no archive of the image.
func TestSources(t *testing.T) {
	s := startServer(t, true)
	img, other := testImage(t, "one"), testImage(t, "two")
	var asked []string
	good := source{"good", nil, archiveOf(t, img), &asked}
	f := s.finder(t)
	f.opts.Sources = []Source{
		source{"empty", errdefs.ErrNotFound, nil, &asked}, source{"down", errdefs.ErrUnavailable, nil, &asked}, source{"nonsense", nil, []byte("no archive"), &asked},
		source{"other", nil, archiveOf(t, other), &asked}, good, source{"too late", nil, archiveOf(t, img), &asked},
	}
	ctx, logged := captureLog(t)
	find(ctx, t, f, s.ref(), img)
	require.Equal(t, []string{"empty", "down", "nonsense", "other", "good"}, asked)
	require.Equal(t, 3, strings.Count(logged.String(), "passed over"))
	require.NotContains(t, logged.String(), "empty")

	f.opts.Sources = f.opts.Sources[:4]
	f.Forget(Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	before := openArchives(t, f.opts.Dir)
	_, _, err := f.Find(ctx, Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	for _, says := range []string{"the registry has no archive", "nonsense", "archive is of image " + other.Descriptor.Digest.String()} {
		require.ErrorContains(t, err, says)
	}
	require.Equal(t, before, openArchives(t, f.opts.Dir))

	asked = nil
	f.opts.Sources = []Source{good}
	img.WriteArchive(t, filepath.Join(f.opts.Dir, "a.clip"), s.ref())
	f.Forget(Image{Ref: s.ref(), Manifest: img.Descriptor.Digest})
	find(ctx, t, f, s.ref(), img)
	require.Empty(t, asked, "what is here comes first")
}
