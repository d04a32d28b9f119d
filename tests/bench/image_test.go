package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/platforms"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/rs/zerolog"

	"github.com/beam-cloud/containerd-clip/plugin/export"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// fixture is what the contests are held on.
var fixture struct {
	layout   string // directory of the images
	scratch  string // directory for what is written
	registry string // host:port of a registry that has images.BenchGzip
}

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	zerolog.SetGlobalLevel(zerolog.Disabled) // upstream CLIP logs each file of an image
	ctx := context.Background()
	top, err := harness.Top()
	if err != nil {
		return 0, err
	}
	cache := filepath.Join(top, ".cache")
	if fixture.layout, err = images.Bench(ctx, filepath.Join(cache, "images")); err != nil {
		return 0, err
	}
	lab, err := harness.NewLab(harness.Options{Parts: filepath.Join(cache, "bin")})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	if fixture.registry, err = lab.StartBareRegistry(ctx); err != nil {
		return 0, err
	}
	fixture.scratch = lab.Dir
	if err := push(ctx, images.BenchGzip); err != nil {
		return 0, fmt.Errorf("pushing %s: %w", images.BenchGzip, err)
	}
	code = m.Run()
	return code, tables.Write(*reportFile)
}

// remoteRef is where push puts an image.
func remoteRef(image string) string { return fixture.registry + "/" + images.ShortName(image) + ":1" }

// push copies an image from the layout to the registry.
func push(ctx context.Context, image string) error {
	ref, err := name.ParseReference(remoteRef(image))
	if err != nil {
		return err
	}
	source, m, err := open(ctx, image)
	if err != nil {
		return err
	}
	defer source.Close()
	index, err := layout.ImageIndexFromPath(fixture.layout)
	if err != nil {
		return err
	}
	img, err := index.Image(v1.Hash{Algorithm: m.Descriptor.Digest.Algorithm().String(), Hex: m.Descriptor.Digest.Encoded()})
	if err != nil {
		return err
	}
	return remote.Write(ref, img, remote.WithContext(ctx))
}

// open returns an image of the layout and its manifest. The caller closes the source.
func open(ctx context.Context, image string) (*export.Source, export.Manifest, error) {
	source, err := export.FromLayout(fixture.layout, image)
	if err != nil {
		return nil, export.Manifest{}, err
	}
	found, err := source.Manifests(ctx, export.Selection{Name: "any", Match: platforms.All})
	if err != nil {
		return nil, export.Manifest{}, errors.Join(err, source.Close())
	}
	return source, found[0], nil
}

// layers returns the descriptors of an image's layers.
func layers(b *testing.B, image string) []ocispec.Descriptor {
	b.Helper()
	source, m, err := open(b.Context(), image)
	if err != nil {
		b.Fatal(err)
	}
	if err := source.Close(); err != nil {
		b.Fatal(err)
	}
	return m.Layers
}

// blobPath is the file of a blob in the layout.
func blobPath(d digest.Digest) string {
	return (&images.Layout{Dir: fixture.layout}).BlobPath(d)
}
