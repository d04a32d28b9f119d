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

	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// WriteTar writes the image as a tar of an OCI layout that has nothing else in
// it. The same image gives the same bytes. A file of that name is replaced
// once the new one is whole.
func WriteTar(ctx context.Context, s *Source, file string, o WriteOptions) (Written, error) {
	p, err := s.plan(ctx, o)
	if err != nil {
		return Written{}, err
	}
	f, err := os.CreateTemp(filepath.Dir(file), temporary)
	if err != nil {
		return Written{}, err
	}
	defer os.Remove(f.Name())
	w := Written{Target: p.root, Blobs: len(p.blobs)}
	for _, desc := range p.blobs {
		w.Bytes += desc.Size
	}
	err = s.writeTar(ctx, f, p)
	if err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return w, fmt.Errorf("writing %s: %w", file, err)
	}
	return w, os.Rename(f.Name(), file)
}

func (s *Source) writeTar(ctx context.Context, out io.Writer, p *plan) error {
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{p.root},
	})
	if err != nil {
		return err
	}
	tw := tar.NewWriter(out)
	for _, doc := range []struct {
		name string
		b    []byte
	}{{ocispec.ImageLayoutFile, []byte(layoutMarker)}, {ocispec.ImageIndexFile, index}} {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: doc.name, Mode: 0o644, Size: int64(len(doc.b))}); err != nil {
			return err
		}
		if _, err := tw.Write(doc.b); err != nil {
			return err
		}
	}
	for _, desc := range p.blobs {
		if err := s.writeTarBlob(ctx, tw, p, desc); err != nil {
			return fmt.Errorf("blob %s: %w", desc.Digest, err)
		}
	}
	return tw.Close()
}

func (s *Source) writeTarBlob(ctx context.Context, tw *tar.Writer, p *plan, desc ocispec.Descriptor) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	r, err := s.openBlob(ctx, p, desc)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", desc.Digest, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	err = tw.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Mode: 0o444, Size: desc.Size,
		Name: path.Join(ocispec.ImageBlobsDir, desc.Digest.Algorithm().String(), desc.Digest.Encoded()),
	})
	if err != nil {
		return err
	}
	verifier := desc.Digest.Verifier()
	if _, err := io.Copy(io.MultiWriter(tw, verifier), io.NewSectionReader(r, 0, r.Size())); err != nil {
		return err
	}
	if !verifier.Verified() {
		return fmt.Errorf("content does not match the digest: %w", errdefs.ErrDataLoss)
	}
	return nil
}
