package command

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

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
