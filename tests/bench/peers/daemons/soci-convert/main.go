// Soci-convert gives the image in an OCI layout a SOCI index, version 2, as `soci convert` does.
package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/awslabs/soci-snapshotter/soci"
	"github.com/awslabs/soci-snapshotter/soci/store"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/tests/bench/peers/daemons/internal/convert"
)

func main() { convert.Main(run) }

func run(ctx context.Context, dir string, blobs content.Store, target ocispec.Descriptor) (made *ocispec.Descriptor, err error) {
	scratch, err := os.MkdirTemp("", "soci-convert-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	db, err := soci.NewDB(filepath.Join(scratch, "artifacts.db"))
	if err != nil {
		return nil, err
	}
	out, err := store.NewSociStore(dir)
	if err != nil {
		return nil, err
	}
	builder, err := soci.NewIndexBuilder(blobs, out, soci.WithArtifactsDb(db))
	if err != nil {
		return nil, err
	}
	return builder.Convert(ctx, images.Image{Name: "image", Target: target})
}
