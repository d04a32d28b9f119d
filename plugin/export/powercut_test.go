package export

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
)

// disk is a file system that knows what a power cut would take away: data of files and names in directories that
// nobody brought to the disk.
type disk struct {
	fuse.RawFileSystem

	mu      sync.Mutex                 // guards the fields below
	inodes  map[uint64]uint64          // of nodes
	data    map[uint64]bool            // of inodes
	names   map[uint64]map[string]bool // by directory
	indexed []map[string]bool          // what was not on the disk whenever an index.json came
	early   bool                       // a file was given the name that it is looked for by before its data was on the disk
}

// newDisk mounts a disk and returns where.
func newDisk(t *testing.T) (*disk, string) {
	t.Helper()
	need.Root(t)
	root, err := fs.NewLoopbackRoot(t.TempDir())
	require.NoError(t, err)
	d := &disk{RawFileSystem: fs.NewNodeFS(root, &fs.Options{}), inodes: map[uint64]uint64{}, data: map[uint64]bool{}, names: map[uint64]map[string]bool{}}
	dir := t.TempDir()
	server, err := fuse.NewServer(d, dir, &fuse.MountOptions{DirectMount: true, DisableReadDirPlus: true, DisabledCapabilities: fuse.CAP_PASSTHROUGH, Name: "disk"})
	require.NoError(t, err)
	go server.Serve()
	t.Cleanup(func() { require.NoError(t, server.Unmount()) })
	require.NoError(t, server.WaitMount())
	return d, dir
}

// lost is what a power cut would take away now, but for files that nobody looks for.
func (d *disk) lost() map[string]bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.lostLocked()
}

func (d *disk) lostLocked() map[string]bool {
	lost := map[string]bool{}
	for inode := range d.data {
		lost[fmt.Sprintf("data of inode %d", inode)] = true
	}
	for _, names := range d.names {
		for name := range names {
			if !isTemporary(name) {
				lost["name "+name] = true
			}
		}
	}
	return lost
}

// cuts returns what a power cut would have taken away whenever an index.json came since the last call.
func (d *disk) cuts() (lost []map[string]bool, early bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	lost, d.indexed = d.indexed, nil
	return lost, d.early
}

// changed notes names that changed in a directory, if status is that they did.
func (d *disk) changed(status fuse.Status, dir uint64, names ...string) fuse.Status {
	if !status.Ok() {
		return status
	}
	for _, name := range names {
		if d.names[dir] == nil {
			d.names[dir] = map[string]bool{}
		}
		d.names[dir][name] = true
	}
	return status
}

func (d *disk) Lookup(cancel <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	status := d.RawFileSystem.Lookup(cancel, in, name, out)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.inodes[out.NodeId] = out.Ino
	return status
}

func (d *disk) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	status := d.RawFileSystem.Mkdir(cancel, in, name, out)
	d.inodes[out.NodeId] = out.Ino
	return d.changed(status, d.inodes[in.NodeId], name)
}

func (d *disk) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	status := d.RawFileSystem.Create(cancel, in, name, out)
	d.inodes[out.NodeId] = out.Ino
	return d.changed(status, d.inodes[in.NodeId], name)
}

func (d *disk) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed(d.RawFileSystem.Link(cancel, in, name, out), d.inodes[in.NodeId], name)
}

func (d *disk) Unlink(cancel <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed(d.RawFileSystem.Unlink(cancel, in, name), d.inodes[in.NodeId], name)
}

func (d *disk) Rename(cancel <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.early = d.early || !isTemporary(to) && len(d.data) > 0
	if to == ocispec.ImageIndexFile {
		d.indexed = append(d.indexed, d.lostLocked())
	}
	status := d.changed(d.RawFileSystem.Rename(cancel, in, from, to), d.inodes[in.NodeId], from)
	return d.changed(status, d.inodes[in.Newdir], to)
}

func (d *disk) Write(cancel <-chan struct{}, in *fuse.WriteIn, b []byte) (uint32, fuse.Status) {
	d.written(in.NodeId)
	return d.RawFileSystem.Write(cancel, in, b)
}

func (d *disk) Writev(cancel <-chan struct{}, in *fuse.WriteIn, b [][]byte) (uint32, fuse.Status) {
	d.written(in.NodeId)
	return d.RawFileSystem.Writev(cancel, in, b)
}

func (d *disk) written(node uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.data[d.inodes[node]] = true
}

func (d *disk) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.data, d.inodes[in.NodeId])
	return d.RawFileSystem.Fsync(cancel, in)
}

func (d *disk) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.names, d.inodes[in.NodeId])
	return d.RawFileSystem.FsyncDir(cancel, in)
}

// TestPowerCut exports to a disk that could lose power at any moment: what an index.json names is there before it, and
// all is when the export has returned.
func TestPowerCut(t *testing.T) {
	one, two := simple(t, "one"), simple(t, "two")
	d, root := newDisk(t)
	write := func(what string, s *Source, dir string) Written {
		w, err := WriteLayout(t.Context(), s, dir, WriteOptions{Platforms: ThisPlatform})
		require.NoError(t, err, what)
		cuts, _ := d.cuts()
		require.Len(t, cuts, 1, what)
		require.Empty(t, slices.Collect(maps.Keys(cuts[0])), "%s: lost by a power cut behind the new index.json", what)
		require.Empty(t, slices.Collect(maps.Keys(d.lost())), "%s: lost by a power cut behind the export", what)
		requireValid(t, dir)
		return w
	}
	dir := filepath.Join(root, "new", "layout")
	w := write("copies in a new directory", named(one, "example.com/app:1"), dir)
	require.Zero(t, w.Shared+w.Had)
	write("copies in a layout", named(two, "example.com/app:2"), dir)
	_, early := d.cuts()
	require.False(t, early, "an export that goes on takes what has a name for whole")

	// Of what others wrote only the names are on the disk, or not even these.
	store := filepath.Join(root, "store")
	one.Blobs.Write(t, store)
	for _, path := range []string{filepath.Dir(blobPath(store, one.Descriptor.Digest)), filepath.Join(store, "blobs"), store, root} {
		require.NoError(t, syncPath(path))
	}
	require.Len(t, d.lost(), 3)
	linked := named(one, "example.com/app:1")
	linked.Provider = layoutProvider(store)
	w = write("links", linked, filepath.Join(root, "links"))
	require.Equal(t, 3, w.Shared)

	there := filepath.Join(root, "there")
	one.Blobs.Write(t, there)
	require.NoError(t, syncPath(root))
	require.Len(t, d.lost(), 3+3+2, "data of blobs, their names, and those of directories")
	w = write("blobs that were there", named(one, "example.com/app:1"), there)
	require.Equal(t, 3, w.Had)
}
