// Package convert replaces the image of an OCI layout by what a peer makes of it.
package convert

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Func converts the image called target in the layout dir, whose blobs are in store, and returns the image that is to
// take its place.
type Func func(ctx context.Context, dir string, store content.Store, target ocispec.Descriptor) (*ocispec.Descriptor, error)

// Main converts the one image of the layout that the command's first argument names. The new image has its annotations.
func Main(f Func) {
	if len(os.Args) < 2 {
		log.L.Fatalf("usage: %s LAYOUT", os.Args[0])
	}
	if err := convert(namespaces.WithNamespace(context.Background(), "default"), os.Args[1], f); err != nil {
		log.L.WithError(err).Fatal("converting " + os.Args[1])
	}
}

func convert(ctx context.Context, dir string, f Func) error {
	file := filepath.Join(dir, ocispec.ImageIndexFile)
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var index ocispec.Index
	if err := json.Unmarshal(text, &index); err != nil {
		return err
	}
	if len(index.Manifests) != 1 {
		return fmt.Errorf("%s has %d images instead of one", file, len(index.Manifests))
	}
	store, err := local.NewLabeledStore(dir, &labels{of: map[digest.Digest]map[string]string{}})
	if err != nil {
		return err
	}
	old := index.Manifests[0]
	made, err := f(ctx, dir, store, old)
	if err != nil {
		return err
	}
	made.Annotations = old.Annotations
	index.Manifests[0] = *made
	if text, err = json.Marshal(index); err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o644)
}

// labels keeps in memory what converters note about blobs.
type labels struct {
	mu sync.Mutex // guards of
	of map[digest.Digest]map[string]string
}

func (l *labels) Get(d digest.Digest) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.of[d]), nil
}

func (l *labels) Set(d digest.Digest, all map[string]string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.of[d] = maps.Clone(all)
	return nil
}

func (l *labels) Update(d digest.Digest, some map[string]string) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := maps.Clone(l.of[d])
	if all == nil {
		all = map[string]string{}
	}
	for key, value := range some {
		all[key] = value
		if value == "" {
			delete(all, key)
		}
	}
	l.of[d] = all
	return maps.Clone(all), nil
}
