package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// TestIndexBadInput gives clipctl what it cannot index: it says what is wrong, exits with an error, and leaves nothing
// where the archive would have been.
func TestIndexBadInput(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	layer := w.layers(images.SmallName)[0]
	broken := func(name string, breakIt func(blob string)) string {
		dir := w.lab.Path(name)
		require.NoError(t, os.CopyFS(dir, os.DirFS(w.layout.Dir)))
		breakIt(filepath.Join(dir, "blobs", strings.Replace(layer, ":", "/", 1)))
		return "oci:" + dir + ":busybox"
	}
	cut := w.lab.Path("cut.tar")
	require.NoError(t, copyPart(w.lab.Path("small.tar"), cut, 1<<20))
	small := "oci:" + w.layout.Dir + ":busybox"

	for _, c := range []struct {
		name, image, output string
		says                []string
	}{
		{"unknown image", "example.com/no/such:1", "x.clip", []string{"example.com/no/such:1", "not found"}},
		{"malformed name", "UPPER//case", "x.clip", []string{"UPPER//case"}},
		{"no layout", "oci:" + w.lab.Path("nowhere"), "x.clip", []string{w.lab.Path("nowhere")}},
		{"not a layout", "oci:" + w.lab.Path("registry"), "x.clip", []string{w.lab.Path("registry")}},
		{"no such tag", "oci:" + w.layout.Dir + ":missing", "x.clip", []string{"missing"}},
		{"ambiguous layout", "oci:" + w.layout.Dir, "x.clip", []string{"busybox", "sibling"}},
		{"no archive", "oci-archive:" + w.lab.Path("nowhere.tar"), "x.clip", []string{"nowhere.tar"}},
		{"truncated archive", "oci-archive:" + cut + ":busybox", "x.clip", []string{"cut.tar"}},
		{"missing layer", broken("without", func(b string) { require.NoError(t, os.Remove(b)) }), "x.clip", []string{layer}},
		{"truncated layer", broken("short", func(b string) { require.NoError(t, os.Truncate(b, 1<<20)) }), "x.clip", []string{layer}},
		{"altered layer", broken("altered", func(b string) { flip(t, b, 1<<20) }), "x.clip", []string{layer}},
		{"no such directory", small, "no/such/dir/x.clip", []string{"no/such/dir"}},
		{"output is a directory", small, "", []string{"is a directory"}},
		{"output below a file", small, "file/x.clip", []string{"file/x.clip"}},
		{"no such platform", small, "x.clip", []string{"linux/s390x"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("precious"), 0o600))
			args := []string{"index", c.image, "--storage-ref", w.ref(images.SmallName), "-o", filepath.Join(dir, c.output)}
			if c.name == "no such platform" {
				args = append(args, "--platform", "linux/s390x")
			}
			result, err := w.builder.Clipctl(w.ctx, args...)
			require.Error(t, err)
			require.Positive(t, result.Code)
			requireClear(t, result.Stderr, c.says...)
			require.Equal(t, map[string]string{"file": "precious"}, filesIn(t, dir), "nothing is half-written")
		})
	}
	require.Empty(t, w.registry.Requests().Gets(layer))
}

// TestIndexMissingBlobInStore is the store's side of it: containerd lost a layer.
func TestIndexMissingBlobInStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	layer := w.layers(images.SmallName)[1]
	require.NoError(t, os.Remove(w.builder.ContentPath(layer)))
	dir := t.TempDir()
	w.registry.Reset()
	result, err := w.builder.Clipctl(w.ctx, "index", w.ref(images.SmallName), "-o", filepath.Join(dir, "x.clip"))
	require.Error(t, err)
	requireClear(t, result.Stderr, layer)
	require.Empty(t, filesIn(t, dir))
	require.Empty(t, w.registry.Requests(), "what is missing is not fetched behind the user's back")
}

// TestIndexKeepsOldArchive fails over an archive that is there: it stays as it was.
func TestIndexKeepsOldArchive(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "x.clip")
	_, err := w.builder.Clipctl(w.ctx, "index", w.ref(images.SmallName), "-o", file)
	require.NoError(t, err)
	before := filesIn(t, filepath.Dir(file))
	require.NoError(t, os.Remove(w.builder.ContentPath(w.layers(images.SmallName)[0])))
	_, err = w.builder.Clipctl(w.ctx, "index", w.ref(images.SmallName), "-o", file)
	require.NoError(t, err, "the layer's index is in the cache, so the layer is not needed")
	_, err = w.builder.Clipctl(w.ctx, "index", "--force", w.ref(images.SmallName), "-o", file)
	require.Error(t, err)
	require.Equal(t, before, filesIn(t, filepath.Dir(file)))
}

// TestNoContainerd has clipctl talk to a socket that nobody listens on.
func TestNoContainerd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	socket := w.lab.Path("nobody.sock")
	began := time.Now()
	result, err := w.lab.Run(w.ctx, "clipctl", "-a", socket, "index", w.ref(images.SmallName), "-o", w.lab.Path("x.clip"))
	require.Error(t, err)
	require.Less(t, time.Since(began), time.Minute)
	requireClear(t, result.Stderr, socket)
	require.NoFileExists(t, w.lab.Path("x.clip"))
}

// TestPushRegistryDown pushes to a registry that refuses connections.
func TestPushRegistryDown(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	require.NoError(t, w.registry.SwitchOff())
	began := time.Now()
	result, err := w.builder.Clipctl(w.ctx, "index", w.ref(images.SmallName), "--push")
	require.Error(t, err)
	require.Positive(t, result.Code)
	require.Less(t, time.Since(began), time.Minute)
	requireClear(t, result.Stderr, w.registry.Host(), "connection refused")
	require.NoError(t, w.registry.SwitchOn())
	require.Empty(t, w.referrers(w.ref(images.SmallName), runtime.GOARCH))
	w.index(images.SmallName)
	require.Len(t, w.referrers(w.ref(images.SmallName), runtime.GOARCH), 1)
}

// TestWithoutArchive pulls what cannot be lazy: it is an ordinary image, and the daemon says why.
func TestWithoutArchive(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.requireOrdinary("no archive")
}

// TestBadLocalArchive has archives below the daemon's root that cannot be used.
func TestBadLocalArchive(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for name, damage := range map[string]func(file string) error{
		"empty":     func(file string) error { return os.Truncate(file, 0) },
		"truncated": func(file string) error { return os.Truncate(file, sizeOf(t, file)/2) },
		"cut-short": func(file string) error { return os.Truncate(file, sizeOf(t, file)-1) },
		"altered":   func(file string) error { flipEvery(t, file, 997); return nil },
		"random":    func(file string) error { return os.WriteFile(file, bytes.Repeat([]byte("clip"), 5000), 0o600) },
		"no-file":   func(file string) error { return errors.Join(os.Remove(file), os.Mkdir(file, 0o700)) },
	} {
		require.NoError(t, damage(w.placeArchive(images.SmallName, name+".clip")), name)
	}
	w.placeArchive(images.SiblingName, "other-image.clip")
	w.requireOrdinary("")
}

// TestBadReferrer has artifacts in the registry that say they are the image's archive and are not.
func TestBadReferrer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	good, other := w.lab.Path("good.clip"), w.lab.Path("other.clip")
	for file, name := range map[string]string{good: images.SmallName, other: images.SiblingName} {
		_, err := w.builder.Clipctl(w.ctx, "index", w.ref(name), "-o", file)
		require.NoError(t, err)
	}
	flipEvery(t, good, 997)
	w.attach(images.SmallName, good)
	w.attach(images.SmallName, other)
	w.attach(images.SmallName, filepath.Join(w.layout.Dir, "index.json"))
	w.requireOrdinary("")
}

// TestLayerGoneFromRegistry reads from layers that the registry lost or changed: an error in time, never a hang, never
// other bytes.
func TestLayerGoneFromRegistry(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(t *testing.T, blob string){
		"missing": func(t *testing.T, blob string) { require.NoError(t, os.Remove(blob)) },
		"short":   func(t *testing.T, blob string) { require.NoError(t, os.Truncate(blob, sizeOf(t, blob)/2)) },
		"altered": func(t *testing.T, blob string) { flipEvery(t, blob, 4001) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorldWith(t, faultConfig)
			ref := w.ref(images.SmallName)
			w.index(images.SmallName)
			blob := w.registry.BlobPath(w.layers(images.SmallName)[0])
			pristine, err := os.ReadFile(blob)
			require.NoError(t, err)
			w.pull(w.worker, lazy, ref)
			root := w.view(w.worker, lazy, ref)
			damage(t, blob)

			file := filepath.Join(root, "sizes/noise-3M+1")
			began := time.Now()
			_, err = os.ReadFile(file)
			require.Error(t, err)
			require.Less(t, time.Since(began), time.Minute)

			require.NoError(t, os.WriteFile(blob, pristine, 0o600))
			w.eventually("it reads again when the registry is right again", func() bool {
				_, err = os.ReadFile(file)
				return err == nil
			})
		})
	}
}

// TestRegistryDownWhileRunning switches the registry off below a running container: what was read stays readable, what
// was not is an error in time, and comes back with the registry.
func TestRegistryDownWhileRunning(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, faultConfig)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	w.pull(w.worker, lazy, ref)
	root := w.view(w.worker, lazy, ref)
	name, err := os.ReadFile(filepath.Join(root, "app/name"))
	require.NoError(t, err)
	require.NoError(t, w.registry.SwitchOff())

	again, err := os.ReadFile(filepath.Join(root, "app/name"))
	require.NoError(t, err)
	require.Equal(t, name, again)
	began := time.Now()
	_, err = os.ReadFile(filepath.Join(root, "sizes/noise-3M+1"))
	require.Error(t, err)
	require.Less(t, time.Since(began), time.Minute)

	require.NoError(t, w.registry.SwitchOn())
	w.eventually("it reads when the registry is back", func() bool {
		_, err = os.ReadFile(filepath.Join(root, "sizes/noise-3M+1"))
		return err == nil
	})
}

// requireOrdinary pulls and runs the small image as if there were no archive, and finds the reason in the daemon's log.
func (w *world) requireOrdinary(reason string) {
	w.Helper()
	ref, layers := w.ref(images.SmallName), w.layers(images.SmallName)
	requests := w.pull(w.worker, lazy, ref)
	for _, layer := range layers {
		require.NotEmpty(w, requests.Gets(layer), "layer %s was downloaded", layer)
	}
	require.Equal(w, "hello from clip\n", w.run(w.worker, lazy, ref, "sh", "/app/run.sh"))
	stock := w.stock()
	w.pull(stock, eager, ref)
	requireSameRoot(w, stock, ref)
	w.requireReason(ref, reason)
}

// attach pushes a file as if it were the archive of an image.
func (w *world) attach(image, file string) {
	w.Helper()
	content, err := os.ReadFile(file)
	require.NoError(w, err)
	ref, err := name.ParseReference(w.ref(image), name.Insecure)
	require.NoError(w, err)
	subject, err := remote.Head(ref)
	require.NoError(w, err)
	img := mutate.MediaType(mutate.ConfigMediaType(empty.Image, artifactType), types.OCIManifestSchema1)
	img, err = mutate.AppendLayers(img, static.NewLayer(content, "application/vnd.beam.clip.archive.v2"))
	require.NoError(w, err)
	img = mutate.Subject(img, *subject).(v1.Image)
	digest, err := img.Digest()
	require.NoError(w, err)
	require.NoError(w, remote.Write(ref.Context().Digest(digest.String()), img))
}

// requireClear checks that a message is for people: it names what is wrong, in a line, without a stack.
func requireClear(t *testing.T, message string, says ...string) {
	t.Helper()
	for _, what := range says {
		require.Contains(t, message, what)
	}
	require.NotContains(t, message, "goroutine ")
	require.NotContains(t, message, "panic")
	require.NotContains(t, message, "Usage:", "the command line was right")
}

// filesIn maps the files below dir to their content, or to its hash when it is long.
func filesIn(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if len(content) > 100 {
			sum := sha256.Sum256(content)
			content = sum[:]
		}
		name, _ := filepath.Rel(dir, path)
		files[name] = string(content)
		return err
	}))
	return files
}

func sizeOf(t *testing.T, file string) int64 {
	t.Helper()
	info, err := os.Stat(file)
	require.NoError(t, err)
	return info.Size()
}

// flip changes one byte of a file.
func flip(t *testing.T, file string, offset int64) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	b := make([]byte, 1)
	_, err = f.ReadAt(b, offset)
	require.NoError(t, err)
	b[0] ^= 0xff
	_, err = f.WriteAt(b, offset)
	require.NoError(t, err)
}

func flipEvery(t *testing.T, file string, step int64) {
	t.Helper()
	for offset := step; offset < sizeOf(t, file); offset += step {
		flip(t, file, offset)
	}
}

func copyPart(from, to string, n int64) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer out.Close()
	_, err = io.CopyN(out, in, n)
	return err
}
