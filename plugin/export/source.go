// Package export presents an image of the local store as an OCI layout.
//
// An image in containerd's store, an OCI layout directory and an OCI archive
// (a layout in a tar) are the same thing to an indexer: a content.Provider and
// the descriptor of a manifest or index in it. Source is that pair.
//
// Nothing here talks to a registry: content that is not there is an error that
// names it.
package export

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Source is an image to read, with all its content at hand.
type Source struct {
	Name     string // what the user called it
	Kind     string // where it is: "containerd", "oci" or "oci-archive"
	Ref      string // the image's own reference; empty if it has none
	Provider content.Provider
	Target   ocispec.Descriptor // a manifest or an index
	closer   func() error
}

// Close releases what the source holds open.
func (s *Source) Close() error {
	if s.closer == nil {
		return nil
	}
	return s.closer()
}

// Manifest is one platform's image in a source.
type Manifest struct {
	Descriptor ocispec.Descriptor
	Platform   ocispec.Platform
	Raw        []byte // the manifest, verbatim
	Config     []byte // verbatim
	Layers     []ocispec.Descriptor
}

// maxDocument bounds manifests, indexes and configs; it is containerd's bound.
const maxDocument = 8 << 20

// maxDepth bounds indexes that refer to indexes, and maxManifests how many
// documents they list in all: each may list the next many times.
const (
	maxDepth     = 8
	maxManifests = 4096
)

// Selection says which platforms of an image are meant.
type Selection struct {
	Name  string // for messages
	Match platforms.MatchComparer
	All   bool // all that match, not only the best match
	// Whole has content be missing where an index lists a manifest that matches
	// and that is not at hand. Else such a manifest is passed over.
	Whole bool
}

// AllPlatforms selects every platform that is at hand.
var AllPlatforms = Selection{Name: "any", Match: platforms.All, All: true}

// ThisPlatform selects what runs best on this machine.
var ThisPlatform = Selection{Name: platforms.DefaultString(), Match: platforms.Default()}

// OnePlatform selects p, or what runs best on it.
func OnePlatform(p ocispec.Platform) Selection {
	return Selection{Name: platforms.Format(p), Match: platforms.Only(p)}
}

func (s Selection) needs(p ocispec.Platform) bool { return s.Whole && s.Match.Match(p) }

// Manifests returns the manifests of the source that are selected, in the
// order of the index. It fails with errdefs.ErrNotFound if there is none or if
// content of one is missing.
func (s *Source) Manifests(ctx context.Context, sel Selection) ([]Manifest, error) {
	found, err := s.Selected(ctx, sel)
	if err != nil {
		return nil, err
	}
	for _, m := range found {
		if err := s.CheckLayers(ctx, m); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// Selected is Manifests without a look at the layers.
func (s *Source) Selected(ctx context.Context, sel Selection) ([]Manifest, error) {
	var found []Manifest
	var seen []string
	err := s.walk(ctx, s.Target, sel, func(desc ocispec.Descriptor) error {
		if desc.Platform != nil && !sel.Match.Match(*desc.Platform) {
			seen = append(seen, platforms.Format(*desc.Platform))
			return nil
		}
		m, err := s.manifest(ctx, desc)
		if err != nil {
			return err
		}
		if !sel.Match.Match(m.Platform) {
			seen = append(seen, platforms.Format(m.Platform))
			return nil
		}
		found = append(found, m)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("image %s has no manifest for platform %s; it has: %s: %w",
			s.Name, sel.Name, strings.Join(seen, ", "), errdefs.ErrNotFound)
	}
	if !sel.All {
		best := 0
		for i := range found {
			if sel.Match.Less(found[i].Platform, found[best].Platform) {
				best = i
			}
		}
		found = found[best : best+1]
	}
	return found, nil
}

// walk calls fn for every image manifest below desc. Manifests that an index
// lists for no platform (attestations) are passed over, and those that are
// absent and that sel can do without.
func (s *Source) walk(ctx context.Context, desc ocispec.Descriptor, sel Selection, fn func(ocispec.Descriptor) error) error {
	left := maxManifests
	return s.walkBelow(ctx, desc, sel, 0, &left, fn)
}

func (s *Source) walkBelow(ctx context.Context, desc ocispec.Descriptor, sel Selection, depth int, left *int, fn func(ocispec.Descriptor) error) error {
	if *left--; *left < 0 {
		return fmt.Errorf("image %s: more than %d manifests: %w", s.Name, maxManifests, errdefs.ErrInvalidArgument)
	}
	if images.IsManifestType(desc.MediaType) {
		return fn(desc)
	}
	if !images.IsIndexType(desc.MediaType) {
		return fmt.Errorf("image %s: %s is neither a manifest nor an index: %w", s.Name, desc.MediaType, errdefs.ErrInvalidArgument)
	}
	if depth == maxDepth {
		return fmt.Errorf("image %s: indexes nested deeper than %d: %w", s.Name, maxDepth, errdefs.ErrInvalidArgument)
	}
	raw, err := s.read(ctx, desc)
	if err != nil {
		return err
	}
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return fmt.Errorf("image %s: index %s: %w", s.Name, desc.Digest, err)
	}
	for _, child := range index.Manifests {
		if isAttestation(child) {
			continue
		}
		if err := s.walkBelow(ctx, child, sel, depth+1, left, fn); err != nil {
			if errdefs.IsNotFound(err) && child.Platform != nil && !sel.needs(*child.Platform) {
				continue // of a platform that was not pulled
			}
			return err
		}
	}
	return nil
}

// manifest reads the manifest desc and its config.
func (s *Source) manifest(ctx context.Context, desc ocispec.Descriptor) (Manifest, error) {
	m := Manifest{Descriptor: desc}
	var err error
	if m.Raw, err = s.read(ctx, desc); err != nil {
		return m, err
	}
	var man ocispec.Manifest
	if err := json.Unmarshal(m.Raw, &man); err != nil {
		return m, fmt.Errorf("image %s: manifest %s: %w", s.Name, desc.Digest, err)
	}
	if m.Config, err = s.read(ctx, man.Config); err != nil {
		return m, err
	}
	var platform ocispec.Platform
	if err := json.Unmarshal(m.Config, &platform); err != nil {
		return m, fmt.Errorf("image %s: config %s: %w", s.Name, man.Config.Digest, err)
	}
	if desc.Platform != nil {
		platform = *desc.Platform
	}
	m.Platform = platforms.Normalize(platform)
	m.Layers = man.Layers
	m.Descriptor.Size = int64(len(m.Raw))
	return m, nil
}

// CheckLayers fails if a layer blob of m is not in the source or cannot be
// part of an archive.
func (s *Source) CheckLayers(ctx context.Context, m Manifest) error {
	var missing []string
	for _, l := range m.Layers {
		if images.IsNonDistributable(l.MediaType) {
			return fmt.Errorf("image %s: layer %s is foreign (%s): its data is not in a registry: %w",
				s.Name, l.Digest, l.MediaType, errdefs.ErrInvalidArgument)
		}
		ra, err := s.Provider.ReaderAt(ctx, l)
		if errdefs.IsNotFound(err) {
			missing = append(missing, l.Digest.String())
			continue
		}
		if err != nil {
			return fmt.Errorf("image %s: layer %s: %w", s.Name, l.Digest, err)
		}
		size := ra.Size()
		ra.Close()
		if size != l.Size {
			return fmt.Errorf("image %s: layer %s has %d bytes, the manifest says %d: %w",
				s.Name, l.Digest, size, l.Size, errdefs.ErrDataLoss)
		}
	}
	if len(missing) > 0 {
		remedy := ""
		if s.Kind == "containerd" {
			remedy = `; the image was pulled lazily, or for another platform: "clipctl content ensure" fetches them`
		}
		return fmt.Errorf("image %s: layers are missing in the local store: %s%s: %w",
			s.Name, strings.Join(missing, ", "), remedy, errdefs.ErrNotFound)
	}
	return nil
}

// read returns a small blob, checked against its digest.
func (s *Source) read(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	if desc.Size > maxDocument {
		return nil, fmt.Errorf("image %s: %s has %d bytes, more than %d: %w", s.Name, desc.Digest, desc.Size, maxDocument, errdefs.ErrInvalidArgument)
	}
	ra, err := s.Provider.ReaderAt(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("image %s: %s %s: %w", s.Name, desc.MediaType, desc.Digest, err)
	}
	defer ra.Close()
	if ra.Size() > maxDocument {
		return nil, fmt.Errorf("image %s: %s has %d bytes, more than %d: %w", s.Name, desc.Digest, ra.Size(), maxDocument, errdefs.ErrInvalidArgument)
	}
	b := make([]byte, ra.Size())
	if n, err := ra.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("image %s: reading %s: %w", s.Name, desc.Digest, err)
	}
	if err := verify(desc.Digest, b); err != nil {
		return nil, fmt.Errorf("image %s: %w", s.Name, err)
	}
	return b, nil
}

func verify(d digest.Digest, b []byte) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", d, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	if d.Algorithm().FromBytes(b) != d {
		return fmt.Errorf("content of %s does not match its digest: %w", d, errdefs.ErrDataLoss)
	}
	return nil
}
