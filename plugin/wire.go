package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"

	transferapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/containerd/v2/core/streaming"
	"github.com/containerd/containerd/v2/core/transfer"
	tstreaming "github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// wire is an Export on its way to containerd, as JSON. Streams are those of
// containerd's streaming service.
type wire struct {
	StorageRef     string `json:"storageRef,omitempty"`
	Layout         string `json:"layout,omitempty"`
	Platform       string `json:"platform,omitempty"`
	ArchiveStream  string `json:"archiveStream,omitempty"`  // bytes
	ProgressStream string `json:"progressStream,omitempty"` // containerd.types.transfer.Progress
}

// MarshalAny is called in the client, by containerd's transfer client.
func (e *Export) MarshalAny(ctx context.Context, streams streaming.StreamCreator) (typeurl.Any, error) {
	w := &wire{StorageRef: e.opts.StorageRef, Layout: e.opts.Layout, Platform: e.opts.Platform}
	if e.opts.Archive != nil {
		w.ArchiveStream = tstreaming.GenerateID("clip-archive")
		stream, err := streams.Create(ctx, w.ArchiveStream)
		if err != nil {
			return nil, err
		}
		e.streams.Go(func() { e.receiveArchive(ctx, stream) })
	}
	if e.opts.Progress != nil {
		w.ProgressStream = tstreaming.GenerateID("clip-progress")
		stream, err := streams.Create(ctx, w.ProgressStream)
		if err != nil {
			return nil, err
		}
		e.streams.Go(func() { receiveProgress(ctx, stream, e.opts.Progress) })
	}
	return typeurl.MarshalAny(w)
}

// receiveArchive reads the stream to its end even if Archive fails: containerd
// would wait for a reader.
func (e *Export) receiveArchive(ctx context.Context, stream streaming.Stream) {
	r := tstreaming.ReceiveStream(ctx, stream)
	_, err := io.Copy(e.opts.Archive, r)
	if err != nil {
		_, drained := io.Copy(io.Discard, r)
		err = fmt.Errorf("receiving the archive: %w", errors.Join(err, drained))
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.err = err
}

func receiveProgress(ctx context.Context, stream streaming.Stream, to transfer.ProgressFunc) {
	defer stream.Close()
	for {
		a, err := stream.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) && ctx.Err() == nil {
				log.G(ctx).WithError(err).Warn("receiving the progress of an export")
			}
			return
		}
		var p transferapi.Progress
		if err := typeurl.UnmarshalTo(a, &p); err != nil {
			log.G(ctx).WithError(err).Warn("progress of an export is not understood")
			continue
		}
		event := transfer.Progress{Event: p.Event, Name: p.Name, Parents: p.Parents, Progress: p.Progress, Total: p.Total}
		if p.Desc != nil {
			desc := oci.DescriptorFromProto(p.Desc)
			event.Desc = &desc
		}
		to(event)
	}
}

// UnmarshalAny is called in containerd.
func (e *Export) UnmarshalAny(ctx context.Context, streams streaming.StreamGetter, a typeurl.Any) error {
	var w wire
	if err := typeurl.UnmarshalTo(a, &w); err != nil {
		return err
	}
	e.opts = ExportOptions{StorageRef: w.StorageRef, Layout: w.Layout, Platform: w.Platform}
	if s := settings.Load(); s != nil {
		e.opts.Index = *s
	}
	if w.ProgressStream != "" {
		stream, err := streams.Get(ctx, w.ProgressStream)
		if err != nil {
			return err
		}
		e.closers = append(e.closers, stream)
		e.opts.Progress = func(p transfer.Progress) { sendProgress(ctx, stream, p) }
	}
	if w.ArchiveStream != "" {
		stream, err := streams.Get(ctx, w.ArchiveStream)
		if err != nil {
			return err
		}
		writer := tstreaming.WriteByteStream(ctx, stream)
		e.closers = append(e.closers, writer)
		e.opts.Archive = writer
	}
	return nil
}

func sendProgress(ctx context.Context, stream streaming.Stream, p transfer.Progress) {
	message := &transferapi.Progress{Event: p.Event, Name: p.Name, Parents: p.Parents, Progress: p.Progress, Total: p.Total}
	if p.Desc != nil {
		message.Desc = oci.DescriptorToProto(ocispec.Descriptor{MediaType: p.Desc.MediaType, Digest: p.Desc.Digest, Size: p.Desc.Size})
	}
	a, err := typeurl.MarshalAny(message)
	if err == nil {
		err = stream.Send(a)
	}
	if err != nil {
		log.G(ctx).WithError(err).Debug("sending the progress of an export")
	}
}
