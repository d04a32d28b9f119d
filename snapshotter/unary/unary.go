// Package unary has gRPC methods that take a string and return a JSON document.
//
// Services of the daemon that only clipctl asks are made of them: they need no
// generated code. The version of a service is in its name.
package unary

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Method is a method of a service that S implements. What call returns is
// handed out in JSON, its errors as containerd's kinds of error.
func Method[S any](name string, call func(ctx context.Context, service S, arg string) (any, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		var arg wrapperspb.StringValue
		if err := decode(&arg); err != nil {
			return nil, err
		}
		doc, err := call(ctx, srv.(S), arg.Value)
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		raw, err := json.Marshal(doc)
		return wrapperspb.Bytes(raw), err
	}}
}

// Call asks a method for the document of arg, at most so many bytes of JSON.
func Call(ctx context.Context, conn grpc.ClientConnInterface, service, method, arg string, most int, doc any) error {
	var raw wrapperspb.BytesValue
	if err := conn.Invoke(ctx, "/"+service+"/"+method, wrapperspb.String(arg), &raw, grpc.MaxCallRecvMsgSize(most)); err != nil {
		return errgrpc.ToNative(err)
	}
	if err := json.Unmarshal(raw.Value, doc); err != nil {
		return fmt.Errorf("answer of %s.%s: %w", service, method, err)
	}
	return nil
}
