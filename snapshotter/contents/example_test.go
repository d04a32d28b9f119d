package contents_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/google/go-containerregistry/pkg/crane"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/snapshotter/contents"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

// dataArchive makes an archive that holds a greeting.
func dataArchive(dir string) string {
	if err := clip.SetLogLevel("disabled"); err != nil {
		log.Fatal(err)
	}
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "hello.clip")
	if err := os.MkdirAll(filepath.Join(in, "etc"), 0o755); err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(in, "etc/motd"), []byte("Hello.\n"), 0o644); err != nil {
		log.Fatal(err)
	}
	if err := clip.CreateArchive(clip.CreateOptions{InputPath: in, OutputPath: out}); err != nil {
		log.Fatal(err)
	}
	return out
}

func tempDir() (string, func()) {
	dir, err := os.MkdirTemp("", "contents-")
	if err != nil {
		log.Fatal(err)
	}
	return dir, func() { os.RemoveAll(dir) }
}

// publish puts an image into a registry and makes its archive, as clipctl index
// does. All that a worker needs of this is the file, and to reach the registry.
func publish(dir, registry string) string {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, text := range map[string]string{"etc/motd": "Hello.\n", "etc/issue": "Debian\n"} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text))}); err != nil {
			log.Fatal(err)
		}
		fmt.Fprint(w, text)
	}
	w.Close()
	blob, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		log.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, blob)
	if err != nil {
		log.Fatal(err)
	}
	ref := registry + "/team/app:1"
	if err := crane.Push(img, ref); err != nil {
		log.Fatal(err)
	}
	rc, err := blob.Compressed()
	if err != nil {
		log.Fatal(err)
	}
	defer rc.Close()
	manifest, config := must(img.RawManifest()), must(img.RawConfigFile())
	index := must(layer.Build(context.Background(), rc, ocispec.Descriptor{
		Digest: digest.Digest(must(blob.Digest()).String()), Size: must(blob.Size()),
	}, layer.Options{}))
	path := filepath.Join(dir, "app.clip")
	must(archive.WriteFile(path, &archive.Image{
		StorageRef: ref,
		Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))},
		Manifest:   manifest, Config: config,
		Layers: []archive.Layer{{Index: index}},
	}))
	return path
}

func must[T any](v T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return v
}

// A worker that has nothing but the archive of an image lists and reads it, and
// mounts it. What is read comes from the registry, in ranges, and is verified.
func Example_worker() {
	dir, remove := tempDir()
	defer remove()
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	path := publish(dir, strings.TrimPrefix(server.URL, "http://"))

	client := remote.New(remote.Options{ConfigPath: []string{"/etc/containerd/certs.d"}})
	a, err := contents.Open(path, contents.Options{Fetch: client, CacheDir: filepath.Join(dir, "cache")})
	if err != nil {
		log.Fatal(err)
	}
	defer a.Close()
	err = a.List("/etc", func(f contents.File) error {
		fmt.Println(f.Path, f.Size)
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := a.Copy(context.Background(), os.Stdout, "/etc/motd"); err != nil {
		log.Fatal(err)
	}
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		log.Fatal(err)
	}
	unmount, err := a.Mount(context.Background(), mnt) // as root
	if err != nil {
		log.Fatal(err)
	}
	text, err := exec.Command("cat", filepath.Join(mnt, "etc/issue")).Output()
	if err != nil {
		log.Print(err)
	}
	fmt.Print(string(text))
	if err := unmount(); err != nil {
		log.Fatal(err)
	}
	// Output:
	// /etc 0
	// /etc/issue 7
	// /etc/motd 7
	// Hello.
	// Debian
}

// Any kind of archive is opened, listed and read the same way. One that has to
// ask a registry needs Options.Fetch.
func ExampleOpen() {
	dir, remove := tempDir()
	defer remove()
	a, err := contents.Open(dataArchive(dir), contents.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer a.Close()
	fmt.Println("kind:", a.Kind)
	err = a.List("/", func(f contents.File) error {
		fmt.Println(f.Path)
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := a.Copy(context.Background(), os.Stdout, "/etc/motd"); err != nil {
		log.Fatal(err)
	}
	// Output:
	// kind: data
	// /
	// /etc
	// /etc/motd
	// Hello.
}

// An archive is mounted without containerd. This needs /dev/fuse, and root or fusermount.
func ExampleArchive_Mount() {
	dir, remove := tempDir()
	defer remove()
	a, err := contents.Open(dataArchive(dir), contents.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer a.Close()
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		log.Fatal(err)
	}
	unmount, err := a.Mount(context.Background(), mnt)
	if err != nil {
		log.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(mnt, "etc/motd"))
	if err != nil {
		log.Print(err)
	}
	fmt.Print(string(text))
	if err := unmount(); err != nil {
		log.Fatal(err)
	}
	// Output:
	// Hello.
}
