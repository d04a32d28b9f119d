package record

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Source hands out recordings by name: a chain ID, or what a recording of its
// own was called.
type Source interface {
	Recording(ctx context.Context, name string) (Document, error)
}

// The service has one method, which takes a name and returns a Document in
// JSON. Its version is in its name.
const (
	serviceName = "containerd.clip.recordings.v1.Recordings"
	getMethod   = "/" + serviceName + "/Get"
)

// Register serves the recordings of a source.
func Register(server grpc.ServiceRegistrar, source Source) {
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: serviceName,
		HandlerType: (*Source)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Get", Handler: handleGet}},
	}, source)
}

func handleGet(srv any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	var name wrapperspb.StringValue
	if err := decode(&name); err != nil {
		return nil, err
	}
	doc, err := srv.(Source).Recording(ctx, name.Value)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	raw, err := json.Marshal(doc)
	return wrapperspb.Bytes(raw), err
}

// Get asks a daemon for a recording.
func Get(ctx context.Context, conn grpc.ClientConnInterface, name string) (doc Document, err error) {
	var raw wrapperspb.BytesValue
	if err := conn.Invoke(ctx, getMethod, wrapperspb.String(name), &raw, grpc.MaxCallRecvMsgSize(mostFile)); err != nil {
		return doc, errgrpc.ToNative(err)
	}
	if err := json.Unmarshal(raw.Value, &doc); err != nil {
		return doc, fmt.Errorf("recording: %w", err)
	}
	if doc.Version != Version {
		return doc, fmt.Errorf("the daemon's recordings are of version %d: %w", doc.Version, errdefs.ErrNotImplemented)
	}
	return doc, nil
}
