package images

import (
	"math/rand/v2"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// PythonName is the image in the layout that Python makes.
const PythonName = "example.com/python/packages:1"

// PythonPackages is where the image that Python makes has its packages.
const PythonPackages = "usr/lib/python3/dist-packages/"

// Python makes an image in dir, without an interpreter, with a package that imports two modules of its own, which lie far
// from each other in the layer.
func Python(dir string) (*Layout, error) {
	return onBusybox(dir, PythonName, func(t *tarball) {
		apart(t, 0o644, []namedFile{
			{PythonPackages + "pkg/__init__.py", "from . import a\nimport pkg.b\n"},
			{PythonPackages + "pkg/a.py", "name = 'a'\n"},
			{PythonPackages + "pkg/b.py", "name = 'b'\n"},
			{PythonPackages + "pkg/nobody.py", "name = 'nobody'\n"},
		})
	})
}

// onBusybox makes an image in dir of a shell and a layer on top of it.
func onBusybox(dir, name string, write func(*tarball)) (*Layout, error) {
	shell, err := os.ReadFile(busybox)
	if err != nil {
		return nil, err
	}
	l, err := NewLayout(dir)
	if err != nil {
		return nil, err
	}
	m := maker{layout: l}
	layers := []Layer{m.layer(l.AddLayer, func(t *tarball) { writeBusybox(t, string(shell)) }), m.layer(l.AddLayer, write)}
	m.image(name, ocispec.ImageConfig{Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}, WorkingDir: "/"}, layers...)
	if m.err != nil {
		return nil, m.err
	}
	return l, l.Finish()
}

// namedFile is a file of a layer.
type namedFile struct{ name, body string }

// noiseBetween is how much lies between two files that lie apart, in bytes.
const noiseBetween = 6 << 20

// apart writes files that lie far from each other.
func apart(t *tarball, mode int64, files []namedFile) {
	random := rand.NewChaCha8([32]byte{'a', 'p', 'a', 'r', 't'})
	noise := make([]byte, noiseBetween)
	for _, f := range files {
		t.file(f.name, mode, f.body)
		_, _ = random.Read(noise) // it never fails
		t.file(f.name+".data", 0o644, string(noise))
	}
}
