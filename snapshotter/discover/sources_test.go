package discover

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
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

// TestNewer has archives that only a newer program can read, wherever they are: that is the first reason why there is
// none, whatever else is wrong.
func TestNewer(t *testing.T) {
	img := testImage(t, "one")
	newer := archiveOf(t, img)
	newer[len(newer)-64+8]++ // the version in the footer
	var asked []string
	put := good(t, img)
	put.blob = compress(t, newer)
	damaged := put
	damaged.blob = []byte("damaged")
	put.created, damaged.created = "2029-01-01T00:00:00Z", "2028-01-01T00:00:00Z" // the damaged one is tried last
	for name, place := range map[string]func(*server, *Finder, *Image){
		"registry": func(s *server, _ *Finder, _ *Image) {
			s.refer(s.put(t, put))
			s.refer(s.put(t, damaged))
		},
		"bucket": func(_ *server, f *Finder, _ *Image) {
			f.opts.Sources = append([]Source{source{"newer", nil, newer, &asked}}, f.opts.Sources...)
		},
		"link": func(s *server, _ *Finder, image *Image) { image.Link = s.put(t, put).Digest },
		"file": func(_ *server, f *Finder, _ *Image) {
			require.NoError(t, os.WriteFile(filepath.Join(f.opts.Dir, "a.clip"), newer, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, true)
			f, image := s.finder(t), Image{Ref: s.ref(), Manifest: img.Descriptor.Digest}
			f.opts.Sources = []Source{source{"empty", errdefs.ErrNotFound, nil, &asked}, source{"nonsense", nil, []byte("no archive"), &asked}}
			place(s, f, &image)
			_, _, err := f.Find(t.Context(), image)
			require.ErrorIs(t, err, archive.ErrVersion)
			require.ErrorIs(t, err, errdefs.ErrNotFound)
			first, _, _ := strings.Cut(err.Error(), "; ")
			require.Contains(t, first, "upgrade containerd-clip, or index the image again with this version")
			require.Contains(t, err.Error(), "nonsense", "the others are told, too")
		})
	}
}
