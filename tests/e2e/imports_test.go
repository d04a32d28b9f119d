package e2e

import (
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// importsWorld has an indexed image that fill makes. It returns the index of the image's second layer, too.
func importsWorld(t *testing.T, name string, fill func(dir string) (*images.Layout, error)) (*world, *layer.Index) {
	w := emptyWorld(t, "[fill]\nmode = 'off'\n")
	layout, err := fill(w.lab.Path("layout"))
	require.NoError(t, err)
	file := w.lab.Path("image.tar")
	require.NoError(t, layout.WriteTar(file))
	w.ctr(w.builder, "image", "import", "--no-unpack", file)
	w.publish(name)
	w.index(name, "-o", w.lab.Path("image.clip"))
	a, err := archive.OpenFile(w.lab.Path("image.clip"))
	require.NoError(t, err)
	defer a.Close()
	x, err := a.Layer(1)
	require.NoError(t, err)
	return w, x
}

// asked says whether the registry was asked for a file of a layer.
func (w *world) asked(x *layer.Index, name string) bool {
	w.Helper()
	i := slices.IndexFunc(x.Entries, func(e layer.Entry) bool { return e.Name == name })
	require.GreaterOrEqual(w, i, 0, name)
	last := int64(x.Spans[x.SpanAt(x.Entries[i].Off)].InEnd) - 1
	for _, r := range w.registry.Requests().Gets(x.Digest.String()) {
		var from, to int64
		n, err := fmt.Sscanf(r.Range, "bytes=%d-%d", &from, &to)
		require.True(w, n == 2 && err == nil, "the layer is fetched in ranges: %v", r)
		if from <= last && last <= to {
			return true
		}
	}
	return false
}

// TestImportedModules reads a package as an interpreter does, and finds that the modules that it imports come by
// themselves; on a worker that is not to fetch ahead they do not.
func TestImportedModules(t *testing.T) {
	t.Parallel()
	w, x := importsWorld(t, images.PythonName, images.Python)
	ref := w.ref(images.PythonName)
	const in = images.PythonPackages + "pkg/"
	const path = "/" + in
	const source = "from . import a\nimport pkg.b\n"

	w.pull(w.worker, lazy, ref)
	require.False(t, w.asked(x, in+"__init__.py"), "a pull fetches nothing of a layer")
	require.Equal(t, source, w.run(w.worker, lazy, ref, "cat", path+"__init__.py"))
	w.eventually("what is imported is fetched", func() bool { return w.asked(x, in+"a.py") && w.asked(x, in+"b.py") })
	require.False(t, w.asked(x, in+"nobody.py"))

	_, worker := w.workerWith("[fill]\nmode = 'off'\nprefetch = false\n")
	w.pull(worker, lazy, ref)
	require.Equal(t, source, w.run(worker, lazy, ref, "cat", path+"__init__.py"))
	require.Equal(t, "name = 'nobody'\n", w.run(worker, lazy, ref, "cat", path+"nobody.py"), "in the meantime more would have come")
	require.True(t, w.asked(x, in+"__init__.py"))
	require.True(t, w.asked(x, in+"nobody.py"))
	require.False(t, w.asked(x, in+"a.py"))
	require.False(t, w.asked(x, in+"b.py"))
}

// TestNeededLibraries reads the first byte of a program, and finds that a library that it needs comes by itself; on a
// worker that is not to fetch ahead it does not.
func TestNeededLibraries(t *testing.T) {
	t.Parallel()
	w, x := importsWorld(t, images.ProgramName, images.Program)
	ref := w.ref(images.ProgramName)
	command := []string{"/bin/busybox", "head", "-c", "4", "/" + images.ProgramPath}

	w.pull(w.worker, lazy, ref)
	require.False(t, w.asked(x, images.ProgramPath), "a pull fetches nothing of a layer")
	require.Equal(t, "\x7fELF", w.run(w.worker, lazy, ref, command...))
	w.eventually("what the program needs is fetched", func() bool { return w.asked(x, images.NeededPath) })
	require.False(t, w.asked(x, images.OtherLibrary))

	_, worker := w.workerWith("[fill]\nmode = 'off'\nprefetch = false\n")
	w.pull(worker, lazy, ref)
	require.Equal(t, "\x7fELF", w.run(worker, lazy, ref, command...))
	require.Equal(t, "\x7fELF", w.run(worker, lazy, ref, "/bin/busybox", "head", "-c", "4", "/"+images.OtherLibrary), "in the meantime more would have come")
	require.True(t, w.asked(x, images.ProgramPath))
	require.True(t, w.asked(x, images.OtherLibrary))
	require.False(t, w.asked(x, images.NeededPath))
}
