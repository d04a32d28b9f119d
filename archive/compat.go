package archive

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/beam-cloud/clip/pkg/common"
	"github.com/google/go-containerregistry/pkg/name"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/internal/detgob"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// The part of an archive that upstream CLIP reads, in upstream's own types.

var clipMagic = common.ClipFileStartBytes

const clipHeaderSize = common.ClipHeaderLength

// clipHeader is upstream's header.
type clipHeader common.ClipArchiveHeader

// end returns the offset behind everything that the header speaks of.
func (h *clipHeader) end() uint64 {
	return max(uint64(h.IndexPos)+uint64(h.IndexLength), uint64(h.StorageInfoPos)+uint64(h.StorageInfoLength))
}

func readClipHeader(s *sections) (*clipHeader, error) {
	b, err := s.at(0, clipHeaderSize)
	if err != nil {
		return nil, err
	}
	h := new(clipHeader)
	if err := binary.Read(bytes.NewReader(b), binary.LittleEndian, h); err != nil {
		return nil, err
	}
	for _, v := range []int64{h.IndexPos, h.IndexLength, h.StorageInfoPos, h.StorageInfoLength} {
		if v < 0 || v > math.MaxInt64/4 {
			return nil, fmt.Errorf("%w: CLIP header", ErrCorrupt)
		}
	}
	return h, nil
}

// compatPart returns the front part of the archive, in pieces, and the number
// of paths in root. A nil root, of an image with a layer that has no index,
// becomes an empty one: CLIP then shows no file rather than wrong ones.
func compatPart(img *Image, m ocispec.Manifest, root *tree.Node) ([][]byte, int, error) {
	nodes := &clipNodes{img: img, linked: map[*tree.Node]uint64{}}
	if root == nil {
		root = &tree.Node{Mode: unix.S_IFDIR | 0o755, Nlink: 2}
	}
	index, err := detgob.EncodeSlice[*common.ClipNode](nodes.walk(root))
	if err != nil {
		return nil, 0, err
	}
	storage, err := storageInfo(img, m)
	if err != nil {
		return nil, 0, err
	}
	data, err := detgob.Encode(storage)
	if err != nil {
		return nil, 0, err
	}
	wrapped, err := detgob.Encode(common.StorageInfoWrapper{Type: storage.Type(), Data: data})
	if err != nil {
		return nil, 0, err
	}
	h := common.ClipArchiveHeader{
		ClipFileFormatVersion: common.ClipFileFormatVersion,
		IndexPos:              clipHeaderSize,
		IndexLength:           int64(length(index)),
		StorageInfoLength:     int64(len(wrapped)),
	}
	h.StorageInfoPos = h.IndexPos + h.IndexLength
	copy(h.StartBytes[:], clipMagic)
	copy(h.StorageInfoType[:], storage.Type())
	var head bytes.Buffer
	if err := binary.Write(&head, binary.LittleEndian, h); err != nil {
		return nil, 0, err
	}
	return slices.Concat([][]byte{head.Bytes()}, index, [][]byte{wrapped}), nodes.paths, nil
}

// length is the number of bytes in all pieces.
func length(pieces [][]byte) (n int) {
	for _, p := range pieces {
		n += len(p)
	}
	return n
}

// storageInfo says where the layers are, in upstream's words.
func storageInfo(img *Image, m ocispec.Manifest) (*common.OCIStorageInfo, error) {
	ref, _, err := UpstreamRef(img.StorageRef)
	if err != nil {
		return nil, err
	}
	info := &common.OCIStorageInfo{
		RegistryURL:             ref.Context().RegistryStr(),
		Repository:              ref.Context().RepositoryStr(),
		Reference:               ref.Identifier(),
		GzipIdxByLayer:          map[string]*common.GzipIndex{},
		DecompressedHashByLayer: map[string]string{},
	}
	for i, desc := range m.Layers {
		key := desc.Digest.String()
		info.Layers = append(info.Layers, key)
		if x := img.Layers[i].Index; x != nil {
			info.DecompressedHashByLayer[key] = x.DiffID.Encoded()
			if x.Compression == layer.Gzip {
				// No checkpoints: CLIP takes one for the start of a gzip
				// stream, which only its first is, and downloads all before it.
				info.GzipIdxByLayer[key] = &common.GzipIndex{LayerDigest: key}
			}
		}
	}
	info.ImageMetadata, err = imageMetadata(img, m)
	return info, err
}

// UpstreamRef returns the reference that an archive has for CLIP in place of ref,
// and, unless it is empty, a sentence on what CLIP cannot do with it. Of a
// reference with a tag and a digest CLIP gets the tag, since it can mount by tag
// only. What it then reads is still named by the layers' digests.
func UpstreamRef(ref string) (stored name.Reference, limit string, err error) {
	stored, err = name.ParseReference(ref)
	if err != nil {
		return nil, "", fmt.Errorf("storage reference %q: %w", ref, err)
	}
	named, _, hasDigest := strings.Cut(ref, "@")
	if !hasDigest {
		return stored, "", nil
	}
	if tagged, err := name.NewTag(named); err == nil && strings.HasSuffix(named, ":"+tagged.TagStr()) {
		return tagged, "", nil
	}
	return stored, fmt.Sprintf("CLIP cannot mount by digest: store a reference with a tag instead of %s", ref), nil
}

// Limits says what upstream CLIP cannot do with the archive of img, a sentence
// each. The snapshotter has none of these limits.
func (img *Image) Limits() []string {
	var limits []string
	if _, limit, err := UpstreamRef(img.StorageRef); err == nil && limit != "" {
		limits = append(limits, limit)
	}
	for i, l := range img.Layers {
		switch {
		case l.Index == nil:
			return append(limits, fmt.Sprintf("CLIP shows an empty root: layer %d has no index", i+1))
		case l.Index.Compression != layer.Gzip:
			limits = append(limits, fmt.Sprintf("CLIP cannot read files of layer %d: it is %s, and CLIP reads gzip only", i+1, l.Index.Compression))
		}
	}
	return limits
}

// imageMetadata is the image's config in upstream's words. Like upstream's
// indexer it has no nil maps or lists where upstream's has none.
func imageMetadata(img *Image, m ocispec.Manifest) (*common.ImageMetadata, error) {
	var c struct {
		ocispec.Image
		DockerVersion string `json:"docker_version"`
	}
	if err := json.Unmarshal(img.Config, &c); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	meta := &common.ImageMetadata{
		Name:          img.StorageRef,
		Digest:        img.Descriptor.Digest.String(),
		DockerVersion: c.DockerVersion,
		Architecture:  c.Architecture,
		Os:            c.OS,
		Variant:       c.Variant,
		Author:        c.Author,
		Labels:        nonNil(c.Config.Labels),
		Env:           append([]string{}, c.Config.Env...),
		Cmd:           c.Config.Cmd,
		Entrypoint:    c.Config.Entrypoint,
		User:          c.Config.User,
		WorkingDir:    c.Config.WorkingDir,
		ExposedPorts:  nonNil(c.Config.ExposedPorts),
		Volumes:       nonNil(c.Config.Volumes),
		StopSignal:    c.Config.StopSignal,
		Layers:        []string{},
		LayersData:    []common.LayerMetadata{},
	}
	meta.Created = time.Time{}
	if c.Created != nil {
		meta.Created = *c.Created
	}
	for _, desc := range m.Layers {
		meta.Layers = append(meta.Layers, desc.Digest.String())
		meta.LayersData = append(meta.LayersData, common.LayerMetadata{
			MIMEType: desc.MediaType, Digest: desc.Digest.String(), Size: desc.Size, Annotations: desc.Annotations,
		})
	}
	return meta, nil
}

func nonNil[V any](m map[string]V) map[string]V {
	if m == nil {
		return map[string]V{}
	}
	return m
}

// CheckStorageRef says what is wrong with a reference that is to be stored.
func CheckStorageRef(ref string) error {
	_, _, err := UpstreamRef(ref)
	return err
}
