// Package clipindex makes archives with upstream CLIP's own indexer, out of content that is at hand.
//
// CLIP reads images from registries only. So it gets one: a read-only view of
// the one image, on a loopback port, under a name that nobody can guess, for as
// long as the indexing takes. What CLIP writes has no layer indexes and the
// limits that docs/compatibility.md lists.
package clipindex

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/containerd/containerd/v2/core/content"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/plugin/index"
)

// WriteFile has CLIP index img, whose content is in p, and writes the archive
// to path, or leaves path as it was. The archive has img's storage reference as
// archive.UpstreamRef says. progress may be nil.
func WriteFile(ctx context.Context, path string, p content.Provider, img index.Image, progress index.Progress) (err error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), ".clip-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	v := newView(p, img, progress)
	local, stop, err := v.serve(ctx)
	if err != nil {
		return err
	}
	defer stop()
	made := filepath.Join(dir, "archive")
	if err := create(ctx, made, local, img, progress); err != nil {
		return fmt.Errorf("CLIP's indexer (it reads gzip layers only; the default engine reads all): %w", errors.Join(err, v.failure()))
	}
	if err := rename(made, img.StorageRef); err != nil {
		return err
	}
	return os.Rename(made, path)
}

// create runs CLIP's indexer on the image that local names.
func create(ctx context.Context, path, local string, img index.Image, progress index.Progress) error {
	stored, _, err := archive.UpstreamRef(img.StorageRef)
	if err != nil {
		return err
	}
	if err := clip.SetLogLevel("error"); err != nil {
		return err
	}
	steps := make(chan clip.OCIIndexProgress)
	reported := make(chan struct{})
	go func() {
		defer close(reported)
		for s := range steps {
			if progress != nil && s.Stage == "completed" {
				progress.Done(s.LayerIndex-1, index.Outcome{})
			}
		}
	}()
	err = clip.CreateFromOCIImage(ctx, clip.CreateFromOCIImageOptions{
		ImageRef:        local,
		StorageImageRef: stored.Name(),
		OutputPath:      path,
		CredProvider:    common.NewPublicOnlyProvider(),
		ProgressChan:    steps,
		Platform:        &v1.Platform{OS: img.Platform.OS, Architecture: img.Platform.Architecture, Variant: img.Platform.Variant},
	})
	close(steps)
	<-reported
	return err
}

// rename gives the image in an archive its remote name: CLIP stores the name
// that it read the image by.
func rename(path, ref string) error {
	archiver := clip.NewClipArchiver()
	m, err := archiver.ExtractMetadata(path)
	if err != nil {
		return err
	}
	info, ok := m.StorageInfo.(common.OCIStorageInfo)
	if !ok || info.ImageMetadata == nil {
		return errors.New("CLIP's indexer did not store the image's config")
	}
	info.ImageMetadata.Name = ref
	return archiver.CreateRemoteArchive(info, m, path)
}

// serve serves v until stop is called, and returns the image's name in it.
func (v *view) serve(ctx context.Context) (ref string, stop func(), err error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	server := &http.Server{Handler: v, ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	go func() { _ = server.Serve(l) }() // it ends when stop closes the server
	return fmt.Sprintf("%s/%s@%s", l.Addr(), v.name, v.img.Descriptor.Digest), func() { server.Close() }, nil
}

// secret is a repository's name that cannot be guessed.
func secret() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // it never fails
	return fmt.Sprintf("%x", b)
}
