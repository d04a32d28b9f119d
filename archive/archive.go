// Package archive reads and writes .clip files: an image's index, without its data.
//
// A .clip file is two files in one. Its front part is what upstream CLIP
// (github.com/beam-cloud/clip) writes and mounts: header, file index, storage
// info with the remote reference. Behind it, where CLIP does not look, lie
// sections of ours: the image's manifest and config, and for each layer the
// index that archive/layer makes, and perhaps what a start of the image reads.
// docs/format.md has the layout to the byte.
//
// The sections are the truth; the front part is derived from them, and this
// package never reads it back. An archive is untrusted: every size is bounded
// and every section checked against its digest before use, and the layer
// indexes against the manifest. Whether the manifest is the right one is for
// the caller to decide, by its digest.
//
// The package does not fetch and does not mount: archive/layer reads files
// through a function that fetches ranges, archive/tree merges layers, and
// snapshotter/contents does all of it, lists, reads and mounts, without
// containerd.
package archive

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive/imports"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Media types of an archive in a registry: the artifact that refers to the
// image, and its one layer, a zstd'ed .clip file.
const (
	ArtifactType = "application/vnd.beam.clip.index.v2"
	MediaType    = "application/vnd.beam.clip.archive.v2+zstd"
)

// AnnotationLink is an annotation of the layers in an image's manifest: the
// digest of the artifact that holds the image's archive. "clipctl convert"
// writes it. containerd's unpacker hands annotations with this prefix on, as
// labels of the snapshot that it prepares for the layer.
const AnnotationLink = "containerd.io/snapshot/clip.archive"

// Image is what an archive is made from.
type Image struct {
	// StorageRef is the remote reference: where a worker finds the layers.
	StorageRef string
	Platform   ocispec.Platform
	Descriptor ocispec.Descriptor // of the platform's manifest
	Manifest   []byte             // verbatim
	Config     []byte             // verbatim
	Layers     []Layer            // as in the manifest, lowest first
	Prefetch   *Prefetch          // nil if no start was recorded
}

// Layer is one layer of an Image: its index, or the reason why it has none.
type Layer struct {
	Index  *layer.Index
	Reason string // why the layer cannot be read lazily; empty if Index is set

	encoded *EncodedIndex // of Index; nil if it was not encoded yet, or Index is another one by now
}

// Info is the JSON document that describes an archive.
type Info struct {
	StorageRef string             `json:"storageRef"`
	Platform   ocispec.Platform   `json:"platform"`
	Descriptor ocispec.Descriptor `json:"manifest"`
	// NotLazy holds, for each layer that has no index, why; keyed by digest.
	NotLazy map[digest.Digest]string `json:"notLazy,omitempty"`
	// Sizes holds, for each layer that has an index, the bytes of its uncompressed
	// stream; keyed by digest. Archives of earlier programs do not say.
	Sizes map[digest.Digest]inflate.Out `json:"sizes,omitempty"`
}

// Archive is an open .clip file. Its methods are safe for concurrent use.
type Archive struct {
	s        *sections
	closer   io.Closer // nil if there is nothing to close
	info     Info
	manifest ocispec.Manifest
	rawMan   []byte
	rawConf  []byte
	diffIDs  []digest.Digest

	blob  digest.Digest // see WindowsIn; empty if the windows are here
	parts Parts         // of blob
}

// OpenFile opens the archive at path. The caller closes it.
func OpenFile(path string) (*Archive, error) { return openPath(path, Open) }

// openPath opens the file at path with open, which takes it over.
func openPath[A any](path string, open func(io.ReaderAt, int64) (A, error)) (a A, err error) {
	f, err := os.Open(path)
	if err != nil {
		return a, err
	}
	st, err := f.Stat()
	if err == nil {
		if a, err = open(f, st.Size()); err == nil {
			return a, nil
		}
	}
	f.Close()
	return a, fmt.Errorf("archive %s: %w", path, err)
}

// Open opens the archive in the first size bytes of r and checks that its
// manifest, config and description belong together. If r is an io.Closer,
// Close closes it.
func Open(r io.ReaderAt, size int64) (*Archive, error) { return openSections(r, size, true) }

// OpenTail is Open for an archive of which only the sections, see Parts, are
// there. Only what this package reads can be read from it.
func OpenTail(r io.ReaderAt, size int64) (*Archive, error) { return openSections(r, size, false) }

func openSections(r io.ReaderAt, size int64, front bool) (*Archive, error) {
	s, err := readSections(r, size, front)
	if err != nil {
		return nil, err
	}
	a := &Archive{s: s}
	a.closer, _ = r.(io.Closer)
	info, err := s.read(kindInfo, 0, maxDocument)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(info, &a.info); err != nil {
		return nil, fmt.Errorf("%w: description: %w", ErrCorrupt, err)
	}
	if a.rawMan, err = s.read(kindManifest, 0, maxDocument); err != nil {
		return nil, err
	}
	if a.rawConf, err = s.read(kindConfig, 0, maxDocument); err != nil {
		return nil, err
	}
	a.manifest, a.diffIDs, err = parseImage(a.info.Descriptor, a.rawMan, a.rawConf)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return a, nil
}

// parseImage checks a manifest against its descriptor and a config against
// the manifest, and returns the manifest and the layers' diff IDs.
func parseImage(desc ocispec.Descriptor, manifest, config []byte) (m ocispec.Manifest, diffIDs []digest.Digest, err error) {
	if desc.Digest.Validate() != nil || desc.Digest.Algorithm().FromBytes(manifest) != desc.Digest {
		return m, nil, fmt.Errorf("manifest does not match its digest %q", desc.Digest)
	}
	if err := json.Unmarshal(manifest, &m); err != nil {
		return m, nil, fmt.Errorf("manifest: %w", err)
	}
	if m.Config.Digest.Validate() != nil || m.Config.Digest.Algorithm().FromBytes(config) != m.Config.Digest {
		return m, nil, fmt.Errorf("config does not match its digest %q", m.Config.Digest)
	}
	var c ocispec.Image
	if err := json.Unmarshal(config, &c); err != nil {
		return m, nil, fmt.Errorf("config: %w", err)
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return m, nil, fmt.Errorf("manifest has %d layers, config has %d", len(m.Layers), len(c.RootFS.DiffIDs))
	}
	for _, id := range c.RootFS.DiffIDs {
		if err := id.Validate(); err != nil {
			return m, nil, fmt.Errorf("diff ID %q: %w", id, err)
		}
	}
	return m, c.RootFS.DiffIDs, nil
}

// Close closes what the archive was opened from.
func (a *Archive) Close() error {
	if a.closer == nil {
		return nil
	}
	return a.closer.Close()
}

// Info returns the archive's description.
func (a *Archive) Info() Info { return a.info }

// Manifest returns the image's manifest, parsed and verbatim.
func (a *Archive) Manifest() (ocispec.Manifest, []byte) { return a.manifest, a.rawMan }

// Config returns the image's config, verbatim.
func (a *Archive) Config() []byte { return a.rawConf }

// DiffIDs returns the digests of the uncompressed layers, lowest first.
func (a *Archive) DiffIDs() []digest.Digest { return a.diffIDs }

// ChainIDs returns the chain ID of each layer: it names the layer together
// with all below it.
func (a *Archive) ChainIDs() []digest.Digest {
	return identity.ChainIDs(append([]digest.Digest(nil), a.diffIDs...))
}

// NotLazy returns why layer i cannot be read lazily, or "".
func (a *Archive) NotLazy(i int) string { return a.info.NotLazy[a.manifest.Layers[i].Digest] }

// Spans returns layer i's index without its entries and windows in groups.
func (a *Archive) Spans(i int) (*layer.Index, error) {
	spans, err := a.s.frame(kindSpans, i, maxSection)
	if err != nil {
		return nil, err
	}
	points, err := a.s.optional(kindPoints, i, maxSection)
	if err != nil {
		return nil, err
	}
	x, err := decodeSpans(spans, points)
	if err == nil {
		err = a.s.checkWindows(i, x)
	}
	if err != nil {
		return nil, fmt.Errorf("layer %d: %w", i, err)
	}
	want := a.manifest.Layers[i]
	if x.Digest != want.Digest || int64(x.Size) != want.Size || x.DiffID != a.diffIDs[i] {
		return nil, fmt.Errorf("%w: layer %d: the index is of %s, the manifest names %s", ErrCorrupt, i, x.Digest, want.Digest)
	}
	if size, ok := a.info.Sizes[want.Digest]; ok && x.OutSize != size {
		return nil, fmt.Errorf("%w: layer %d: the index is of %d bytes, the description says %d", ErrCorrupt, i, x.OutSize, size)
	}
	return x, nil
}

// SpansAndWindows is Spans with the windows, if they are here: see WindowsIn.
func (a *Archive) SpansAndWindows(i int) (*layer.Index, error) {
	x, err := a.Spans(i)
	if err != nil || a.blob != "" || len(x.Groups) == 0 {
		return x, err
	}
	windows, err := a.s.frame(kindWindows, i, maxSection)
	x.Windows = windows.stored
	return x, err
}

// Files returns the index of layer i without its spans and seek points, which it
// does not read unless the archive is an earlier program's. That the size of the
// stream is the one that the spans are of shows when they are read.
func (a *Archive) Files(i int) (*layer.Index, error) {
	want := a.manifest.Layers[i]
	size, ok := a.info.Sizes[want.Digest]
	if !ok {
		x, err := a.Layer(i)
		if err == nil {
			x.Spans, x.Points, x.Groups, x.Windows = nil, nil, nil, nil
		}
		return x, err
	}
	if size < 0 || size > maxOutSize {
		return nil, fmt.Errorf("%w: layer %d: the description says that it has %d bytes", ErrCorrupt, i, size)
	}
	x := &layer.Index{Digest: want.Digest, Size: inflate.In(want.Size), DiffID: a.diffIDs[i], OutSize: size}
	return x, a.decodeEntries(i, x.DecodeEntries)
}

// Entries returns the entry part of layer i's index as it is stored: as one zstd
// frame, which is not decoded.
func (a *Archive) Entries(i int) ([]byte, error) {
	f, err := a.s.frame(kindEntries, i, maxSection)
	return f.stored, err
}

// Layer returns the whole index of layer i; the windows only if they are here.
func (a *Archive) Layer(i int) (*layer.Index, error) { return a.layer(i, (*layer.Index).DecodeEntries) }

// Imports returns what files of layer i load when they are loaded. Archives of earlier programs
// do not say.
func (a *Archive) Imports(i int) (imports.List, error) {
	list, _, err := a.importsOf(i)
	return list, err
}

func (a *Archive) importsOf(i int) (list imports.List, raw []byte, err error) {
	f, err := a.s.imports(i)
	if err == nil {
		list, raw, err = f.list()
	}
	if err != nil {
		return list, nil, fmt.Errorf("layer %d: %w", i, err)
	}
	return list, raw, nil
}

// check decodes the index of layer i and keeps nothing of it.
func (a *Archive) check(i int) error {
	_, err := a.layer(i, (*layer.Index).CheckEntries)
	return err
}

func (a *Archive) layer(i int, decode func(*layer.Index, []byte) error) (*layer.Index, error) {
	x, err := a.SpansAndWindows(i)
	if err != nil {
		return nil, err
	}
	if err := a.decodeEntries(i, func(raw []byte) error { return decode(x, raw) }); err != nil {
		return nil, err
	}
	_, x.Imports, err = a.importsOf(i)
	return x, err
}

func (a *Archive) decodeEntries(i int, decode func([]byte) error) error {
	raw, err := a.s.read(kindEntries, i, maxSection)
	if err != nil {
		return err
	}
	if err := decode(raw); err != nil {
		return fmt.Errorf("%w: layer %d: %w", ErrCorrupt, i, err)
	}
	return nil
}

// validate checks that img can become an archive, and returns its manifest.
func (img *Image) validate() (m ocispec.Manifest, err error) {
	m, diffIDs, err := parseImage(img.Descriptor, img.Manifest, img.Config)
	if err != nil {
		return m, err
	}
	if len(img.Layers) != len(m.Layers) {
		return m, fmt.Errorf("%d layer indexes for the manifest's %d layers", len(img.Layers), len(m.Layers))
	}
	for i, l := range img.Layers {
		switch {
		case l.Index == nil && l.Reason == "":
			return m, fmt.Errorf("layer %d has neither an index nor a reason", i)
		case l.Index == nil:
		case l.Index.Digest != m.Layers[i].Digest:
			return m, fmt.Errorf("layer %d is %s, its index is of %s", i, m.Layers[i].Digest, l.Index.Digest)
		case int64(l.Index.Size) != m.Layers[i].Size:
			return m, fmt.Errorf("layer %d (%s) has %d bytes, its index says %d", i, l.Index.Digest, m.Layers[i].Size, l.Index.Size)
		case l.Index.DiffID != diffIDs[i]:
			return m, fmt.Errorf("layer %d (%s) unpacks to %s, but the config says %s: %w",
				i, l.Index.Digest, l.Index.DiffID, diffIDs[i], layer.ErrMismatch)
		}
	}
	if img.StorageRef == "" {
		return m, errors.New("storage reference is empty")
	}
	return m, img.validatePrefetch()
}
