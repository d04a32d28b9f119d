package e2e

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// private is a registry that gives tokens for one password alone, and answers nobody without a token.
type private struct {
	user, password string
	token          atomic.Int64 // the one that is good now
	given          atomic.Int64
}

func (p *private) fault(rw http.ResponseWriter, r *http.Request, next http.Handler) {
	if r.URL.Path == "/token" {
		user, password, _ := r.BasicAuth()
		if user != p.user || password != p.password {
			answer(http.StatusUnauthorized)(rw, r, next)
			return
		}
		p.given.Add(1)
		fmt.Fprintf(rw, `{"token":"%s-t%d","expires_in":300}`, secret, p.token.Load())
		return
	}
	if r.Header.Get("Authorization") != fmt.Sprintf("Bearer %s-t%d", secret, p.token.Load()) {
		challenge := fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, r.Host)
		answer(http.StatusUnauthorized, "WWW-Authenticate", challenge)(rw, r, next)
		return
	}
	next.ServeHTTP(rw, r)
}

// auth is what a kubelet sends from an imagePullSecret.
func (p *private) auth() *runtime.AuthConfig {
	return &runtime.AuthConfig{Auth: base64.StdEncoding.EncodeToString([]byte(p.user + ":" + p.password))}
}

// kubelet is a client of CRI whose image service is the daemon.
type kubelet struct {
	*world
	images, direct runtime.ImageServiceClient
	runtime        runtime.RuntimeServiceClient
}

func newKubelet(t *testing.T, config string) *kubelet {
	w := workerlessWorld(t, config+"[cri]\ncontainerd = \"LAB/worker/containerd.sock\"\n")
	w.addSmall()
	w.publish(images.PauseName)
	w.index(images.SmallName)
	var err error
	w.worker, err = w.lab.StartCRI(w.ctx, "worker", w.daemon, w.ref(images.PauseName))
	require.NoError(t, err)
	through, err := w.lab.Dial(w.daemon.Socket)
	require.NoError(t, err)
	direct, err := w.lab.Dial(w.worker.Socket)
	require.NoError(t, err)
	return &kubelet{w, runtime.NewImageServiceClient(through), runtime.NewImageServiceClient(direct), runtime.NewRuntimeServiceClient(direct)}
}

func (k *kubelet) pullImage(ref string, auth *runtime.AuthConfig) error {
	_, err := k.images.PullImage(k.ctx, &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: ref}, Auth: auth})
	return err
}

// sandbox starts a pod that uses the host's network.
func (k *kubelet) sandbox() (id string, config *runtime.PodSandboxConfig) {
	k.Helper()
	config = &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: "pod", Uid: "pod", Namespace: "default"},
		LogDirectory: k.TempDir(),
		Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE},
		}},
	}
	answer, err := k.runtime.RunPodSandbox(k.ctx, &runtime.RunPodSandboxRequest{Config: config})
	require.NoError(k, err)
	k.Cleanup(func() {
		ctx := context.WithoutCancel(k.ctx)
		_, err := k.runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: answer.PodSandboxId})
		require.NoError(k, err)
		_, err = k.runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: answer.PodSandboxId})
		require.NoError(k, err)
	})
	return answer.PodSandboxId, config
}

// runIn runs a command that prints something in a new container of a pod and returns its output.
func (k *kubelet) runIn(pod string, config *runtime.PodSandboxConfig, name, ref string, command ...string) string {
	k.Helper()
	created, err := k.runtime.CreateContainer(k.ctx, &runtime.CreateContainerRequest{
		PodSandboxId: pod, SandboxConfig: config,
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: name}, Image: &runtime.ImageSpec{Image: ref}, Command: command, LogPath: name,
			Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{
				NamespaceOptions: config.Linux.SecurityContext.NamespaceOptions,
			}},
		},
	})
	require.NoError(k, err)
	_, err = k.runtime.StartContainer(k.ctx, &runtime.StartContainerRequest{ContainerId: created.ContainerId})
	require.NoError(k, err)
	var status *runtime.ContainerStatus
	k.eventually("the container ends", func() bool {
		answer, err := k.runtime.ContainerStatus(k.ctx, &runtime.ContainerStatusRequest{ContainerId: created.ContainerId})
		require.NoError(k, err)
		status = answer.Status
		return status.State == runtime.ContainerState_CONTAINER_EXITED
	})
	// Each line of a log is time, stream, whether it is a whole line, text.
	var text []byte
	k.eventually("its log is written", func() bool { // by somebody who goes on when it has ended
		text, err = os.ReadFile(filepath.Join(config.LogDirectory, name))
		return err == nil && (len(text) > 0 || status.ExitCode != 0)
	})
	var out strings.Builder
	for line := range strings.Lines(string(text)) {
		out.WriteString(strings.SplitN(line, " ", 4)[3])
	}
	require.Zero(k, status.ExitCode, out.String())
	return out.String()
}

// TestCRI pulls an image of a private registry as a kubelet does, with the daemon as its image service: the pull is
// lazy, and containers read with the credentials of the pull, also after tokens ended and the daemon was killed. They are
// in no log.
func TestCRI(t *testing.T) {
	t.Parallel()
	k := newKubelet(t, fillLate)
	ref := k.ref(images.SmallName)
	registry := &private{user: "robot", password: secret}
	k.registry.Misbehave(registry.fault)
	require.NoError(t, k.pullImage(k.ref(images.PauseName), registry.auth()))

	wrong := &runtime.AuthConfig{Username: "robot", Password: secret + "-wrong"}
	for _, auth := range []*runtime.AuthConfig{nil, wrong} {
		require.Error(t, k.pullImage(ref, auth))
	}
	k.registry.Reset()
	require.NoError(t, k.pullImage(ref, registry.auth()))
	require.Empty(t, k.registry.Requests().Gets(k.layers(images.SmallName)...), "a pull downloads no layer:\n%s", k.registry.Requests())
	require.Error(t, k.pullImage(ref, wrong), "which takes no good ones away")

	pod, config := k.sandbox()
	k.registry.Reset()
	require.Equal(t, "hello from clip\n", k.runIn(pod, config, "first", ref, "sh", "/app/run.sh"))
	fetched := k.registry.Requests().Gets(k.layers(images.SmallName)...)
	require.NotEmpty(t, fetched)
	for _, r := range fetched {
		require.NotEmpty(t, r.Range, "reads are spans: %s", r)
	}

	given := registry.given.Load()
	registry.token.Add(1) // what was given is good no more
	k.daemon.Kill()
	require.NoError(t, k.lab.RestartDaemon(k.ctx, k.daemon))
	k.foundAgain(k.worker)
	k.registry.Reset()
	k.runIn(pod, config, "second", ref, "find", "/sizes", "-type", "f", "-exec", "md5sum", "{}", ";")
	require.NotEmpty(t, k.registry.Requests().Gets(k.layers(images.SmallName)...))
	require.Greater(t, registry.given.Load(), given)

	st, err := os.Stat(filepath.Join(filepath.Dir(k.daemon.Socket), "credentials.json"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode())
	k.requireForwarded(ref)
	requireNoSecret(t, "the daemon", k.daemon.Log())
	for _, auth := range []*runtime.AuthConfig{registry.auth(), {Auth: base64.StdEncoding.EncodeToString([]byte("robot:" + wrong.Password))}} {
		require.NotContains(t, k.daemon.Log(), auth.Auth)
	}
}

// byID orders images: containerd's order changes from call to call.
func byID(images []*runtime.Image) {
	slices.SortFunc(images, func(a, b *runtime.Image) int { return strings.Compare(a.Id, b.Id) })
	for _, image := range images {
		slices.Sort(image.RepoTags)
		slices.Sort(image.RepoDigests)
	}
}

// requireForwarded asks each method of the image service through the daemon and directly: the answers are the same.
func (k *kubelet) requireForwarded(ref string) {
	k.Helper()
	spec := &runtime.ImageSpec{Image: ref}
	methods := map[string]func(c runtime.ImageServiceClient) (proto.Message, error){
		"ListImages": func(c runtime.ImageServiceClient) (proto.Message, error) {
			answer, err := c.ListImages(k.ctx, &runtime.ListImagesRequest{})
			byID(answer.GetImages())
			return answer, err
		},
		"StreamImages": func(c runtime.ImageServiceClient) (proto.Message, error) {
			stream, err := c.StreamImages(k.ctx, &runtime.StreamImagesRequest{})
			if err != nil {
				return nil, err
			}
			var all runtime.StreamImagesResponse
			for {
				m, err := stream.Recv()
				if err == io.EOF {
					byID(all.Images)
					return &all, nil
				}
				if err != nil {
					return nil, err
				}
				all.Images = append(all.Images, m.Images...)
			}
		},
		"ImageStatus": func(c runtime.ImageServiceClient) (proto.Message, error) {
			return c.ImageStatus(k.ctx, &runtime.ImageStatusRequest{Image: spec, Verbose: true})
		},
		"ImageFsInfo": func(c runtime.ImageServiceClient) (proto.Message, error) {
			answer, err := c.ImageFsInfo(k.ctx, &runtime.ImageFsInfoRequest{})
			for _, u := range append(answer.GetImageFilesystems(), answer.GetContainerFilesystems()...) {
				u.Timestamp, u.UsedBytes, u.InodesUsed = 0, nil, nil // they change by themselves
			}
			return answer, err
		},
		"PullImage": func(c runtime.ImageServiceClient) (proto.Message, error) {
			return c.PullImage(k.ctx, &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: k.registry.Ref("small/none:1")}})
		},
		"RemoveImage": func(c runtime.ImageServiceClient) (proto.Message, error) {
			return c.RemoveImage(k.ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: "none"}})
		},
	}
	desc := runtime.ImageService_ServiceDesc
	require.Len(k, methods, len(desc.Methods)+len(desc.Streams), "every method is asked")
	for name, ask := range methods {
		through, err := ask(k.images)
		direct, derr := ask(k.direct)
		require.Equal(k, derr == nil, err == nil, "%s: %v, %v", name, derr, err)
		if err != nil {
			require.Equal(k, derr.Error(), err.Error(), name)
			continue
		}
		require.True(k, proto.Equal(direct, through), "%s:\n%s\n%s", name, protojson.Format(direct), protojson.Format(through))
	}

	_, err := k.images.RemoveImage(k.ctx, &runtime.RemoveImageRequest{Image: spec})
	require.NoError(k, err)
	answer, err := k.images.ImageStatus(k.ctx, &runtime.ImageStatusRequest{Image: spec})
	require.NoError(k, err)
	require.Nil(k, answer.Image, "it is removed")
}
