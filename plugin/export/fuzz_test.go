package export

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// TestManyManifests has few documents that list each other so often that going
// through all would not end.
func TestManyManifests(t *testing.T) {
	s, all := source(simple(t, "a").Descriptor, simple(t, "a"))
	for range maxDepth {
		s.Target = all.Add(ocispec.MediaTypeImageIndex, testutil.JSON(t, index(s.Target, s.Target, s.Target, s.Target)))
	}
	_, err := s.Manifests(t.Context(), any1)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "more than 4096 manifests")
}

// tarOf is a tar whose members are given by name and content, in turn.
func tarOf(t testing.TB, members ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(members); i += 2 {
		require.NoError(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: members[i], Mode: 0o644, Size: int64(len(members[i+1]))}))
		_, err := w.Write([]byte(members[i+1]))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

// TestManyMembers has more blobs than an image can have, and much else.
func TestManyMembers(t *testing.T) {
	members := []string{ocispec.ImageLayoutFile, layoutVersion, ocispec.ImageIndexFile, string(testutil.JSON(t, index(simple(t, "a").Descriptor)))}
	for i := range maxMembers {
		members = append(members, fmt.Sprintf("elsewhere/%d", i), "")
	}
	file := filepath.Join(t.TempDir(), "image.tar")
	require.NoError(t, os.WriteFile(file, tarOf(t, members...), 0o600))
	s, err := FromArchive(file, "")
	require.NoError(t, err)
	require.NoError(t, s.Close())
	for i := range maxMembers {
		members[4+2*i] = fmt.Sprintf("blobs/sha256/%d", i)
	}
	require.NoError(t, os.WriteFile(file, tarOf(t, members...), 0o600))
	_, err = FromArchive(file, "")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "more than 65536 blobs")
}

// FuzzArchive opens OCI archives and goes through all that they say they hold.
// What is whole is written again, and is then the same.
func FuzzArchive(f *testing.F) {
	img := simple(f, "a")
	good, err := os.ReadFile(writeTar(f, writeLayout(f, index(tagged(img, "example.com/a:1", "1")), img)))
	require.NoError(f, err)
	f.Add(good, "1")
	f.Add(good, "none")
	f.Add(good[:len(good)/2], "")
	d := digest.FromString("{}")
	blob := "blobs/sha256/" + d.Encoded()
	for _, manifests := range []string{
		`{}`, `{"size":-1}`, `{"mediaType":"` + ocispec.MediaTypeImageIndex + `","digest":"` + d.String() + `","size":9223372036854775807}`,
		`{"mediaType":"` + ocispec.MediaTypeImageManifest + `","digest":"` + d.String() + `","size":2}`,
		`{"mediaType":"` + ocispec.MediaTypeImageManifest + `","digest":"sha256:../../..","size":2}`,
		`{"mediaType":"` + ocispec.MediaTypeImageManifest + `","digest":"` + d.String() + `","size":2,"platform":{"os":"unknown"}}`,
	} {
		f.Add(tarOf(f, ocispec.ImageLayoutFile, layoutVersion, ocispec.ImageIndexFile, `{"manifests":[`+manifests+`]}`, blob, `{}`), "")
	}
	f.Add(tarOf(f, strings.Repeat("a/../", 100)+ocispec.ImageLayoutFile, `{"imageLayoutVersion":"2.0.0"}`, ocispec.ImageIndexFile, `[]`), "")
	f.Fuzz(func(t *testing.T, b []byte, tag string) {
		file := filepath.Join(t.TempDir(), "image.tar")
		require.NoError(t, os.WriteFile(file, b, 0o600))
		s, err := FromArchive(file, tag)
		if err != nil {
			return
		}
		defer s.Close()
		found, err := s.Manifests(t.Context(), AllPlatforms)
		if err != nil {
			return
		}
		again := filepath.Join(t.TempDir(), "again.tar")
		if _, err := WriteTar(t.Context(), s, again, WriteOptions{Platforms: AllPlatforms, Name: "example.com/again:1"}); err != nil {
			return // a layer's content is looked at only now
		}
		copied, err := FromArchive(again, "")
		require.NoError(t, err)
		defer copied.Close()
		manifests, err := copied.Manifests(t.Context(), AllPlatforms)
		require.NoError(t, err)
		for i, m := range manifests {
			require.Equal(t, found[i].Raw, m.Raw)
			require.Equal(t, found[i].Config, m.Config)
		}
	})
}
