package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/plugin/export"
	"github.com/beam-cloud/containerd-clip/plugin/index"
)

// ExportOptions says what an Export makes of an image: a layout, an archive,
// or both.
type ExportOptions struct {
	// Archive receives the archive; nil for none.
	Archive io.Writer
	// StorageRef is the remote reference to store in the archive; empty for the
	// image's name.
	StorageRef string
	// Layout is the directory of an OCI layout that the image is added to, an
	// absolute path on the machine where the transfer runs; empty for none.
	Layout string
	// Platform is the one to export, as os/arch[/variant]; empty for that of
	// the machine where the transfer runs.
	Platform string
	// Progress receives events: "exporting" and "exported" for the layout,
	// "indexing" and then "indexed", "cached" or "not lazy" for each layer,
	// "complete" for the archive. It may be nil.
	Progress transfer.ProgressFunc
	// Index says how to index where the transfer runs in this process. A
	// containerd with the plugin has settings of its own.
	Index index.Options
}

// Export is a destination of containerd's transfer service, a
// transfer.ImageExporter. It serves one transfer of one image.
type Export struct {
	opts    ExportOptions
	closers []io.Closer // streams to the client, in containerd

	streams sync.WaitGroup // what comes from containerd
	mu      sync.Mutex     // guards err
	err     error          // of a stream
}

var _ transfer.ImageExporter = (*Export)(nil)

// NewExport returns a destination. Give it to Run, or to the Transfer method
// of a client of a containerd that has the plugin; then call Wait.
func NewExport(opts ExportOptions) *Export { return &Export{opts: opts} }

// Wait returns when Archive and Progress have received everything that a
// transfer that succeeded had for them. It fails if Archive did.
func (e *Export) Wait() error {
	e.streams.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.err
}

// Export implements transfer.ImageExporter.
func (e *Export) Export(ctx context.Context, store content.Store, imgs []images.Image) error {
	defer func() {
		for _, c := range e.closers {
			c.Close()
		}
	}()
	if len(imgs) != 1 {
		return fmt.Errorf("%d images to export; an export is of one: %w", len(imgs), errdefs.ErrInvalidArgument)
	}
	selection, err := e.selection()
	if err != nil {
		return err
	}
	source := &export.Source{Name: imgs[0].Name, Kind: "containerd", Ref: imgs[0].Name, Provider: store, Target: imgs[0].Target}
	if e.opts.Layout != "" {
		if err := e.layout(ctx, source, selection); err != nil {
			return err
		}
	}
	if e.opts.Archive == nil {
		return nil
	}
	manifests, err := source.Manifests(ctx, selection)
	if err != nil {
		return err
	}
	return e.archive(ctx, source, manifests[0])
}

func (e *Export) selection() (export.Selection, error) {
	if e.opts.Platform == "" {
		return export.ThisPlatform, nil
	}
	p, err := platforms.Parse(e.opts.Platform)
	if err != nil {
		return export.Selection{}, fmt.Errorf("platform %q: %w", e.opts.Platform, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	return export.OnePlatform(p), nil
}

func (e *Export) layout(ctx context.Context, source *export.Source, selection export.Selection) error {
	if !filepath.IsAbs(e.opts.Layout) {
		return fmt.Errorf("layout %q must be an absolute path: %w", e.opts.Layout, errdefs.ErrInvalidArgument)
	}
	e.report(transfer.Progress{Event: "exporting", Name: source.Name})
	w, err := export.WriteLayout(ctx, source, e.opts.Layout, export.WriteOptions{Platforms: selection})
	if err != nil {
		return err
	}
	e.report(transfer.Progress{Event: "exported", Name: source.Name, Progress: w.Bytes, Total: w.Bytes, Desc: &w.Target})
	return nil
}

// archive writes m's archive to a file first: nothing of one that fails is sent.
func (e *Export) archive(ctx context.Context, source *export.Source, m export.Manifest) error {
	ref := e.opts.StorageRef
	if ref == "" {
		ref = source.Ref
	}
	if err := archive.CheckStorageRef(ref); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "clip-export-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	opts := e.opts.Index
	opts.Progress = newReporter(e.report, source.Name, m.Layers)
	path := filepath.Join(dir, "image.clip")
	st, err := index.WriteArchive(ctx, source, m, ref, path, opts)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(e.opts.Archive, f); err != nil {
		return fmt.Errorf("sending the archive of %s: %w", source.Name, err)
	}
	e.report(transfer.Progress{Event: "complete", Name: source.Name, Progress: st.Size, Total: st.Size, Desc: &ocispec.Descriptor{
		MediaType: m.Descriptor.MediaType, Digest: m.Descriptor.Digest, Size: m.Descriptor.Size, Platform: &m.Platform,
	}})
	return nil
}

func (e *Export) report(p transfer.Progress) {
	if e.opts.Progress != nil {
		e.opts.Progress(p)
	}
}
