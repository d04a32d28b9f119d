package command

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/internal/testutil"
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
