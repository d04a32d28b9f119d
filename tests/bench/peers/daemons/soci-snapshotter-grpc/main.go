// Soci-snapshotter-grpc serves soci-snapshotter, whose own command is not on the Go module proxy.
package main

import (
	"context"
	"io"
	"path/filepath"

	"github.com/awslabs/soci-snapshotter/config"
	"github.com/awslabs/soci-snapshotter/fs"
	"github.com/awslabs/soci-snapshotter/metadata"
	"github.com/awslabs/soci-snapshotter/service"
	"github.com/awslabs/soci-snapshotter/ztoc"
	"github.com/containerd/containerd/v2/core/snapshots"
	bolt "go.etcd.io/bbolt"

	"github.com/beam-cloud/containerd-clip/tests/bench/peers/daemons/internal/serve"
)

func main() { serve.Main(open) }

func open(ctx context.Context, file, root string) (snapshots.Snapshotter, error) {
	c := config.NewConfig()
	if file != "" {
		var err error
		if c, err = config.NewConfigFromToml(file); err != nil {
			return nil, err
		}
	}
	if err := service.Supported(root); err != nil {
		return nil, err
	}
	// The options of its own command: without them its metadata would be slower than it is.
	db, err := bolt.Open(filepath.Join(root, "metadata.db"), 0o600, &bolt.Options{
		NoFreelistSync:  true,
		InitialMmapSize: 64 << 20,
		FreelistType:    bolt.FreelistMapType,
	})
	if err != nil {
		return nil, err
	}
	store := func(r *io.SectionReader, toc ztoc.TOC, opts ...metadata.Option) (metadata.Reader, error) {
		return metadata.NewReader(db, r, toc, opts...)
	}
	return service.NewSociSnapshotterService(ctx, root, &c.ServiceConfig, service.WithFilesystemOptions(fs.WithMetadataStore(store)))
}
