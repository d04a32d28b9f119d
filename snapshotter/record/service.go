package record

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"

	"github.com/beam-cloud/containerd-clip/snapshotter/unary"
)

// Source hands out recordings by name: a chain ID, or what a recording of its
// own was called.
type Source interface {
	Recording(ctx context.Context, name string) (Document, error)
}

// The service has one method, which takes a name and returns a Document.
const (
	serviceName = "containerd.clip.recordings.v1.Recordings"
	getMethod   = "Get"
)

// Register serves the recordings of a source.
func Register(server grpc.ServiceRegistrar, source Source) {
	get := func(ctx context.Context, s Source, name string) (any, error) { return s.Recording(ctx, name) }
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: serviceName,
		HandlerType: (*Source)(nil),
		Methods:     []grpc.MethodDesc{unary.Method(getMethod, get)},
	}, source)
}

// Get asks a daemon for a recording.
func Get(ctx context.Context, conn grpc.ClientConnInterface, name string) (doc Document, err error) {
	if err := unary.Call(ctx, conn, serviceName, getMethod, name, mostFile, &doc); err != nil {
		return doc, err
	}
	if doc.Version != version {
		return doc, fmt.Errorf("the daemon's recordings are of version %d: %w", doc.Version, errdefs.ErrNotImplemented)
	}
	return doc, nil
}
