// Estargz-convert makes eStargz of the image in an OCI layout, as `ctr-remote image convert --estargz` does. A second
// argument is a file of paths, one a line, that come first in their layers and are fetched when a layer is mounted, as
// with `ctr-remote image optimize`.
package main

import (
	"context"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/estargz"
	native "github.com/containerd/stargz-snapshotter/nativeconverter/estargz"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/tests/bench/peers/daemons/internal/convert"
)

func main() { convert.Main(run) }

func run(ctx context.Context, _ string, store content.Store, target ocispec.Descriptor) (*ocispec.Descriptor, error) {
	var first []string
	if len(os.Args) > 2 {
		text, err := os.ReadFile(os.Args[2])
		if err != nil {
			return nil, err
		}
		first = strings.Fields(string(text))
	}
	layer := func(ctx context.Context, store content.Store, layer ocispec.Descriptor) (*ocispec.Descriptor, error) {
		var opts []estargz.Option
		if len(first) > 0 {
			var elsewhere []string // a file is in one of the layers
			opts = append(opts, estargz.WithPrioritizedFiles(first), estargz.WithAllowPrioritizeNotFound(&elsewhere))
		}
		return native.LayerConvertFunc(opts...)(ctx, store, layer)
	}
	return converter.DefaultIndexConvertFunc(layer, true, platforms.All)(ctx, store, target)
}
