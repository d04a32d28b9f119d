package export

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FromLayout opens the image tagged tag in the OCI layout in dir; an empty
// tag stands for the only image there is.
func FromLayout(dir, tag string) (*Source, error) {
	marker, err := os.ReadFile(filepath.Join(dir, ocispec.ImageLayoutFile))
	if err != nil {
		return nil, fmt.Errorf("%s is not an OCI layout: %w", dir, err)
	}
	index, err := os.ReadFile(filepath.Join(dir, ocispec.ImageIndexFile))
	if err != nil {
		return nil, fmt.Errorf("%s is not an OCI layout: %w", dir, err)
	}
	s := &Source{Name: "oci:" + dir, Kind: "oci", Provider: layoutProvider(dir)}
	return s, s.selectTag(marker, index, tag)
}

type layoutProvider string

func (dir layoutProvider) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	return openBlob(string(dir), desc)
}

// selectTag finds the image in a layout's index.json.
func (s *Source) selectTag(marker, raw []byte, tag string) error {
	if err := checkMarker(s.Name, marker); err != nil {
		return err
	}
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return fmt.Errorf("%s: index.json: %w", s.Name, err)
	}
	var matches []ocispec.Descriptor
	var tags []string
	for _, desc := range index.Manifests {
		full, short := desc.Annotations[images.AnnotationImageName], desc.Annotations[ocispec.AnnotationRefName]
		if short != "" {
			tags = append(tags, short)
		}
		if tag == "" || tag == short || tag == full {
			matches = append(matches, desc)
		}
	}
	if len(matches) != 1 {
		return fmt.Errorf("%s has %d images for tag %q; name one of: %s: %w",
			s.Name, len(matches), tag, strings.Join(tags, ", "), errdefs.ErrNotFound)
	}
	s.Target = matches[0]
	s.Ref = matches[0].Annotations[images.AnnotationImageName]
	if tag != "" {
		s.Name += ":" + tag
	}
	return nil
}

// FromArchive opens the image tagged tag in an uncompressed tar of an OCI
// layout, as "ctr image export" and "docker save" write it. The tar stays
// where it is: its blobs are read in place.
func FromArchive(file, tag string) (_ *Source, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	members, err := tarMembers(f)
	if err != nil {
		return nil, fmt.Errorf("%s is not an OCI archive: %w", file, err)
	}
	s := &Source{Name: "oci-archive:" + file, Kind: "oci-archive", Provider: archiveProvider{f, members}, closer: f.Close}
	marker, err := members.document(f, ocispec.ImageLayoutFile)
	if err != nil {
		return nil, fmt.Errorf("%s is not an OCI archive: %w", file, err)
	}
	index, err := members.document(f, ocispec.ImageIndexFile)
	if err != nil {
		return nil, fmt.Errorf("%s is not an OCI archive: %w", file, err)
	}
	return s, s.selectTag(marker, index, tag)
}

// member is where a file's content lies in a tar.
type member struct{ off, size int64 }

type members map[string]member

// maxMembers bounds the blobs of an OCI archive.
const maxMembers = 1 << 16

func tarMembers(f *os.File) (members, error) {
	found := members{}
	tr := tar.NewReader(f)
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return found, nil
		}
		if err != nil {
			return nil, err
		}
		off, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		name := path.Clean(hdr.Name)
		if hdr.Typeflag != tar.TypeReg || !inLayout(name) {
			continue
		}
		if found[name] = (member{off, hdr.Size}); len(found) > maxMembers {
			return nil, fmt.Errorf("it has more than %d blobs: %w", maxMembers, errdefs.ErrInvalidArgument)
		}
	}
}

// inLayout says whether a layout has a file of that name. What else is in a tar
// is of no use, and its names may be long.
func inLayout(name string) bool {
	const longest = 256 // more than the path of any blob
	return name == ocispec.ImageLayoutFile || name == ocispec.ImageIndexFile ||
		len(name) <= longest && strings.HasPrefix(name, ocispec.ImageBlobsDir+"/")
}

func (m members) document(f *os.File, name string) ([]byte, error) {
	at, ok := m[name]
	if !ok {
		return nil, fmt.Errorf("%s: %w", name, errdefs.ErrNotFound)
	}
	if at.size > maxDocument {
		return nil, fmt.Errorf("%s has %d bytes, more than %d: %w", name, at.size, maxDocument, errdefs.ErrInvalidArgument)
	}
	b := make([]byte, at.size)
	_, err := f.ReadAt(b, at.off)
	return b, err
}

type archiveProvider struct {
	f       *os.File
	members members
}

func (p archiveProvider) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	at, ok := p.members[path.Join("blobs", desc.Digest.Algorithm().String(), desc.Digest.Encoded())]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, errdefs.ErrNotFound)
	}
	return sectionReaderAt{io.NewSectionReader(p.f, at.off, at.size)}, nil
}

type sectionReaderAt struct{ *io.SectionReader }

func (sectionReaderAt) Close() error { return nil }

// Parse splits an image argument: "oci:DIR[:TAG]" and "oci-archive:FILE[:TAG]"
// name a layout, anything else an image in containerd's store.
func Parse(arg string) (kind, location, tag string) {
	for _, kind := range []string{"oci", "oci-archive"} {
		rest, ok := strings.CutPrefix(arg, kind+":")
		if !ok {
			continue
		}
		if _, err := os.Stat(rest); err == nil {
			return kind, rest, ""
		}
		// A tag may be a whole reference, with colons of its own.
		for i, c := range rest {
			if c != ':' {
				continue
			}
			if _, err := os.Stat(rest[:i]); err == nil {
				return kind, rest[:i], rest[i+1:]
			}
		}
		if i := strings.LastIndexByte(rest, ':'); i > strings.LastIndexByte(rest, '/') {
			return kind, rest[:i], rest[i+1:]
		}
		return kind, rest, ""
	}
	return "containerd", arg, ""
}
