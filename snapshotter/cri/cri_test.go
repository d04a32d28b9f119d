package cri

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

func keychain(t *testing.T) *Keychain {
	t.Helper()
	k, err := OpenKeychain(filepath.Join(t.TempDir(), "credentials.json"))
	require.NoError(t, err)
	return k
}

// pull is what a PullImage leaves behind, and what takes it back.
func pull(t *testing.T, k *Keychain, image string, auth *runtime.AuthConfig) (undo func()) {
	t.Helper()
	undo = func() {}
	require.NoError(t, k.add(image, auth, &undo))
	return undo
}

func password(user, secret string) *runtime.AuthConfig {
	return &runtime.AuthConfig{Username: user, Password: secret}
}

func TestKeychain(t *testing.T) {
	k := keychain(t)
	pull(t, k, "registry.example.com:5000/team/app:1", password("u", "one"))
	pull(t, k, "registry.example.com:5000/team/app@sha256:"+strings.Repeat("0", 64), password("u", "two"))
	pull(t, k, "busybox", &runtime.AuthConfig{IdentityToken: "token"})
	pull(t, k, "registry.example.com:5000/public", nil)
	pull(t, k, "registry.example.com:5000/other", &runtime.AuthConfig{RegistryToken: "not taken by containerd"})
	want := []remote.Login{{User: "u", Secret: "two"}, {User: "u", Secret: "one"}}
	for range 2 {
		require.Equal(t, want, k.Logins("registry.example.com:5000", "team/app"), "the last one first")
		require.Equal(t, []remote.Login{{Secret: "token"}}, k.Logins("registry-1.docker.io", "library/busybox"))
		for host, repository := range map[string]string{
			"registry.example.com": "team/app", "mirror.example.com": "team/app", "registry.example.com:5000": "team",
			"registry-1.docker.io": "busybox",
		} {
			require.Empty(t, k.Logins(host, repository), "%s/%s: they go where they are for, alone", host, repository)
		}
		require.Empty(t, k.Logins("registry.example.com:5000", "public"))
		require.Empty(t, k.Logins("registry.example.com:5000", "other"))

		var err error // the next process knows the same
		k, err = OpenKeychain(k.path)
		require.NoError(t, err)
	}
	st, err := os.Stat(k.path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode())
	left, err := os.ReadDir(filepath.Dir(k.path))
	require.NoError(t, err)
	require.Len(t, left, 1)
}

// A pull that failed leaves no credentials behind, and takes none away.
func TestKeychainUndo(t *testing.T) {
	k := keychain(t)
	pull(t, k, "r.example.com/a", password("u", "bad"))()
	require.Empty(t, k.Logins("r.example.com", "a"))
	pull(t, k, "r.example.com/a", password("u", "good"))
	pull(t, k, "r.example.com/a", password("u", "bad"))()
	again := pull(t, k, "r.example.com/a", password("u", "good"))
	again()
	require.Equal(t, []remote.Login{{User: "u", Secret: "good"}}, k.Logins("r.example.com", "a"))
	k, err := OpenKeychain(k.path)
	require.NoError(t, err)
	require.Equal(t, []remote.Login{{User: "u", Secret: "good"}}, k.Logins("r.example.com", "a"))
}

func TestKeychainBounds(t *testing.T) {
	k := keychain(t)
	for i := range maxLogins + 2 {
		pull(t, k, "r.example.com/many", password("u", fmt.Sprint(i)))
	}
	require.Len(t, k.Logins("r.example.com", "many"), maxLogins)
	require.Equal(t, fmt.Sprint(maxLogins+1), k.Logins("r.example.com", "many")[0].Secret)
	k.path = "/nowhere/at/all"
	for i := range maxRepos {
		_, err := k.put(fmt.Sprint("r.example.com/", i), remote.Login{Secret: "s"})
		require.ErrorIs(t, err, os.ErrNotExist)
	}
	require.Empty(t, k.Logins("r.example.com", "many"), "the one that was pulled the longest ago goes")
	require.NotEmpty(t, k.Logins("r.example.com", "0"), "what cannot be written is still known")
}

func TestKeychainDamaged(t *testing.T) {
	for _, damage := range []string{"{", `{"a":1}`, "[1]"} {
		path := filepath.Join(t.TempDir(), "credentials.json")
		require.NoError(t, os.WriteFile(path, []byte(damage), 0o600))
		k, err := OpenKeychain(path)
		require.ErrorContains(t, err, path)
		pull(t, k, "r.example.com/a", password("u", "s"))
		require.NotEmpty(t, k.Logins("r.example.com", "a"))
	}
}

// Credentials are read as containerd reads them.
func TestParseAuth(t *testing.T) {
	b64 := base64.StdEncoding.EncodeToString([]byte("u:s:s"))
	for name, c := range map[string]struct {
		auth *runtime.AuthConfig
		want remote.Login
		err  string
	}{
		"none":           {nil, remote.Login{}, ""},
		"password":       {password("u", "s"), remote.Login{User: "u", Secret: "s"}, ""},
		"base64":         {&runtime.AuthConfig{Auth: b64}, remote.Login{User: "u", Secret: "s:s"}, ""},
		"identity token": {&runtime.AuthConfig{IdentityToken: "t"}, remote.Login{Secret: "t"}, ""},
		"its server":     {&runtime.AuthConfig{Auth: b64, ServerAddress: "https://r.example.com"}, remote.Login{User: "u", Secret: "s:s"}, ""},
		"bare server":    {&runtime.AuthConfig{Auth: b64, ServerAddress: "r.example.com/"}, remote.Login{User: "u", Secret: "s:s"}, ""},
		"other server":   {&runtime.AuthConfig{Auth: b64, ServerAddress: "https://other.example.com/v1"}, remote.Login{}, ""},
		"no address":     {&runtime.AuthConfig{Auth: b64, ServerAddress: "http://a b"}, remote.Login{}, "no web address"},
		"no base64":      {&runtime.AuthConfig{Auth: "&"}, remote.Login{}, "base64"},
		"no colon":       {&runtime.AuthConfig{Auth: "dQ=="}, remote.Login{}, "user:password"},
	} {
		got, err := parseAuth(c.auth, "r.example.com")
		require.Equal(t, c.want, got, name)
		if c.err == "" {
			require.NoError(t, err, name)
		} else {
			require.ErrorContains(t, err, c.err, name)
		}
	}
}

// service stands for containerd where its own would have to be made to fail.
type service struct {
	runtime.UnimplementedImageServiceServer
	keys *Keychain

	mu   sync.Mutex // guards the fields below
	seen []remote.Login
	fail error
	meta metadata.MD
}

func (s *service) PullImage(ctx context.Context, r *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = s.keys.Logins("r.example.com", "a") // what a snapshotter would have now
	s.meta, _ = metadata.FromIncomingContext(ctx)
	if s.fail != nil {
		return nil, s.fail
	}
	return &runtime.PullImageResponse{ImageRef: "of " + r.Image.Image}, grpc.SetTrailer(ctx, metadata.Pairs("x-trailer", "t"))
}

func (s *service) StreamImages(_ *runtime.StreamImagesRequest, stream grpc.ServerStreamingServer[runtime.StreamImagesResponse]) error {
	for i := range 3 {
		if err := stream.Send(&runtime.StreamImagesResponse{Images: []*runtime.Image{{Id: fmt.Sprint(i)}}}); err != nil {
			return err
		}
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}

func listen(t *testing.T, server *grpc.Server) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cri-") // a socket's path is short
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	return path
}

// proxied returns a client of a proxy before s, with one more service beside it.
func proxied(t *testing.T, s *service) *grpc.ClientConn {
	t.Helper()
	containerd := grpc.NewServer()
	runtime.RegisterImageServiceServer(containerd, s)
	proxy, err := New(listen(t, containerd), s.keys)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, proxy.Close()) })
	conn, err := grpc.NewClient("unix://"+listen(t, grpc.NewServer(grpc.UnknownServiceHandler(proxy.Handle))), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, conn.Close()) })
	return conn
}

func TestProxyPull(t *testing.T) {
	s := &service{keys: keychain(t)}
	client := runtime.NewImageServiceClient(proxied(t, s))
	request := &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: "r.example.com/a:1"}, Auth: password("u", "s")}
	var trailer metadata.MD
	answer, err := client.PullImage(metadata.AppendToOutgoingContext(t.Context(), "x-header", "h"), request, grpc.Trailer(&trailer))
	require.NoError(t, err)
	require.Equal(t, "of r.example.com/a:1", answer.ImageRef)
	require.Equal(t, []string{"t"}, trailer.Get("x-trailer"))
	require.Equal(t, []string{"h"}, s.meta.Get("x-header"))
	require.Equal(t, []remote.Login{{User: "u", Secret: "s"}}, s.seen, "they are known while the pull goes on")

	s.fail = status.Error(codes.PermissionDenied, "wrong password")
	request.Auth.Password = "wrong"
	_, err = client.PullImage(t.Context(), request)
	require.Equal(t, codes.PermissionDenied, status.Code(err))
	require.ErrorContains(t, err, "wrong password")
	require.Equal(t, "wrong", s.seen[0].Secret)
	require.Equal(t, []remote.Login{{User: "u", Secret: "s"}}, s.keys.Logins("r.example.com", "a"))

	request.Image.Image, s.fail = "r.example.com/A B", status.Error(codes.InvalidArgument, "no name")
	_, err = client.PullImage(t.Context(), request)
	require.ErrorContains(t, err, "no name", "containerd says what is wrong")
}

func TestProxyStreams(t *testing.T) {
	s := &service{keys: keychain(t)}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stream, err := runtime.NewImageServiceClient(proxied(t, s)).StreamImages(ctx, &runtime.StreamImagesRequest{})
	require.NoError(t, err)
	for i := range 3 {
		m, err := stream.Recv()
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint(i), m.Images[0].Id)
	}
	cancel()
	_, err = stream.Recv()
	require.Equal(t, codes.Canceled, status.Code(err))
}

// TestProxyKnowsNoMethods passes on what this version's API does not have, and
// nothing that is not of the image service.
func TestProxyKnowsNoMethods(t *testing.T) {
	conn := proxied(t, &service{keys: keychain(t)})
	err := conn.Invoke(t.Context(), imageService+"InventedLater", &emptypb.Empty{}, &emptypb.Empty{})
	require.ErrorContains(t, err, "unknown method InventedLater", "containerd's own words")
	_, err = runtime.NewRuntimeServiceClient(conn).Version(t.Context(), &runtime.VersionRequest{})
	require.Equal(t, codes.Unimplemented, status.Code(err))
	require.ErrorContains(t, err, "containerd-clip-grpc serves the image service")
	_, err = runtime.NewImageServiceClient(conn).ImageStatus(t.Context(), &runtime.ImageStatusRequest{})
	require.Equal(t, codes.Unimplemented, status.Code(err))
}

func TestProxyWithoutContainerd(t *testing.T) {
	k := keychain(t)
	proxy, err := New(filepath.Join(t.TempDir(), "none"), k)
	require.NoError(t, err)
	defer proxy.Close()
	conn, err := grpc.NewClient("unix://"+listen(t, grpc.NewServer(grpc.UnknownServiceHandler(proxy.Handle))), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer conn.Close()
	_, err = runtime.NewImageServiceClient(conn).PullImage(t.Context(), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: "r.example.com/a"}, Auth: password("u", "s")})
	require.Equal(t, codes.Unavailable, status.Code(err))
	require.Empty(t, k.Logins("r.example.com", "a"))
}

// FuzzPull has requests of any bytes: they are refused or passed on, and no
// login is kept without a secret.
func FuzzPull(f *testing.F) {
	good, err := proto.Marshal(&runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: "a"}, Auth: password("u", "s")})
	require.NoError(f, err)
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		var req runtime.PullImageRequest
		if proto.Unmarshal(b, &req) != nil {
			return
		}
		k := &Keychain{path: "/nowhere/at/all"}
		var undo func()
		if err := k.add(req.GetImage().GetImage(), req.GetAuth(), &undo); err == nil || errors.Is(err, os.ErrNotExist) {
			for _, r := range k.repos {
				require.NotEmpty(t, r.Logins[0].Secret)
			}
		}
	})
}
