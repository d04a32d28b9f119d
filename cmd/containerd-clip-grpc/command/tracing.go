package command

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
)

// tracing says whether a collector of spans is named, by the environment
// variables that containerd goes by.
func tracing() bool {
	disabled, _ := strconv.ParseBool(os.Getenv("OTEL_SDK_DISABLED"))
	return !disabled && cmp.Or(os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT")) != ""
}

// startTracing has spans sent to the collector until stop is called. Without one
// there are none.
func startTracing(ctx context.Context) (stop func(), err error) {
	if !tracing() {
		return func() {}, nil
	}
	if p := cmp.Or(os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL")); p != "" && p != "http/protobuf" {
		return nil, fmt.Errorf("OpenTelemetry's protocol %q: this program speaks http/protobuf alone, see OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: %w", p, errdefs.ErrNotImplemented)
	}
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, fmt.Errorf("sending spans: %w", err)
	}
	// What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say comes first.
	self, err := resource.Merge(resource.NewSchemaless(attribute.String("service.name", "containerd-clip-grpc")), resource.Environment())
	if err != nil {
		return nil, fmt.Errorf("what OpenTelemetry's environment variables say of this program: %w", err)
	}
	var said atomic.Bool
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		level := log.DebugLevel
		if said.CompareAndSwap(false, true) {
			level = log.WarnLevel
		}
		log.G(ctx).WithError(err).Log(level, "spans cannot be sent; this is said once")
	}))
	provider := trace.NewTracerProvider(trace.WithBatcher(exporter), trace.WithResource(self))
	before := otel.GetTracerProvider()
	otel.SetTracerProvider(provider)
	otel.SetTextMapPropagator(propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{}))
	return func() {
		otel.SetTracerProvider(before)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if err := provider.Shutdown(ctx); err != nil {
			log.G(ctx).WithError(err).Debug("the last spans could not be sent")
		}
	}, nil
}
