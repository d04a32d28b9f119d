package export

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// plan is what of a source goes into a layout.
type plan struct {
	root      ocispec.Descriptor                   // as index.json lists it
	blobs     []ocispec.Descriptor                 // each once, what refers to others behind them
	documents map[digest.Digest][]byte             // blobs that are not in the source
	seen      map[digest.Digest]ocispec.Descriptor // of blobs
}

// plan decides what to write. An image all of whose platforms are selected
// stays as it is, its attestations included. Else the selected manifest stands
// for the image, or a new index of those that are selected.
func (s *Source) plan(ctx context.Context, o WriteOptions) (*plan, error) {
	manifests, err := s.Manifests(ctx, o.Platforms)
	if err != nil {
		return nil, err
	}
	name := o.Name
	if name == "" {
		name = s.Ref
	}
	p, err := s.wholePlan(ctx, manifests)
	if err != nil {
		return nil, err
	}
	if p == nil {
		if p, err = s.partPlan(ctx, manifests); err != nil {
			return nil, err
		}
	}
	p.root.Annotations = nameAnnotations(name)
	return p, nil
}

// wholePlan is of the whole image, or nil if less than that is selected or at
// hand.
func (s *Source) wholePlan(ctx context.Context, selected []Manifest) (*plan, error) {
	chosen := map[digest.Digest]bool{}
	for _, m := range selected {
		chosen[m.Descriptor.Digest] = true
	}
	p := newPlan()
	err := s.collect(ctx, p, s.Target, 0, func(desc ocispec.Descriptor) bool {
		return chosen[desc.Digest] || isAttestation(desc)
	})
	if errors.Is(err, errPart) || errdefs.IsNotFound(err) {
		return nil, nil
	}
	p.root = bare(s.Target)
	if images.IsManifestType(s.Target.MediaType) {
		p.root = selected[0].bare()
	}
	return p, err
}

// partPlan is of the selected manifests.
func (s *Source) partPlan(ctx context.Context, selected []Manifest) (*plan, error) {
	p := newPlan()
	part := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, m := range selected {
		if err := s.collect(ctx, p, m.Descriptor, 0, func(ocispec.Descriptor) bool { return true }); err != nil {
			return nil, err
		}
		part.Manifests = append(part.Manifests, m.bare())
	}
	p.root = part.Manifests[0]
	if len(selected) == 1 {
		return p, nil
	}
	raw, err := json.Marshal(part)
	if err != nil {
		return nil, err
	}
	p.root = ocispec.Descriptor{MediaType: part.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	p.documents[p.root.Digest] = raw
	p.add(p.root)
	return p, nil
}

func newPlan() *plan {
	return &plan{documents: map[digest.Digest][]byte{}, seen: map[digest.Digest]ocispec.Descriptor{}}
}

func (p *plan) add(desc ocispec.Descriptor) {
	if _, ok := p.seen[desc.Digest]; !ok {
		p.seen[desc.Digest] = desc
		p.blobs = append(p.blobs, desc)
	}
}

// errPart says that an index lists a manifest that is not wanted.
var errPart = errors.New("only a part of the image is selected")

// collect adds desc and all below it to p. It ends with errPart at the first
// manifest that wanted refuses, and with errdefs.ErrNotFound where content is
// missing.
func (s *Source) collect(ctx context.Context, p *plan, desc ocispec.Descriptor, depth int, wanted func(ocispec.Descriptor) bool) error {
	if !images.IsManifestType(desc.MediaType) && !images.IsIndexType(desc.MediaType) {
		return s.collectBlob(ctx, p, desc)
	}
	if _, ok := p.seen[desc.Digest]; ok {
		return nil // with all that is below it
	}
	if depth > maxDepth {
		return fmt.Errorf("image %s: indexes nested deeper than %d: %w", s.Name, maxDepth, errdefs.ErrInvalidArgument)
	}
	if images.IsManifestType(desc.MediaType) && !wanted(desc) {
		return errPart
	}
	raw, err := s.read(ctx, desc)
	if err != nil {
		return err
	}
	var doc struct {
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return fmt.Errorf("image %s: %s %s: %w", s.Name, desc.MediaType, desc.Digest, err)
	}
	children := append(doc.Layers, doc.Manifests...)
	if doc.Config != nil {
		children = append(children, *doc.Config)
	}
	for _, child := range children {
		if err := s.collect(ctx, p, child, depth+1, wanted); err != nil {
			return err
		}
	}
	desc.Size = int64(len(raw))
	p.add(desc)
	return nil
}

// collectBlob adds a layer or config to p.
func (s *Source) collectBlob(ctx context.Context, p *plan, desc ocispec.Descriptor) error {
	if _, ok := p.seen[desc.Digest]; ok {
		return nil
	}
	ra, err := s.Provider.ReaderAt(ctx, desc)
	if err != nil {
		return fmt.Errorf("image %s: blob %s: %w", s.Name, desc.Digest, err)
	}
	defer ra.Close()
	if ra.Size() != desc.Size {
		return fmt.Errorf("image %s: blob %s has %d bytes, its descriptor says %d: %w", s.Name, desc.Digest, ra.Size(), desc.Size, errdefs.ErrDataLoss)
	}
	p.add(desc)
	return nil
}

// isAttestation says whether an index lists desc for no platform, as BuildKit
// lists provenance.
func isAttestation(desc ocispec.Descriptor) bool {
	return desc.Platform != nil && desc.Platform.OS == "unknown"
}

// bare is desc without what is said of it elsewhere.
func bare(desc ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size, Platform: desc.Platform, ArtifactType: desc.ArtifactType}
}

// bare describes the manifest and its platform, the latter in the image's words.
func (m Manifest) bare() ocispec.Descriptor {
	d := bare(m.Descriptor)
	if d.Platform == nil {
		d.Platform = new(ocispec.Platform)
		if err := json.Unmarshal(m.Config, d.Platform); err != nil {
			d.Platform = &m.Platform
		}
	}
	return d
}

// nameAnnotations name an image in a layout: in full for containerd, and by its
// tag for everybody else.
func nameAnnotations(name string) map[string]string {
	if name == "" {
		return nil
	}
	return map[string]string{images.AnnotationImageName: name, ocispec.AnnotationRefName: tagOf(name)}
}

// tagOf returns the tag of a reference; where there is none, all of it.
func tagOf(name string) string {
	if ref, err := reference.Parse(name); err == nil {
		if tagged, ok := ref.(reference.Tagged); ok {
			return tagged.Tag()
		}
	}
	return strings.TrimSpace(name)
}
