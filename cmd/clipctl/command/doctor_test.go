package command

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
)

// TestDoctorState has archives of which one is none, and a kubelet that knows the daemon or does not.
func TestDoctorState(t *testing.T) {
	dir := t.TempDir()
	address, kubelet := filepath.Join(dir, "run", "clip.sock"), filepath.Join(dir, "kubelet.yaml")
	look := func() map[string]finding {
		t.Helper()
		d := &doctor{globals: &globals{clipAddress: address}, options: doctorOptions{root: dir, kubelet: kubelet}}
		d.archives(nil)
		d.logins()
		found := map[string]finding{}
		for _, f := range d.findings {
			require.NotContains(t, found, f.Check)
			require.Equal(t, f.Status != good, f.Remedy != "", "%+v", f)
			found[f.Check] = f
		}
		return found
	}
	write := func(path, content string) string {
		t.Helper()
		path = filepath.Join(dir, path)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
		return path
	}
	require.Empty(t, look(), "there is nothing")

	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "a", Data: "1"}))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "archives", ".indexed"), 0o700))
	img.WriteArchive(t, filepath.Join(dir, "archives", "a.clip"), "example.com/app:1")
	require.Contains(t, look()["archives"].Found, "1 in "+dir)
	for _, path := range []string{"archives/bad.clip", "archives/.indexed/" + digest.FromString("x").Encoded() + ".clip"} {
		bad := write(path, "no archive")
		found := look()["archives"]
		require.Equal(t, warning, found.Status)
		require.Contains(t, found.Found, bad)
		require.NoError(t, os.Remove(bad))
	}

	write("kubelet.yaml", "kind: KubeletConfiguration\n")
	require.Equal(t, warning, look()["logins"].Status)
	require.Contains(t, look()["logins"].Remedy, "imageServiceEndpoint: unix://"+address)
	write("kubelet.yaml", "kind: KubeletConfiguration\nimageServiceEndpoint: 'unix://"+address+"'\n")
	require.Contains(t, look()["logins"].Found, "knows those of 0 repositories")
	keys := write("run/credentials.json", `[{"name":"example.com/app","logins":[{"User":"u","Secret":"S3CRET"}]}]`)
	require.Contains(t, look()["logins"].Found, "knows those of 1 repositories")
	require.NoError(t, os.Remove(kubelet))
	require.Equal(t, finding{Status: good, Check: "logins", Found: "of 1 repositories that the kubelet pulled from"}, look()["logins"])
	require.NoError(t, os.WriteFile(keys, []byte("S3CRET"), 0o600))
	require.Equal(t, warning, look()["logins"].Status)
	require.NotContains(t, look()["logins"].Found, "S3CRET")
}

// patient is a daemon that answers as it is told.
type patient struct {
	fakeDaemon
	status  control.Status
	archive control.Archive
	err     error // instead of both
}

func (p patient) Status(context.Context) (control.Status, error) { return p.status, p.err }

func (p patient) Find(context.Context, control.Image) (control.Archive, error) {
	return p.archive, p.err
}

// newDoctor returns one who looks at the daemon that serveDaemon serves at a socket.
func newDoctor(socket string) *doctor {
	return &doctor{globals: &globals{clipAddress: socket, address: socket + ".none"}}
}

// TestDoctorDaemon has daemons that do not say what they do.
func TestDoctorDaemon(t *testing.T) {
	damaged := fmt.Errorf("/r/metadata.db is damaged: %w", errdefs.ErrDataLoss)
	for name, c := range map[string]struct {
		patient
		has, remedy string
	}{
		"damaged":       {patient{err: damaged}, "/r/metadata.db is damaged", "restarting it does not help"},
		"older":         {patient{err: errdefs.ErrNotImplemented}, "another version", "one release"},
		"newer":         {patient{status: control.Status{Version: control.Version + 1}}, "another version", "one release"},
		"for root only": {patient{err: errdefs.ErrPermissionDenied}, "permission denied", "as root"},
		"stuck":         {patient{err: errdefs.ErrUnavailable}, "nobody answers at", "systemctl restart"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDoctor(serveDaemon(t, c.patient))
			require.Nil(t, d.daemon(t.Context()))
			requireFinding(t, d, failure, "daemon", c.has, c.remedy)
		})
	}
}

// TestDoctorFindings has the doctor judge what it may meet.
func TestDoctorFindings(t *testing.T) {
	cache := func(c control.Cache) *control.Status { return &control.Status{Cache: c} }
	unpack := func(names ...string) (c containerdConfig) {
		for _, name := range names {
			c.Plugins.Transfer.Unpack = append(c.Plugins.Transfer.Unpack, unpackConfig{Snapshotter: name})
		}
		return c
	}
	pods := func(snapshotter string, local, noLabels bool) (c containerdConfig) {
		c.Plugins.Images.Snapshotter, c.Plugins.Images.Local, c.Plugins.Images.NoLabels = snapshotter, local, noLabels
		return c
	}
	reads := func(seconds float64) func(*doctor) {
		return func(d *doctor) { d.reads(control.Daemon{InFlight: 3, OldestSeconds: seconds}) }
	}
	mounts := func(can control.Daemon) func(*doctor) { return func(d *doctor) { d.mounts(can) } }
	room := func(st *control.Status, kind, free int64) func(*doctor) {
		return func(d *doctor) { d.room(st, "/r", kind, free) }
	}
	version := func(v string) func(*doctor) { return func(d *doctor) { d.version(v) } }
	transfer := func(c containerdConfig) func(*doctor) { return func(d *doctor) { d.transfer(&c) } }
	kubernetes := func(c containerdConfig) func(*doctor) { return func(d *doctor) { d.kubernetes(&c) } }
	for name, c := range map[string]struct {
		look                       func(*doctor)
		status, check, has, remedy string
	}{
		"quick reads":         {reads(9.9), good, "reads", "3 reads under way, the oldest for 9.9s", ""},
		"slow reads":          {reads(10.1), warning, "reads", "10.1s", "which host is slow"},
		"stuck reads":         {reads(90.1), failure, "reads", "1m30.1s", "systemctl restart"},
		"best mode":           {mounts(control.Daemon{Mode: "file"}), good, "kernel", "mode file", ""},
		"other mode":          {mounts(control.Daemon{Mode: "loop"}), warning, "kernel", "mode loop", "Linux 6.12"},
		"no roots":            {mounts(control.Daemon{NotLazy: "no EROFS"}), failure, "kernel", "no EROFS", "Linux 6.12 or newer"},
		"full at start":       {mounts(control.Daemon{NotLazy: "no space", Full: true}), failure, "kernel", "no space", "make room"},
		"room":                {room(cache(control.Cache{Used: 1, Max: 2}), unix.EXT4_SUPER_MAGIC, 2<<30), good, "disk", "2.15 GB free at /r", ""},
		"on tmpfs":            {room(nil, unix.TMPFS_MAGIC, 2<<30), failure, "disk", "/r is on tmpfs", "a real file system"},
		"on overlayfs":        {room(nil, unix.OVERLAYFS_SUPER_MAGIC, 2<<30), failure, "disk", "/r is on overlayfs", "a real file system"},
		"little room":         {room(nil, unix.EXT4_SUPER_MAGIC, 1<<30-1), warning, "disk", "1.07 GB free at /r", "clipctl cache prune"},
		"cache may fill it":   {room(cache(control.Cache{Used: 1 << 30, Max: 4 << 30}), unix.EXT4_SUPER_MAGIC, 2<<30), warning, "disk", "may grow by 3.22 GB", "lower cache.max_size"},
		"in memory":           {room(cache(control.Cache{InMemory: true}), unix.EXT4_SUPER_MAGIC, 2<<30), failure, "disk", "served from memory", "make room"},
		"containerd 2":        {version("v2.4.2"), good, "containerd", "version v2.4.2", ""},
		"containerd 1":        {version("1.7.27"), failure, "containerd", "version 1.7.27", "containerd 2.0 or newer"},
		"containerd of whom":  {version("main"), failure, "containerd", "version main", "containerd 2.0 or newer"},
		"unpacks for both":    {transfer(unpack("overlayfs", "clip")), good, "unpack_config", "overlayfs, clip", ""},
		"clip by default":     {transfer(unpack("clip", "overlayfs")), warning, "unpack_config", "clip comes first", "overlayfs first"},
		"unpacks for another": {transfer(unpack("overlayfs")), failure, "unpack_config", "no unpack platforms defined", "clipctl setup"},
		"pods":                {kubernetes(pods("clip", false, true)), good, "kubernetes", "pods use the snapshotter clip", ""},
		"pods are not lazy":   {kubernetes(pods("clip", true, true)), failure, "kubernetes", "no image of a pod is lazy", "remove use_local_image_pull"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDoctor("/s")
			c.look(d)
			requireFinding(t, d, c.status, c.check, c.has, c.remedy)
		})
	}
	d := newDoctor("/s")
	d.kubernetes(&containerdConfig{})
	require.Empty(t, d.findings, "pods use something else")
	d.mounts(control.Daemon{Mode: "file", Nested: "no xattrs", Remap: "no idmaps"})
	require.Len(t, d.findings, 3)
	for i, has := range []string{"mode file", "no xattrs", "no idmaps"} {
		require.Contains(t, d.findings[i].Found, has)
		require.Equal(t, i > 0, d.findings[i].Status == warning)
	}
}

// TestDoctorRegistry has registries that do not deliver.
func TestDoctorRegistry(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	for name, c := range map[string]struct {
		answer int
		remedy string
	}{
		"who are you":   {http.StatusUnauthorized, "docker login"},
		"not for you":   {http.StatusForbidden, "docker login"},
		"not here":      {http.StatusNotFound, "check the image's name"},
		"not any more":  {http.StatusBadRequest, "check network"},
		"somebody else": {0, "check network"},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
				w.WriteHeader(c.answer)
			}))
			defer server.Close()
			if c.answer == 0 {
				server.Close()
			}
			d := newDoctor("/s")
			d.registry(t.Context(), nil, strings.TrimPrefix(server.URL, "http://")+"/team/app:1")
			requireFinding(t, d, failure, "registry", "manifest of 127.0.0.1:", c.remedy)
		})
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte("me:S3CRET")))
	require.NoError(t, os.WriteFile(filepath.Join(os.Getenv("DOCKER_CONFIG"), "config.json"), []byte(config), 0o600))
	d := newDoctor("/s")
	d.registry(t.Context(), nil, host+"/team/app:1")
	requireFinding(t, d, failure, "registry", "it refuses them", "docker login")
	require.NotContains(t, d.findings[0].Found, "S3CRET")

	d = newDoctor("/s")
	d.registry(t.Context(), nil, "no image")
	requireFinding(t, d, failure, "registry", "no image", "as containerd does")
}

// TestDoctorArchive has the daemon say what it finds for an image.
func TestDoctorArchive(t *testing.T) {
	for name, c := range map[string]struct {
		patient             patient
		status, has, remedy string
	}{
		"all lazy":  {patient{archive: control.Archive{Layers: 3, Lazy: 3}}, good, "all of its 3 layers", ""},
		"not lazy":  {patient{archive: control.Archive{Layers: 3, Lazy: 1, NotLazy: "zstd window"}}, warning, "layer 2 and those above it are not lazy: zstd window", "another way"},
		"of CLIP's": {patient{archive: control.Archive{Upstream: "/a/theirs.clip"}}, good, "/a/theirs.clip; the first pull", ""},
		"none":      {patient{err: errdefs.ErrNotFound}, failure, "example.com/app:1 has none", "clipctl index example.com/app:1 --push"},
		"older":     {patient{err: errdefs.ErrNotImplemented}, unknown, "another version", "one release"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDoctor(serveDaemon(t, c.patient))
			d.archive(t.Context(), &control.Status{}, discover.Image{Ref: "example.com/app:1", Manifest: digest.FromString("")}, nil)
			requireFinding(t, d, c.status, "archive", c.has, c.remedy)
		})
	}
}

// requireFinding is for a doctor with one finding.
func requireFinding(t *testing.T, d *doctor, status, check, has, remedy string) {
	t.Helper()
	require.Len(t, d.findings, 1, "%+v", d.findings)
	f := d.findings[0]
	require.Equal(t, [2]string{status, check}, [2]string{f.Status, f.Check}, "%+v", f)
	require.Contains(t, f.Found, has)
	require.Contains(t, f.Remedy, remedy)
	require.Equal(t, status == good, f.Remedy == "", "%+v", f)
}
