package contents

import (
	"encoding/json"
	"fmt"

	"github.com/beam-cloud/clip/pkg/common"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Description is what an archive says of itself.
type Description struct {
	Kind Kind `json:"kind"`
	// StorageRef is the remote reference of an image.
	StorageRef string              `json:"storageRef,omitempty"`
	Manifest   *ocispec.Descriptor `json:"manifest,omitempty"`
	Platform   string              `json:"platform,omitempty"`
	Layers     []LayerDescription  `json:"layers,omitempty"`
	Config     any                 `json:"config,omitempty"` // of an image
	// Bucket is where the data of an archive of KindS3 is.
	Bucket *common.S3StorageInfo `json:"bucket,omitempty"`
	Files  int                   `json:"files"`
}

// LayerDescription describes one layer of an image.
type LayerDescription struct {
	Digest      digest.Digest `json:"digest"`
	DiffID      digest.Digest `json:"diffID,omitempty"`
	Size        int64         `json:"size,omitempty"`
	Compression string        `json:"compression,omitempty"`
	OutSize     int64         `json:"uncompressedSize,omitempty"`
	Spans       int           `json:"spans,omitempty"`
	SeekPoints  int           `json:"seekPoints,omitempty"`
	Imports     int           `json:"imports,omitempty"` // files of which it says what they load
	NotLazy     string        `json:"notLazy,omitempty"` // why it has no index
}

// Describe says what the archive says of itself.
func (a *Archive) Describe() (*Description, error) {
	d := &Description{Kind: a.Kind}
	var err error
	switch info := a.upstream.Storage().(type) {
	case common.S3StorageInfo:
		d.Bucket = &info
	case common.OCIStorageInfo:
		if a.indexed != nil {
			err = a.describeIndexed(d)
		} else {
			a.describeOCI(d, info)
		}
	}
	if err != nil {
		return nil, err
	}
	// An image with a layer that has no index has no list of files.
	if err := a.load(); err == nil || a.indexed == nil {
		d.Files = len(a.files)
		return d, err
	}
	return d, nil
}

func (a *Archive) describeIndexed(d *Description) error {
	info := a.indexed.Info()
	d.StorageRef, d.Manifest = info.StorageRef, &info.Descriptor
	d.Platform = platform(info.Platform.OS, info.Platform.Architecture, info.Platform.Variant)
	d.Config = json.RawMessage(a.indexed.Config())
	m, _ := a.indexed.Manifest()
	for i, desc := range m.Layers {
		l := LayerDescription{Digest: desc.Digest, Size: desc.Size, DiffID: a.indexed.DiffIDs()[i], NotLazy: a.indexed.NotLazy(i)}
		if l.NotLazy == "" {
			x, err := a.indexed.Spans(i)
			if err != nil {
				return err
			}
			list, err := a.indexed.Imports(i)
			if err != nil {
				return err
			}
			l.Imports = list.Len()
			l.Compression, l.OutSize, l.Spans, l.SeekPoints = x.Compression.String(), int64(x.OutSize), len(x.Spans), len(x.Points)
		}
		d.Layers = append(d.Layers, l)
	}
	return nil
}

func (a *Archive) describeOCI(d *Description, info common.OCIStorageInfo) {
	img, _ := a.upstream.Image()
	d.StorageRef = img.Ref
	if meta := info.ImageMetadata; meta != nil {
		d.Manifest = &ocispec.Descriptor{Digest: digest.Digest(meta.Digest)}
		d.Platform = platform(meta.Os, meta.Architecture, meta.Variant)
		d.Config = meta
	}
	for _, id := range info.Layers {
		l := LayerDescription{Digest: digest.Digest(id)}
		if hash := info.DecompressedHashByLayer[id]; hash != "" {
			l.DiffID = digest.NewDigestFromEncoded(digest.SHA256, hash)
		}
		d.Layers = append(d.Layers, l)
	}
}

func platform(parts ...string) string {
	out := parts[0]
	for _, p := range parts[1:] {
		if p != "" {
			out = fmt.Sprintf("%s/%s", out, p)
		}
	}
	return out
}
