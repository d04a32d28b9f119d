package snapshotter

import (
	"bytes"
	"context"
	"fmt"
	"path"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/imports"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/snapshotter/modules"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
)

// importer is a layer of programs, each of which imports a module of its own.
type importer struct {
	data  []byte
	index *layer.Index
	list  imports.List
	root  *tree.Node
}

func newImporter(t *testing.T, name string, programs int) *importer {
	t.Helper()
	pad := strings.Repeat("\n", 8<<10)
	var files []testutil.File
	for i := range programs {
		files = append(files,
			testutil.File{Name: fmt.Sprintf("%s/main%d.py", name, i), Data: fmt.Sprintf("import mod%d", i) + pad},
			testutil.File{Name: fmt.Sprintf("%s/mod%d.py", name, i), Data: pad})
	}
	l := &importer{data: testutil.Tar(t, files...)}
	var err error
	l.index, err = layer.Build(t.Context(), bytes.NewReader(l.data), ocispec.Descriptor{Digest: digest.FromBytes(l.data), Size: int64(len(l.data))}, layer.Options{})
	require.NoError(t, err)
	l.list, err = imports.Open(l.index.Imports)
	require.NoError(t, err)
	l.root, err = tree.Merge([]*layer.Index{l.index})
	require.NoError(t, err)
	return l
}

func (l *importer) modules() *modules.Modules {
	return modules.New(l.root, []*layer.Index{l.index}, []imports.List{l.list})
}

func (l *importer) off(name string) int64 { return int64(l.root.Lookup(name).Off) }

// watching is an importWatch, what it told, and the layers that it watches.
type watching struct {
	*testing.T
	*importWatch

	mu   sync.Mutex // guards told
	told []string   // names of files, of the layers by diff ID
	of   map[digest.Digest]*importer
}

func watch(t *testing.T, layers ...*importer) *watching {
	w := &watching{T: t, of: map[digest.Digest]*importer{}}
	for _, l := range layers {
		w.of[l.index.DiffID] = l
	}
	w.importWatch = newImportWatch(func(diffIDs []digest.Digest, files []modules.File) {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, f := range files {
			l := w.of[diffIDs[f.Layer]]
			for _, e := range l.index.Entries {
				if int64(e.Off) == f.Off {
					w.told = append(w.told, path.Base(e.Name))
				}
			}
		}
	})
	return w
}

// image has an image of one layer watched.
func (w *watching) image(id string, l *importer) {
	w.importWatch.found(w.add(id, []digest.Digest{l.index.DiffID}), l.modules())
}

func (w *watching) layer(l *importer) record.Stream {
	return w.stream(l.index.DiffID, testutil.Stream{Reader: bytes.NewReader(l.data)})
}

// requireTold waits for what was read to be looked at.
func (w *watching) requireTold(names ...string) {
	w.Helper()
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	require.Equal(w, names, w.told)
	w.told = nil
}

func (w *watching) ids() (ids []string) {
	w.importWatch.mu.Lock()
	defer w.importWatch.mu.Unlock()
	for _, r := range w.roots {
		ids = append(ids, r.id)
	}
	require.EqualValues(w, len(ids), w.open.Load())
	return ids
}

// readAt reads n bytes, which are those of the layer.
func readAt(t *testing.T, l *importer, s record.Stream, off int64, n int) {
	t.Helper()
	p := make([]byte, n)
	_, err := s.ReadAt(context.Background(), p, off)
	require.NoError(t, err)
	require.Equal(t, l.data[off:off+int64(n)], p)
}

func TestImportsOfReads(t *testing.T) {
	l := newImporter(t, "app", 4)
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, l)
		defer w.close()
		w.image("a", l)
		s := w.layer(l)
		require.Equal(t, int64(len(l.data)), s.Size())
		readAt(t, l, s, 0, 600)
		w.requireTold("mod0.py")
		readAt(t, l, s, l.off("/app/main0.py"), 10)
		w.requireTold()

		off := l.off("/app/main1.py")
		readAt(t, l, s, off-4096, 4096)
		w.requireTold()
		readAt(t, l, s, off, 10) // the kernel reads ahead
		w.requireTold()
		readAt(t, l, s, off, 10)
		w.requireTold("mod1.py")

		readAt(t, l, w.layer(l), l.off("/app/main2.py"), 10)
		w.requireTold("mod2.py")
		w.image("b", l)
		readAt(t, l, s, l.off("/app/main2.py"), 10)
		w.requireTold("mod2.py")
		readAt(t, l, s, l.off("/app/main3.py"), 10)
		w.requireTold("mod3.py", "mod3.py")
	})
}

// TestImportsOfLayers has two images with one layer in common.
func TestImportsOfLayers(t *testing.T) {
	base, top := newImporter(t, "base", 1), newImporter(t, "top", 1)
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, base, top)
		defer w.close()
		w.image("base", base)
		root, err := tree.Merge([]*layer.Index{base.index, top.index})
		require.NoError(t, err)
		both := modules.New(root, []*layer.Index{base.index, top.index}, []imports.List{base.list, top.list})
		w.importWatch.found(w.add("both", []digest.Digest{base.index.DiffID, top.index.DiffID}), both)
		readAt(t, top, w.layer(top), top.off("/top/main0.py"), 1)
		w.requireTold("mod0.py")
		readAt(t, base, w.layer(base), base.off("/base/main0.py"), 1)
		w.requireTold("mod0.py", "mod0.py")
	})
}

func TestImportsEnd(t *testing.T) {
	l := newImporter(t, "app", 4)
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, l)
		defer w.close()
		s := w.layer(l)
		w.image("dropped", l)
		w.drop("dropped")
		w.drop("nobody")
		w.mounted("nobody")
		require.Empty(t, w.ids())
		readAt(t, l, s, l.off("/app/main0.py"), 10)
		w.requireTold()

		w.image("waiting", l)
		w.image("mounted", l)
		w.mounted("mounted")
		time.Sleep(importsPeriod - time.Second)
		readAt(t, l, s, l.off("/app/main0.py"), 10)
		w.requireTold("mod0.py", "mod0.py")
		time.Sleep(2 * time.Second)
		require.Equal(t, []string{"waiting"}, w.ids())
		readAt(t, l, s, l.off("/app/main1.py"), 10)
		w.requireTold("mod1.py")
		time.Sleep(importsWait - importsPeriod - 2*time.Second)
		w.mounted("waiting")
		time.Sleep(importsPeriod - time.Second)
		require.Equal(t, []string{"waiting"}, w.ids())
		time.Sleep(2 * time.Second)
		require.Empty(t, w.ids())

		w.image("never mounted", l)
		time.Sleep(importsWait + time.Second)
		require.Empty(t, w.ids())
	})
}

// TestImportsFoundLate has containers begin and images removed before it is known
// which modules there are.
func TestImportsFoundLate(t *testing.T) {
	l := newImporter(t, "app", 2)
	layers := []digest.Digest{l.index.DiffID}
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, l)
		defer w.close()
		s := w.layer(l)
		r := w.add("removed", layers)
		w.drop("removed")
		w.importWatch.found(r, l.modules())
		require.Empty(t, w.ids())

		r = w.add("late", layers)
		w.mounted("late")
		readAt(t, l, s, l.off("/app/main0.py"), 10)
		w.requireTold()
		w.importWatch.found(r, l.modules())
		readAt(t, l, s, l.off("/app/main1.py"), 10)
		w.requireTold("mod1.py")
		time.Sleep(importsPeriod + time.Second)
		require.Empty(t, w.ids())

		r = w.add("without modules", layers)
		w.importWatch.found(r, modules.New(&tree.Node{}, nil, nil))
		require.Empty(t, w.ids())
	})
}

// TestImportsMost watches the images that came last.
func TestImportsMost(t *testing.T) {
	l := newImporter(t, "app", 1)
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, l)
		defer w.close()
		for i := range importsMost + 2 {
			w.image(fmt.Sprint(i), l)
		}
		ids := w.ids()
		require.Len(t, ids, importsMost)
		require.Equal(t, "2", ids[0])
		time.Sleep(importsWait + time.Second)
		require.Empty(t, w.ids())
	})
}

// TestImportsReader forgets an image that somebody reads through.
func TestImportsReader(t *testing.T) {
	l := newImporter(t, "app", 200)
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, l)
		defer w.close()
		w.image("a", l)
		s := w.layer(l)
		for i := range 200 {
			readAt(t, l, s, l.off(fmt.Sprintf("/app/main%d.py", i)), 10)
			synctest.Wait()
		}
		require.Empty(t, w.ids())
		w.mu.Lock()
		defer w.mu.Unlock()
		require.NotEmpty(t, w.told)
		require.Less(t, len(w.told), 200)
	})
}

// TestImportsClosed reads on when nobody looks any more. Goroutines and timers that
// are left would not let the bubble end.
func TestImportsClosed(t *testing.T) {
	l := newImporter(t, "app", 1)
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, l)
		w.image("a", l)
		s := w.layer(l)
		late := w.add("b", []digest.Digest{l.index.DiffID})
		w.close()
		require.Empty(t, w.ids())
		w.importWatch.found(late, l.modules())
		for range 2 * readsWaiting {
			readAt(t, l, s, l.off("/app/main0.py"), 10)
		}
		time.Sleep(time.Hour)
		w.requireTold()
	})
}

// TestImportsCloseWaits ends no earlier than what is being told.
func TestImportsCloseWaits(t *testing.T) {
	l := newImporter(t, "app", 1)
	synctest.Test(t, func(t *testing.T) {
		telling, ended := make(chan struct{}), false
		w := newImportWatch(func([]digest.Digest, []modules.File) {
			close(telling)
			time.Sleep(time.Second)
			ended = true
		})
		w.found(w.add("a", []digest.Digest{l.index.DiffID}), l.modules())
		readAt(t, l, w.stream(l.index.DiffID, testutil.Stream{Reader: bytes.NewReader(l.data)}), l.off("/app/main0.py"), 10)
		<-telling
		w.close()
		require.True(t, ended)
	})
}

// TestImportsNotWaitedFor has readers not wait for who looks at their reads.
func TestImportsNotWaitedFor(t *testing.T) {
	l := newImporter(t, "app", 2)
	synctest.Test(t, func(t *testing.T) {
		begun, goOn := make(chan struct{}), make(chan struct{})
		told := 0
		w := newImportWatch(func([]digest.Digest, []modules.File) {
			if told++; told == 1 {
				close(begun)
				<-goOn
			}
		})
		w.found(w.add("a", []digest.Digest{l.index.DiffID}), l.modules())
		s := w.stream(l.index.DiffID, testutil.Stream{Reader: bytes.NewReader(l.data)})
		readAt(t, l, s, l.off("/app/main0.py"), 10)
		<-begun
		for range readsWaiting {
			readAt(t, l, s, l.off("/app/mod0.py"), 10)
		}
		readAt(t, l, s, l.off("/app/main1.py"), 10) // one too many
		close(goOn)
		synctest.Wait()
		require.Equal(t, 1, told)
		readAt(t, l, s, l.off("/app/main1.py"), 10)
		synctest.Wait()
		require.Equal(t, 2, told)
		w.close()
	})
}
