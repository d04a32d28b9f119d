package control

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/beam-cloud/containerd-clip/snapshotter/unary"
)

// service answers with what it was asked.
type service struct{ version int }

func (s service) Status(context.Context) (Status, error) { return Status{Version: s.version}, nil }

func (s service) Prune(_ context.Context, what Prune) (Pruned, error) {
	if what.All {
		return Pruned{Layers: 1, Bytes: 2}, nil
	}
	return Pruned{}, errdefs.ErrFailedPrecondition
}

func (s service) Fetches(_ context.Context, after time.Time) ([]Fetch, error) {
	return []Fetch{{Began: after, Reason: "reader"}}, nil
}

func (s service) Find(_ context.Context, image Image) (Archive, error) {
	if image.Link == "" {
		return Archive{}, errdefs.ErrNotFound
	}
	return Archive{Upstream: image.Ref + image.Manifest.String()}, nil
}

func (s service) Save(_ context.Context, what Save) (Archive, error) {
	if what.Image.Link == "" {
		return Archive{}, errdefs.ErrNotFound
	}
	return Archive{Upstream: what.Image.Ref + what.Path}, nil
}

func serve(t *testing.T, s Service) grpc.ClientConnInterface {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	server := grpc.NewServer()
	Register(server, s)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestService(t *testing.T) {
	conn := serve(t, service{Version})
	st, err := GetStatus(t.Context(), conn)
	require.NoError(t, err)
	require.Equal(t, Status{Version: Version}, st)
	done, err := AskPrune(t.Context(), conn, Prune{All: true})
	require.NoError(t, err)
	require.Equal(t, Pruned{Layers: 1, Bytes: 2}, done)
	_, err = AskPrune(t.Context(), conn, Prune{})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "kinds of errors arrive")
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	all, err := GetFetches(t.Context(), conn, at)
	require.NoError(t, err)
	require.Equal(t, []Fetch{{Began: at, Reason: "reader"}}, all)
	found, err := FindArchive(t.Context(), conn, Image{Ref: "a", Manifest: "b", Link: "c"})
	require.NoError(t, err)
	require.Equal(t, Archive{Upstream: "ab"}, found)
	_, err = FindArchive(t.Context(), conn, Image{})
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	saved, err := SaveArchive(t.Context(), conn, Save{Image: Image{Ref: "a", Link: "c"}, Path: "/b"})
	require.NoError(t, err)
	require.Equal(t, Archive{Upstream: "a/b"}, saved)
	_, err = SaveArchive(t.Context(), conn, Save{})
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	for _, method := range []string{"Prune", "Fetches", "Find", "Save"} {
		var answer any
		err := unary.Call(t.Context(), conn, serviceName, method, "nonsense", mostAnswer, &answer)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, method)
	}
}

// TestOtherVersions are told apart, and a daemon without the service.
func TestOtherVersions(t *testing.T) {
	_, err := GetStatus(t.Context(), serve(t, service{Version + 1}))
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
	server, client := grpc.NewServer(), filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", client)
	require.NoError(t, err)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix://"+client, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	_, err = GetStatus(t.Context(), conn)
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
}
