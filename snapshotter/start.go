package snapshotter

import (
	"encoding/json"
	"path"
	"slices"
	"strings"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/tree"
	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
)

// Where distributions have what almost every process needs before its first
// instruction: the dynamic loader, the list of libraries that it looks into, the
// C library; and what containerd and runc look a user up in.
var commonFiles = []string{
	"/lib64/ld-linux-x86-64.so.2",
	"/lib/ld-linux-aarch64.so.1",
	"/lib/ld-musl-x86_64.so.1",
	"/lib/ld-musl-aarch64.so.1",
	"/etc/ld.so.cache",
	"/lib/x86_64-linux-gnu/libc.so.6",
	"/lib/aarch64-linux-gnu/libc.so.6",
	"/lib64/libc.so.6",
	"/etc/passwd",
	"/etc/group",
}

// mostOfFile is how large a file may be that is fetched because its name says
// that it is needed, in bytes. Of larger ones a start reads but a part.
const mostOfFile = 8 << 20

// mostDirs is how many directories of a PATH are looked into.
const mostDirs = 64

// startFiles returns the files that a start of an image reads whatever it runs,
// and the program that its config names, in the order in which they are read.
func startFiles(config []byte, root *tree.Node) []*tree.Node {
	var files []*tree.Node
	add := func(n *tree.Node) {
		if n != nil && n.Mode&unix.S_IFMT == unix.S_IFREG && n.Size <= mostOfFile && !slices.Contains(files, n) {
			files = append(files, n)
		}
	}
	for _, name := range commonFiles {
		add(root.Lookup(name))
	}
	add(program(config, root))
	return files
}

// program returns what the image's config says is to be run, or nil.
func program(config []byte, root *tree.Node) *tree.Node {
	var c ocispec.Image
	if err := json.Unmarshal(config, &c); err != nil {
		return nil
	}
	args := slices.Concat(c.Config.Entrypoint, c.Config.Cmd)
	if len(args) == 0 {
		return nil
	}
	switch {
	case path.IsAbs(args[0]):
		return root.Lookup(args[0])
	case strings.Contains(args[0], "/"):
		return root.Lookup(path.Join("/", c.Config.WorkingDir, args[0]))
	}
	i := slices.IndexFunc(c.Config.Env, func(env string) bool { return strings.HasPrefix(env, "PATH=") })
	if i < 0 {
		return nil
	}
	dirs := strings.SplitN(c.Config.Env[i][len("PATH="):], ":", mostDirs+1)
	for _, dir := range dirs[:min(len(dirs), mostDirs)] {
		if n := root.Lookup(path.Join("/", dir, args[0])); n != nil {
			return n
		}
	}
	return nil
}

// starts holds what the first containers of images will read, whatever they run,
// by the snapshots that they will stand on. The zero value is ready.
type starts struct {
	mu   sync.Mutex // guards byID
	byID map[string][]fill.Want
}

func (s *starts) set(id string, wants []fill.Want) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID == nil {
		s.byID = map[string][]fill.Want{}
	}
	s.byID[id] = wants
}

// take returns what was set for a snapshot, once.
func (s *starts) take(id string) []fill.Want {
	s.mu.Lock()
	defer s.mu.Unlock()
	wants := s.byID[id]
	delete(s.byID, id)
	return wants
}

// wantsOf returns where the files are, which are of the stack is.
func (s *Snapshotter) wantsOf(is *stack, files []*tree.Node) (wants []fill.Want) {
	for _, n := range files {
		l, err := s.layers.Layer(is.layers[n.Layer].DiffID)
		if err != nil {
			continue // it is damaged: who reads it will be told
		}
		for _, x := range n.Extents() {
			wants = append(wants, fill.Want{Layer: l, Spans: l.Cover(int64(x.Off), int64(x.Off)+x.Len)})
		}
	}
	return wants
}
