// Package cri stands between the kubelet and containerd's image service, to learn the credentials of pulls.
//
// The kubelet sends the credentials of an image with each CRI PullImage, and
// containerd uses them for its own requests alone: it does not tell snapshotters.
// A kubelet whose image service endpoint is the daemon's socket has every call
// passed on to containerd as it is, streams and methods of later versions
// included. What a PullImage carries is kept in a Keychain, for the reads of
// that image's repository that come when its containers run.
//
// The package asks no registry and decides nothing about images.
package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/log"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// imageService is what all methods begin with that are passed on.
var imageService = "/" + runtime.ImageService_ServiceDesc.ServiceName + "/"

// Proxy passes calls of the image service on to containerd.
type Proxy struct {
	conn *grpc.ClientConn
	keys *Keychain
}

// New returns a proxy to containerd's socket at address, which is dialled when
// somebody calls. The caller closes it.
func New(address string, keys *Keychain) (*Proxy, error) {
	conn, err := grpc.NewClient("unix://"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
			grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize),
		))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", address, err)
	}
	return &Proxy{conn: conn, keys: keys}, nil
}

// Close ends the connection to containerd.
func (p *Proxy) Close() error { return p.conn.Close() }

// Handle is for grpc.UnknownServiceHandler: it serves whatever the server has no
// service for.
func (p *Proxy) Handle(_ any, in grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(in)
	if !strings.HasPrefix(method, imageService) {
		return status.Errorf(codes.Unimplemented, "containerd-clip-grpc serves the image service of CRI, not %s", method)
	}
	// Ends the call to containerd when this one ends.
	ctx, cancel := context.WithCancel(in.Context())
	defer cancel()
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, md.Copy())
	}
	out, err := p.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	undo := func() {}
	if method == runtime.ImageService_PullImage_FullMethodName {
		if undo, err = p.forwardPull(ctx, in, out); err != nil {
			return err
		}
	} else {
		go p.forwardRequests(in, out, cancel)
	}
	err = forwardAnswers(in, out)
	if err != nil {
		undo()
	}
	return err
}

// A message passes through as an emptypb.Empty: all of it is fields that this
// type does not know, which protobuf keeps as they are.

// forwardPull forwards a PullImage and keeps its credentials, which containerd's
// snapshotter needs before the answer. undo takes them back.
func (p *Proxy) forwardPull(ctx context.Context, in grpc.ServerStream, out grpc.ClientStream) (undo func(), err error) {
	var m emptypb.Empty
	if err := in.RecvMsg(&m); err != nil {
		return nil, err
	}
	undo = func() {}
	var req runtime.PullImageRequest
	if err := proto.Unmarshal(m.ProtoReflect().GetUnknown(), &req); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "PullImageRequest: %v", err)
	}
	image := req.GetImage().GetImage()
	if err := p.keys.add(image, req.GetAuth(), &undo); err != nil {
		// containerd says what is wrong with a request; this is for the rest.
		log.G(ctx).WithError(err).WithField("image", image).Warn("credentials of a pull are not kept; reads of the image go without them")
	}
	if err := out.SendMsg(&m); err != nil && !errors.Is(err, io.EOF) {
		undo()
		return nil, err
	}
	return undo, out.CloseSend()
}

// forwardRequests forwards what the caller sends, until it has said all. What
// becomes of it, forwardAnswers learns.
func (p *Proxy) forwardRequests(in grpc.ServerStream, out grpc.ClientStream, cancel context.CancelFunc) {
	for {
		var m emptypb.Empty
		err := in.RecvMsg(&m)
		if errors.Is(err, io.EOF) {
			_ = out.CloseSend() // it always succeeds
			return
		}
		if err != nil {
			cancel()
			return
		}
		if out.SendMsg(&m) != nil {
			return
		}
	}
}

// forwardAnswers forwards what containerd answers, and returns its status.
func forwardAnswers(in grpc.ServerStream, out grpc.ClientStream) error {
	defer func() { in.SetTrailer(out.Trailer()) }()
	for first := true; ; first = false {
		var m emptypb.Empty
		err := out.RecvMsg(&m)
		if first {
			if md, herr := out.Header(); herr == nil {
				if err := in.SendHeader(md); err != nil {
					return err
				}
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := in.SendMsg(&m); err != nil {
			return err
		}
	}
}
