package command

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/plugin/export"
	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
)

func TestDefaultOutput(t *testing.T) {
	for image, want := range map[string]string{
		"registry.example.com/team/app:1":        "app-1.clip",
		"registry.example.com:5000/team/app":     "app.clip",
		"registry.example.com/app:1@sha256:0123": "app-1.clip",
		"oci:/some/layout:tag":                   "layout-tag.clip",
		"oci-archive:/some/image.tar":            "image.clip",
		"busybox":                                "busybox.clip",
	} {
		require.Equal(t, want, defaultOutput(image), image)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 kB", 123456: "123.5 kB", 1e6: "1.0 MB", 25e8: "2.50 GB",
	} {
		require.Equal(t, want, size(n))
	}
}

func TestEnvironment(t *testing.T) {
	for _, c := range []struct{ name, flag, standard string }{
		{"CONTAINERD_ADDRESS", "address", "/run/containerd/containerd.sock"},
		{"CONTAINERD_NAMESPACE", "namespace", "default"},
		{"CLIP_ADDRESS", "clip-address", "/run/containerd-clip-grpc/containerd-clip-grpc.sock"},
	} {
		t.Setenv(c.name, "")
		require.Equal(t, c.standard, New().PersistentFlags().Lookup(c.flag).DefValue)
		t.Setenv(c.name, "/other")
		require.Equal(t, "/other", New().PersistentFlags().Lookup(c.flag).DefValue)
	}
}

func run(t *testing.T, args ...string) (stdout string, err error) {
	t.Helper()
	stdout, _, err = runBoth(t, args...)
	return stdout, err
}

// runBoth is run that also returns what was said beside the result.
func runBoth(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	t.Setenv("CLIPCTL_CACHE_DIR", t.TempDir())
	cmd := New()
	var out, diagnostics bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&diagnostics)
	cmd.SetArgs(args)
	err = cmd.ExecuteContext(t.Context())
	return out.String(), diagnostics.String(), err
}

func TestWithoutDaemons(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "s")
	t.Setenv("CONTAINERD_ADDRESS", missing)
	_, err := run(t, "status", "--clip-address", missing)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorContains(t, err, "is containerd-clip-grpc running?")
	_, err = run(t, "index", "example.com/app:1", "--address", missing)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorContains(t, err, "is containerd running?")

	// A socket that nobody listens on.
	dead := filepath.Join(t.TempDir(), "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	require.NoError(t, err)
	l.SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	_, err = run(t, "status", "--clip-address", dead)
	require.ErrorContains(t, err, "asking the daemon at "+dead)
}

// fakeDaemon has an image of one ordinary layer on a lazy one, and a container.
type fakeDaemon struct{ pruned *control.Prune }

func (fakeDaemon) Status(context.Context) (control.Status, error) {
	return control.Status{
		Version: control.Version,
		Daemon:  control.Daemon{PID: 7, Mode: "file", InFlight: 2, OldestSeconds: 1.5},
		Cache:   control.Cache{Used: 1000, Max: 2000, InMemory: true},
		Snapshots: []control.Snapshot{
			{Name: "lazy a", Kind: "committed", Image: "example.com/app:1", ChainID: "sha256:aa", DiffID: "sha256:0123456789abcdef", Lazy: true,
				Layers: []digest.Digest{"sha256:0123456789abcdef"}, Mount: "file"},
			{Name: "ns/2/sha256:bb", Parent: "lazy a", Kind: "committed", Image: "example.com/app:1", ChainID: "sha256:bb", DiffID: "sha256:b", NotLazy: "zstd window", Size: 50},
			{Name: "ns/3/c1", Parent: "ns/2/sha256:bb", Kind: "active"},
			{Name: "ns/4/other", Kind: "active"},
		},
		Layers: []control.Layer{{
			DiffID: "sha256:0123456789abcdef", Size: 1000, Fetched: 250, Fill: "paused", Host: "mirror.example.com", Error: "span 3: refused",
		}},
	}, nil
}

func (fakeDaemon) Fetches(context.Context, time.Time) ([]control.Fetch, error) { return nil, nil }

func (fakeDaemon) Find(context.Context, control.Image) (control.Archive, error) {
	return control.Archive{}, errdefs.ErrNotFound
}

func (fakeDaemon) Save(context.Context, control.Save) (control.Archive, error) {
	return control.Archive{}, errdefs.ErrNotFound
}

func (d fakeDaemon) Prune(_ context.Context, what control.Prune) (control.Pruned, error) {
	*d.pruned = what
	return control.Pruned{Layers: 3, Bytes: 4_000_000}, nil
}

// serveDaemon serves a daemon until the test ends and returns its socket.
func serveDaemon(t *testing.T, d control.Service) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	server := grpc.NewServer()
	control.Register(server, d)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	t.Setenv("CLIP_ADDRESS", socket)
	t.Setenv("CONTAINERD_ADDRESS", socket+".none")
	return socket
}

// TestStatus is without containerd: images are called what the daemon knows.
func TestStatus(t *testing.T) {
	serveDaemon(t, fakeDaemon{})
	out, err := run(t, "status")
	require.NoError(t, err)
	fields := func(head string, n int) string {
		_, after, ok := strings.Cut(out, head)
		require.True(t, ok, out)
		return strings.Join(strings.Fields(strings.Split(after, "\n")[n]), " ")
	}
	require.Contains(t, out, "daemon 7 since")
	require.Contains(t, out, "mode file")
	require.Contains(t, out, "which is full: reads are served from memory; 2 reads under way, the oldest for 1.5s")
	require.Equal(t, "- example.com/app:1 1 of 2 layers 250B of 1.0kB (25%) paused - zstd window", strings.NewReplacer(" B", "B", " kB", "kB").Replace(fields("NAMESPACE  IMAGE", 1)))
	require.Equal(t, "ns c1 example.com/app:1 yes file zstd window", fields("CONTAINER", 1))
	require.Equal(t, "ns other - no -", fields("CONTAINER", 2))
	require.Contains(t, fields("\nLAYER", 1), "sha256:0123456789ab yes")
	require.Contains(t, fields("\nLAYER", 1), "paused mirror.example.com example.com/app:1 span 3: refused")
	require.Contains(t, fields("\nLAYER", 2), "no 50")

	out, err = run(t, "status", "--json")
	require.NoError(t, err)
	var v view
	require.NoError(t, json.Unmarshal([]byte(out), &v))
	require.Equal(t, imageView{Name: "example.com/app:1", ChainID: "sha256:bb", Layers: 2, Lazy: 1, Reason: "zstd window", Fetched: 250, Total: 1000, Fill: fill.Paused, Error: "span 3: refused"}, v.Images[0])
	require.Len(t, v.Containers, 2)
	require.Equal(t, "mirror.example.com", v.Layers[0].Host)
}

// TestStatusNames is with what containerd knows.
func TestStatusNames(t *testing.T) {
	st, err := fakeDaemon{}.Status(t.Context())
	require.NoError(t, err)
	v := newView(st, inContainerd{
		asked:      true,
		images:     []knownImage{{"ns", "example.com/base:1", "sha256:aa"}, {"ns", "example.com/other:2", "sha256:bb"}, {"ns", "gone", "sha256:cc"}},
		containers: map[string]knownContainer{"ns/c1": {"web", "example.com/other:2"}},
	})
	require.Len(t, v.Images, 2)
	require.Equal(t, imageView{Namespace: "ns", Name: "example.com/base:1", ChainID: "sha256:aa", Layers: 1, Lazy: 1, Fetched: 250, Total: 1000, Fill: fill.Paused, Mount: "file", Error: "span 3: refused"}, v.Images[0])
	require.Equal(t, "example.com/other:2", v.Images[1].Name)
	require.Equal(t, containerView{Namespace: "ns", Name: "web", Image: "example.com/other:2", Lazy: true, Reason: "zstd window", Mount: "file"}, v.Containers[0])
	st.Snapshots[1].NotLazy = ""
	require.Equal(t, unasked, newView(st, inContainerd{}).Images[0].Reason)
}

func TestStatusWatch(t *testing.T) {
	serveDaemon(t, fakeDaemon{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var lines [][]byte
	cmd := New()
	cmd.SetOut(writerFunc(func(b []byte) (int, error) {
		if lines = append(lines, bytes.Clone(b)); len(lines) == 2 {
			cancel() // before it waits, which is when it is interrupted
		}
		return len(b), nil
	}))
	cmd.SetArgs([]string{"status", "--watch", "--json"})
	require.NoError(t, cmd.ExecuteContext(ctx), "interrupting is how it ends")
	require.Len(t, lines, 2)
	for _, line := range lines {
		var v view
		require.NoError(t, json.Unmarshal(line, &v), "one document per line")
		require.Equal(t, 7, v.Daemon.PID)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func TestPath(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	m := export.Manifest{Platform: ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}}
	for name, c := range map[string]struct {
		output  string
		several bool
		want    string
		message string
	}{
		"named":        {output: dir + "/a.clip", want: dir + "/a.clip"},
		"several":      {output: dir + "/a.clip", several: true, want: dir + "/a-linux-arm-v7.clip"},
		"default":      {want: "app-1.clip"},
		"a directory":  {output: dir, message: "is a directory"},
		"a device":     {output: "/dev/null", message: "is not an ordinary file"},
		"below none":   {output: dir + "/no/a.clip", message: "no such file"},
		"below a file": {output: file + "/a.clip", message: "not a directory"},
	} {
		got, _, err := indexOptions{output: c.output}.path("example.com/app:1", m, c.several)
		if c.message != "" {
			require.ErrorContains(t, err, c.message, name)
			continue
		}
		require.NoError(t, err, name)
		require.Equal(t, c.want, got, name)
	}
	got, cleanup, err := indexOptions{push: true}.path("example.com/app:1", m, false)
	require.NoError(t, err)
	require.DirExists(t, filepath.Dir(got))
	cleanup()
	require.NoDirExists(t, filepath.Dir(got))
}

func TestSelection(t *testing.T) {
	s, err := platformFlags{}.selection()
	require.NoError(t, err)
	require.Equal(t, platforms.DefaultString(), s.Name)
	s, err = platformFlags{platform: "linux/arm64"}.selection()
	require.NoError(t, err)
	require.False(t, s.All)
	require.True(t, s.Match.Match(platforms.MustParse("linux/arm64")))
	require.False(t, s.Match.Match(platforms.MustParse("linux/amd64")))
	s, err = platformFlags{all: true}.selection()
	require.NoError(t, err)
	require.True(t, s.All)
	_, err = platformFlags{platform: "a/b/c/d"}.selection()
	require.Error(t, err)
	_, err = run(t, "index", "x", "--platform", "linux/amd64", "--all-platforms")
	require.Error(t, err)
}

// layout makes an OCI layout of one image, without a name.
func layout(t *testing.T) (string, *testutil.Image) {
	t.Helper()
	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "f", Data: "content"}))
	return writeLayout(t, img), img
}

func writeLayout(t *testing.T, img *testutil.Image) string {
	t.Helper()
	dir := t.TempDir()
	img.WriteLayout(t, dir)
	return dir
}

func TestIndexLayout(t *testing.T) {
	dir, img := layout(t)
	output := filepath.Join(t.TempDir(), "a.clip")
	_, err := run(t, "index", "oci:"+dir, "-o", output)
	require.ErrorContains(t, err, "--storage-ref")
	_, err = run(t, "index", "oci:"+dir, "-o", output, "--storage-ref", "Not A Reference")
	require.ErrorContains(t, err, "Not A Reference")
	require.NoFileExists(t, output)

	out, err := run(t, "index", "oci:"+dir, "-o", output, "--storage-ref", "example.com/app:1")
	require.NoError(t, err)
	require.Contains(t, out, output)
	require.Contains(t, out, "\t1 layers\t")
	a, err := archive.OpenFile(output)
	require.NoError(t, err)
	defer a.Close()
	require.Equal(t, "example.com/app:1", a.Info().StorageRef)
	require.Equal(t, img.Descriptor.Digest, a.Info().Descriptor.Digest)
	require.Equal(t, img.DiffIDs, a.DiffIDs())
}

func TestPush(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	_, err := run(t, "push", "/nowhere.clip")
	require.ErrorIs(t, err, os.ErrNotExist)
	dir, _ := layout(t)
	output := filepath.Join(t.TempDir(), "a.clip")
	_, err = run(t, "index", "oci:"+dir, "-o", output, "--storage-ref", "127.0.0.1:1/app:1")
	require.NoError(t, err)
	_, err = run(t, "push", output)
	require.ErrorContains(t, err, "127.0.0.1:1")
}

func TestProgressLines(t *testing.T) {
	_, img := layout(t)
	var b bytes.Buffer
	p := newProgress(&b, append(img.Layers, img.Layers...))
	p.Read(0, 10)
	p.Done(1, index.Outcome{NotLazy: errors.New("why")})
	p.Done(0, index.Outcome{})
	p.Done(0, index.Outcome{Cached: true})
	p.close(nil)
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	require.Len(t, lines, 3)
	require.Contains(t, lines[2], "from cache")
	require.Contains(t, lines[0], "layer 2/2 "+img.Layers[0].Digest.String())
	require.Contains(t, lines[0], "not lazy")
	require.Contains(t, lines[1], "indexed")
}

func TestSpanSize(t *testing.T) {
	for value, want := range map[string]struct{ interval, span inflate.Out }{
		"1MiB":    {1 << 20, layer.DefaultSpanSize},
		"4m":      {4 << 20, layer.DefaultSpanSize},
		"100000":  {100_000, 99_968},
		"32KiB":   {32 << 10, 32 << 10},
		"300 KiB": {300 << 10, layer.DefaultSpanSize},
	} {
		o := indexingFlags{spanSize: value, cacheDir: t.TempDir()}
		got, err := o.indexing(t.Context())
		require.NoError(t, err, value)
		require.Equal(t, want.interval, got.Layer.PointInterval, value)
		require.Equal(t, want.span, got.Layer.SpanSize, value)
	}
	for _, value := range []string{"", "x", "-1", "0", "31KiB"} {
		_, err := indexingFlags{spanSize: value, cacheDir: t.TempDir()}.indexing(t.Context())
		require.ErrorContains(t, err, "512KiB", value)
	}
}

// TestCache indexes one image again and again.
func TestCache(t *testing.T) {
	dir, _ := layout(t)
	cache := filepath.Join(t.TempDir(), "cache")
	output := filepath.Join(t.TempDir(), "a.clip")
	var first []byte
	for _, c := range []struct {
		args   []string
		cached bool
	}{
		{nil, false}, {nil, true}, {[]string{"--force"}, false}, {[]string{"--span-size", "64KiB"}, false}, {nil, true},
	} {
		_, said, err := runBoth(t, append([]string{"index", "oci:" + dir, "-o", output, "--storage-ref", "example.com/app:1", "--cache-dir", cache}, c.args...)...)
		require.NoError(t, err)
		require.Equal(t, c.cached, strings.Contains(said, "from cache"), said)
		b, err := os.ReadFile(output)
		require.NoError(t, err)
		if first == nil {
			first = b
		}
		require.Equal(t, len(c.args) < 2, bytes.Equal(first, b), "%v", c.args)
	}
	_, err := run(t, "index", "oci:"+dir, "-o", output, "--storage-ref", "example.com/app:1", "--cache-dir", output)
	require.ErrorContains(t, err, "layer-index cache")
}

func TestExport(t *testing.T) {
	dir, img := layout(t)
	for _, target := range []string{filepath.Join(t.TempDir(), "layout"), filepath.Join(t.TempDir(), "image.tar")} {
		out, err := run(t, "export", "oci:"+dir, target, "--name", "example.com/app:1")
		require.NoError(t, err)
		require.Contains(t, out, img.Descriptor.Digest.String())
		require.Contains(t, out, "3 blobs")
		kind := "oci:"
		if isTar(target) {
			kind = "oci-archive:"
		}
		_, err = run(t, "index", kind+target+":1", "-o", filepath.Join(t.TempDir(), "a.clip"))
		require.NoError(t, err, "it has the name that it was given")
	}
	_, err := run(t, "export", "oci:"+dir, dir+"/index.json")
	require.Error(t, err)
	require.True(t, isTar("a.tar"))
	require.False(t, isTar("a"))
	tarDirectory := filepath.Join(t.TempDir(), "a.tar")
	require.NoError(t, os.Mkdir(tarDirectory, 0o755))
	require.False(t, isTar(tarDirectory))
	_, err = run(t, "content", "ensure", "example.com/app:1", "--address", filepath.Join(t.TempDir(), "s"))
	require.ErrorContains(t, err, "is containerd running?")
}

func TestDownload(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/a.clip" {
			http.NotFound(w, r)
			return
		}
		_, err := w.Write([]byte("archive"))
		require.NoError(t, err)
	}))
	t.Cleanup(server.Close)
	t.Setenv("TMPDIR", t.TempDir())
	file, err := download(t.Context(), server.URL+"/a.clip")
	require.NoError(t, err)
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "archive", string(b))
	_, err = run(t, "load", server.URL+"/b.clip")
	require.ErrorContains(t, err, "404")
	missing := filepath.Join(t.TempDir(), "s")
	_, err = run(t, "load", server.URL+"/a.clip", "--address", missing)
	require.ErrorContains(t, err, missing)
	require.NoError(t, os.Remove(file))
	entries, err := os.ReadDir(os.Getenv("TMPDIR"))
	require.NoError(t, err)
	require.Empty(t, entries, "nothing is left behind")
}

// TestEngine has upstream CLIP index a layout.
func TestEngine(t *testing.T) {
	dir, img := layout(t)
	output := filepath.Join(t.TempDir(), "a.clip")
	args := []string{"index", "oci:" + dir, "-o", output, "--storage-ref", "example.com/app:1"}
	stdout, said, err := runBoth(t, append(args, "--engine", "clip")...)
	require.NoError(t, err)
	require.Contains(t, stdout, output)
	require.Contains(t, said, "layer 1/1 "+img.Layers[0].Digest.String())
	_, err = archive.OpenFile(output)
	require.ErrorIs(t, err, archive.ErrNoSections)
	inspected, err := run(t, "inspect", output)
	require.NoError(t, err)
	require.Contains(t, inspected, `"kind": "oci"`)
	require.Contains(t, inspected, `"storageRef": "example.com/app:1"`)

	for _, publish := range []string{"--push", "--to=file://" + t.TempDir()} {
		_, err = run(t, append(args, "--engine", "clip", publish)...)
		require.ErrorContains(t, err, "need layer indexes")
	}
	_, err = run(t, append(args, "--engine", "best")...)
	require.ErrorContains(t, err, "must be span or clip")
	_, err = run(t, append(args, "--engine", "span")...)
	require.NoError(t, err)
	listed, err := run(t, "ls", output, "/f")
	require.NoError(t, err)
	require.Contains(t, listed, "/f\n")
}

// TestCancelLeavesNothing ends the command at many moments: what is there then
// is whole, and there is nothing else.
func TestCancelLeavesNothing(t *testing.T) {
	noise := make([]byte, 4<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise) // it never fails
	var tars [][]byte
	for i := range 4 {
		tars = append(tars, testutil.Tar(t, testutil.File{Name: fmt.Sprint(i), Data: string(noise)}))
	}
	dir := writeLayout(t, testutil.NewImage(t, tars...))
	cancelled := 0
	for i := range 30 {
		scratch, cache, out := t.TempDir(), t.TempDir(), t.TempDir()
		t.Setenv("TMPDIR", scratch)
		cmd := New()
		cmd.SetOut(io.Discard)
		cmd.SetErr(io.Discard)
		cmd.SetArgs([]string{"index", "oci:" + dir, "-o", filepath.Join(out, "a.clip"), "--storage-ref", "example.com/app:1", "--cache-dir", cache})
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i*i/2)*time.Millisecond)
		err := cmd.ExecuteContext(ctx)
		cancel()
		require.Empty(t, names(t, scratch))
		if err != nil {
			cancelled++
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Empty(t, names(t, out))
		} else {
			require.Equal(t, []string{"a.clip"}, names(t, out))
		}
		for _, name := range names(t, cache) {
			require.True(t, strings.HasPrefix(name, "sha256-"), name)
		}
	}
	require.Greater(t, cancelled, 3)
}

// names lists a directory.
func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func TestPrefetchList(t *testing.T) {
	diffIDs := []digest.Digest{digest.FromString("low"), digest.FromString("high")}
	img := &archive.Image{Layers: []archive.Layer{
		{Index: &layer.Index{SpanSize: 1000, OutSize: 2500}}, {Index: &layer.Index{SpanSize: 100, OutSize: 1 << 20}},
	}}
	doc := record.Document{Layers: diffIDs, Began: time.Unix(5, 7), Touches: []record.Touch{
		{Layer: 1, Off: 250, Len: 100}, {Layer: 1, Off: 400, Len: 1}, {Layer: 0, Off: 2000, Len: 16384}, {Layer: 1, Off: 0, Len: 600}, {Layer: 0, Off: 0, Len: 1},
	}}
	require.NoError(t, checkRecording(doc, diffIDs, img))
	require.Equal(t, &archive.Prefetch{Recorded: time.Unix(5, 0), Spans: []archive.SpanRange{
		{Layer: 1, First: 2, Count: 3}, {Layer: 0, First: 2, Count: 1}, {Layer: 1, First: 0, Count: 2}, {Layer: 1, First: 5, Count: 1}, {Layer: 0, First: 0, Count: 1},
	}}, prefetchList(doc, img))

	for want, spoil := range map[string]func(*record.Document){
		"other layers":       func(d *record.Document) { d.Layers = diffIDs[:1] },
		"nothing":            func(d *record.Document) { d.Touches = nil },
		"layer 2":            func(d *record.Document) { d.Touches = []record.Touch{{Layer: 2, Len: 1}} },
		"layer -1":           func(d *record.Document) { d.Touches = []record.Touch{{Layer: -1, Len: 1}} },
		"cannot be read laz": func(d *record.Document) { d.Touches = []record.Touch{{Layer: 1, Off: -1, Len: 1}} },
	} {
		bad := doc
		spoil(&bad)
		require.ErrorContains(t, checkRecording(bad, diffIDs, img), want)
	}
}
