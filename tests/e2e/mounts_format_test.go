package e2e

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
	"github.com/beam-cloud/containerd-clip/tests/internal/rootdiff"
)

// TestIndependentReader reads the metadata image of a root with go-erofs, which shares no code with the writer, and
// compares it with what the kernel shows.
func TestIndependentReader(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	w.pull(w.worker, lazy, ref)
	want, err := rootdiff.Read(w.view(w.worker, lazy, ref)) // and so all of every layer is here
	require.NoError(t, err)
	image, layers := w.root(len(w.layers(images.SmallName)))
	got, err := readImage(image, layers)
	require.NoError(t, err)
	require.Empty(t, rootdiff.Diff(want, got, w.start))
	require.Greater(t, len(got), 3000)
}

// root finds the metadata image of the lazy root with a number of layers, and its layers.
func (w *world) root(layers int) (image string, files []string) {
	w.Helper()
	chains, err := filepath.Glob(filepath.Join(w.daemon.Root, "snapshots", "*", "chain"))
	require.NoError(w, err)
	for _, path := range chains {
		text, err := os.ReadFile(path)
		require.NoError(w, err)
		var chain struct{ Layers []string }
		require.NoError(w, json.Unmarshal(text, &chain))
		if len(chain.Layers) != layers {
			continue
		}
		for _, id := range chain.Layers {
			files = append(files, filepath.Join(w.daemon.Root, "layers", strings.TrimPrefix(id, "sha256:"), "data"))
		}
		return filepath.Join(w.daemon.Root, "roots", filepath.Base(filepath.Dir(path)), "image"), files
	}
	require.Fail(w, "no chain of that length")
	return "", nil
}

// readImage reads the container's root in a metadata image.
func readImage(image string, layers []string) (rootdiff.Tree, error) {
	var devices []io.ReaderAt
	for _, path := range append([]string{image}, layers...) {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		devices = append(devices, f)
	}
	fsys, err := goerofs.Open(devices[0], goerofs.WithExtraDevices(devices[1:]...))
	if err != nil {
		return nil, err
	}
	tree, peers := rootdiff.Tree{}, map[int64][]string{}
	err = fs.WalkDir(fsys, "fs", func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel("fs", path)
		if err != nil {
			return err
		}
		e, inode, err := readEntry(fsys, path)
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		if e.Nlink > 1 {
			peers[inode] = append(peers[inode], name)
		}
		tree[name] = e
		return nil
	})
	for _, names := range peers {
		for _, name := range names {
			e := tree[name]
			e.Peers = strings.Join(names, " ")
			tree[name] = e
		}
	}
	return tree, err
}

// readEntry reads one name of an image as package rootdiff reads one of a root.
func readEntry(fsys fs.FS, path string) (e rootdiff.Entry, inode int64, err error) {
	info, err := fs.Lstat(fsys, path)
	if err != nil {
		return e, 0, err
	}
	st := info.Sys().(*goerofs.Stat)
	e = rootdiff.Entry{
		Mode: unixMode(st.Mode), UID: st.UID, GID: st.GID, Size: st.Size, Rdev: uint64(st.Rdev), Nlink: uint64(st.Nlink),
		Mtime: unix.Timespec{Sec: int64(st.Mtime), Nsec: int64(st.MtimeNs)}, Xattrs: map[string]string{},
	}
	for name, value := range st.Xattrs {
		if strings.HasPrefix(name, "system.") {
			name = strings.TrimSuffix(name, ".") // go-erofs' spelling of the ACLs' names
		}
		e.Xattrs[name] = value
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		e.Size, e.Nlink = 0, 0
	case fs.ModeSymlink:
		e.Target, err = fs.ReadLink(fsys, path)
	case 0:
		var content []byte
		content, err = fs.ReadFile(fsys, path)
		e.SHA256 = sha256.Sum256(content)
	default:
		e.Size = 0
	}
	return e, st.Ino, err
}

// unixMode is a mode as stat(2) has it.
func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for _, bit := range []struct {
		of   fs.FileMode
		unix uint32
	}{
		{fs.ModeSetuid, unix.S_ISUID}, {fs.ModeSetgid, unix.S_ISGID}, {fs.ModeSticky, unix.S_ISVTX},
	} {
		if m&bit.of != 0 {
			mode |= bit.unix
		}
	}
	types := map[fs.FileMode]uint32{
		0: unix.S_IFREG, fs.ModeDir: unix.S_IFDIR, fs.ModeSymlink: unix.S_IFLNK, fs.ModeNamedPipe: unix.S_IFIFO,
		fs.ModeDevice: unix.S_IFBLK, fs.ModeDevice | fs.ModeCharDevice: unix.S_IFCHR,
	}
	return mode | types[m.Type()]
}
