package command

import (
	"encoding/hex"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/trace"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// spanCollector receives spans over OTLP.
type spanCollector struct {
	mu       sync.Mutex // guards the fields below
	spans    map[string]*otlp.Span
	services map[string]bool
}

func (c *spanCollector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var sent collector.ExportTraceServiceRequest
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = proto.Unmarshal(body, &sent)
	}
	if err != nil || r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/x-protobuf" {
		http.Error(w, "no spans", http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, resource := range sent.ResourceSpans {
		for _, a := range resource.Resource.Attributes {
			if a.Key == "service.name" {
				c.services[a.Value.GetStringValue()] = true
			}
		}
		for _, scope := range resource.ScopeSpans {
			for _, span := range scope.Spans {
				c.spans[hex.EncodeToString(span.SpanId)] = span
			}
		}
	}
}

// named returns the spans of that name, of all traces or of one.
func (c *spanCollector) named(name, traceID string) (found []*otlp.Span) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, span := range c.spans {
		if strings.HasSuffix(span.Name, name) && (traceID == "" || hex.EncodeToString(span.TraceId) == traceID) {
			found = append(found, span)
		}
	}
	return found
}

// parent returns the name of the span's parent.
func (c *spanCollector) parent(span *otlp.Span) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.spans[hex.EncodeToString(span.ParentSpanId)].GetName()
}

func attributes(span *otlp.Span) map[string]string {
	found := map[string]string{}
	for _, a := range span.Attributes {
		found[a.Key] = a.Value.GetStringValue()
	}
	return found
}

// TestTracing pulls an image as a containerd that traces: the daemon's spans
// belong to containerd's trace.
func TestTracing(t *testing.T) {
	began := time.Now()
	got := &spanCollector{spans: map[string]*otlp.Span{}, services: map[string]bool{}}
	collecting := httptest.NewServer(got)
	t.Cleanup(collecting.Close)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collecting.URL)
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	c := testConfig(t)
	c.Fill.Mode = "off"
	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "file", Data: "content"}))
	images := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(images.Close)
	host := strings.TrimPrefix(images.URL, "http://")
	img.Push(t, host, "app")
	ref := host + "/app:1"
	require.NoError(t, os.MkdirAll(filepath.Join(c.Root, "archives"), 0o700))
	img.WriteArchive(t, filepath.Join(c.Root, "archives", "a.clip"), ref)
	stop := start(t, c)

	provider := trace.NewTracerProvider()
	ctx, pulling := provider.Tracer("").Start(namespaces.WithNamespace(t.Context(), "default"), "pull")
	id := pulling.SpanContext().TraceID().String()
	conn, err := grpc.NewClient("unix://"+c.Address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithStatsHandler(
		otelgrpc.NewClientHandler(otelgrpc.WithTracerProvider(provider), otelgrpc.WithPropagators(propagation.TraceContext{}))))
	require.NoError(t, err)
	defer conn.Close()
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "clip")
	_, err = sn.Prepare(ctx, "extract", "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef:                   img.DiffIDs[0].String(),
		"containerd.io/snapshot/cri.image-ref":       ref,
		"containerd.io/snapshot/cri.manifest-digest": img.Descriptor.Digest.String(),
	}))
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	_, err = sn.View(ctx, "container", "lazy "+img.DiffIDs[0].String())
	require.NoError(t, err)
	mounted, err := filepath.Glob(filepath.Join(c.Root, "roots/1/mnt/*/file"))
	require.NoError(t, err)
	require.Len(t, mounted, 1)
	content, err := os.ReadFile(mounted[0])
	require.NoError(t, err)
	require.Equal(t, "content", string(content))
	pulling.End()
	require.NoError(t, sn.Remove(ctx, "container"))
	require.NoError(t, stop(), "what was not sent yet is sent now")

	require.Equal(t, map[string]bool{"containerd-clip-grpc": true}, got.services)
	for name, below := range map[string]string{"clip.find": "Snapshots/Prepare", "clip.mount": "Snapshots/View"} {
		spans := got.named(name, id)
		require.Len(t, spans, 1, name)
		require.True(t, strings.HasSuffix(got.parent(spans[0]), below), "%s is below %s", name, got.parent(spans[0]))
		require.Equal(t, ref, attributes(spans[0])["image"])
		require.GreaterOrEqual(t, spans[0].EndTimeUnixNano, spans[0].StartTimeUnixNano)
	}
	require.Len(t, got.named("Snapshots/Remove", id), 1)
	fetches := got.named("clip.fetch", "")
	require.Len(t, fetches, 1)
	require.Equal(t, img.DiffIDs[0].String(), attributes(fetches[0])["diffID"])
	require.Equal(t, "reader", attributes(fetches[0])["reason"])
	require.Equal(t, host, attributes(fetches[0])["host"])
	require.WithinRange(t, time.Unix(0, int64(fetches[0].StartTimeUnixNano)), began, time.Now())
}

// TestTracingConfig knows when nobody collects, and what this program cannot speak.
func TestTracingConfig(t *testing.T) {
	require.False(t, tracing())
	t.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1/v1/traces")
	require.True(t, tracing())
	t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
	_, err := startTracing(t.Context())
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
	require.ErrorContains(t, err, "http/protobuf")
	t.Setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
	stop, err := startTracing(t.Context())
	require.NoError(t, err, "a collector that is not there is no reason not to start")
	stop()
	t.Setenv("OTEL_SDK_DISABLED", "true")
	require.False(t, tracing())
}
