package export

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FromStore opens the image called name in containerd's image store, in the
// namespace of ctx. Its content is protected from garbage collection until Close.
func FromStore(ctx context.Context, client *containerd.Client, name string) (_ *Source, err error) {
	img, err := client.ImageService().Get(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("image %q in containerd's store: %w", name, err)
	}
	release, err := hold(ctx, client, img.Target)
	if err != nil {
		return nil, fmt.Errorf("image %q: leasing its content: %w", name, err)
	}
	return &Source{
		Name:     name,
		Kind:     "containerd",
		Ref:      img.Name,
		Provider: Store(ctx, client),
		Target:   img.Target,
		closer:   release,
	}, nil
}

// Store returns containerd's content store. Blobs that are files which this
// process can open are read as files.
func Store(ctx context.Context, client *containerd.Client) content.Store {
	return &storeProvider{Store: client.ContentStore(), root: contentRoot(ctx, client)}
}

// hold leases target and all content that its labels lead to.
func hold(ctx context.Context, client *containerd.Client, target ocispec.Descriptor) (release func() error, err error) {
	leased, done, err := client.WithLease(ctx)
	if err != nil {
		return nil, err
	}
	release = func() error { return done(context.WithoutCancel(ctx)) }
	id, _ := leases.FromContext(leased)
	err = client.LeasesService().AddResource(ctx, leases.Lease{ID: id}, leases.Resource{ID: target.Digest.String(), Type: "content"})
	if err != nil {
		return nil, errors.Join(err, release())
	}
	return release, nil
}

// contentRoot returns the directory of containerd's content store if this
// process can read it, else "".
func contentRoot(ctx context.Context, client *containerd.Client) string {
	resp, err := client.IntrospectionService().Plugins(ctx, "type=="+string(plugins.ContentPlugin))
	if err != nil {
		return ""
	}
	for _, p := range resp.Plugins {
		root := p.Exports["root"]
		if st, err := os.Stat(filepath.Join(root, "blobs")); root != "" && err == nil && st.IsDir() {
			return root
		}
	}
	return ""
}

// storeProvider reads a containerd content store. Where the blobs are files
// that this process can open it reads these: the store's own protocol copies
// every byte through a socket. Whether the namespace may see a blob is still
// asked of the store.
type storeProvider struct {
	content.Store
	root string
}

func (p *storeProvider) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	info, err := p.Store.Info(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	if p.root != "" {
		if f, err := openBlob(p.root, desc); err == nil && f.Size() == info.Size {
			return f, nil
		} else if err == nil {
			f.Close() // a store of another host behind the same path
		}
	}
	return p.Store.ReaderAt(ctx, desc)
}

// fileReaderAt is a blob in a file.
type fileReaderAt struct {
	*os.File
	size int64
}

func (f fileReaderAt) Size() int64 { return f.size }

// openBlob opens blobs/<algorithm>/<hex> below root, the layout that OCI
// layouts and containerd's store share.
func openBlob(root string, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	f, err := os.Open(blobPath(root, desc.Digest))
	if os.IsNotExist(err) {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return fileReaderAt{f, st.Size()}, nil
}
