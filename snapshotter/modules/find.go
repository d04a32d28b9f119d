package modules

import (
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive/imports"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// Bounds on what is found in one image. The rest is ignored.
const (
	maxDirs    = 512     // nested in each other
	maxModules = 1 << 17 // and directories with modules
	maxRoots   = 64      // where absolute names are looked for
)

// New finds the modules below root, which is what the layers make together. lists
// are the sources of each of them.
func New(root *tree.Node, layers []*layer.Index, lists []imports.List) *Modules {
	m := &Modules{}
	sources := 0
	for i, x := range layers {
		of := layerSources{list: lists[i]}
		for k := range of.list.Len() {
			off := int64(-1) // nobody's
			if entry := of.list.Entry(k); entry < len(x.Entries) {
				off = int64(x.Entries[entry].Off)
			}
			of.offs = append(of.offs, off)
		}
		if !slices.IsSorted(of.offs) {
			of = layerSources{} // another program's idea of a layer
		}
		sources += len(of.offs)
		m.layers = append(m.layers, of)
	}
	if sources > 0 {
		f := finder{m: m, natives: map[File]*library{}, names: map[string]string{}}
		f.walk(root, nil, "", 0)
		f.nameLibraries(root)
		slices.SortFunc(m.files, func(a, b extent) int { return a.compare(b.File) })
	}
	return m
}

// finder walks a root.
type finder struct {
	m       *Modules
	n       int // modules and directories so far
	natives map[File]*library
	names   map[string]string // of libraries, without directories, and their paths
}

// walk returns the directory n at a path, or nil if there are no modules below it.
func (f *finder) walk(n *tree.Node, parent *dir, at string, depth int) *dir {
	if depth == maxDirs || f.n > maxModules {
		return nil
	}
	d := &dir{parent: parent}
	var compiled []tree.Dirent
	for _, c := range n.Children {
		switch c.Node.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			if c.Name == "__pycache__" {
				compiled = c.Node.Children
			} else if below := f.walk(c.Node, d, at+"/"+c.Name, depth+1); below != nil {
				d.addDir(c.Name, below)
			}
		case unix.S_IFREG:
			native := f.native(c)
			f.add(d, c, native)
			if native != nil {
				f.name(at, c.Name)
			}
		case unix.S_IFLNK:
			f.name(at, c.Name)
		}
	}
	if len(d.dirs)+len(d.modules) == 0 {
		return nil
	}
	f.n += 1 + len(d.modules)
	for _, c := range compiled {
		d.addCompiled(c)
	}
	for _, mod := range d.modules {
		f.note(extent{mod.file, mod, mod.native})
		if mod.source != mod.file {
			f.note(extent{mod.source, mod, nil})
		}
	}
	if d.modules[initName] == nil && isRoot(path.Base(at)) && len(f.m.roots) < maxRoots {
		f.m.roots = append(f.m.roots, d)
	}
	return d
}

// note remembers where a file is.
func (f *finder) note(e extent) {
	if e.Len > 0 {
		f.m.files = append(f.m.files, e)
	}
}

// native returns the library that a file is, or nil.
func (f *finder) native(c tree.Dirent) *library {
	if c.Node.Mode&0o111 == 0 && !strings.Contains(c.Name, ".so") {
		return nil
	}
	file := fileOf(c.Node)
	if len(f.m.source(file).Parts) == 0 {
		return nil
	}
	if f.natives[file] == nil {
		program := !strings.Contains(c.Name, ".so")
		f.natives[file] = &library{file: file, program: program, python: program && strings.HasPrefix(c.Name, "python3")}
		f.note(extent{file, nil, f.natives[file]})
	}
	return f.natives[file]
}

// name notes the name of what may be a library, or a link to one, in a directory. Of
// several of one name the one with the shortest path is meant: the loader finds that.
func (f *finder) name(dir, name string) {
	if old, ok := f.names[name]; strings.Contains(name, ".so") && (!ok || len(dir)+1+len(name) < len(old)) {
		f.names[name] = dir + "/" + name
	}
}

// nameLibraries finds out which libraries the names are of.
func (f *finder) nameLibraries(root *tree.Node) {
	f.m.libraries = map[string]*library{}
	for name, path := range f.names {
		if n := root.Lookup(path); n != nil && n.Mode&unix.S_IFMT == unix.S_IFREG {
			if lib := f.natives[fileOf(n)]; lib != nil {
				f.m.libraries[name] = lib
			}
		}
	}
}

// add adds the module that a file is, if it is one.
func (f *finder) add(d *dir, c tree.Dirent, native *library) {
	if name, ok := strings.CutSuffix(c.Name, ".py"); ok && d.modules[name] == nil {
		d.addModule(name, &module{dir: d, source: fileOf(c.Node), file: fileOf(c.Node)})
	} else if strings.HasSuffix(c.Name, ".so") {
		name, _, _ = strings.Cut(c.Name, ".")
		d.addModule(name, &module{dir: d, file: fileOf(c.Node), native: native}) // before a source of that name
	}
}

func (d *dir) addDir(name string, below *dir) {
	if d.dirs == nil {
		d.dirs = map[string]*dir{}
	}
	d.dirs[name] = below
}

func (d *dir) addModule(name string, mod *module) {
	if d.modules == nil {
		d.modules = map[string]*module{}
	}
	d.modules[name] = mod
}

// addCompiled takes note of a compiled source (PEP 3147).
func (d *dir) addCompiled(c tree.Dirent) {
	base, ok := strings.CutSuffix(c.Name, ".pyc")
	name, version, _ := strings.Cut(base, ".")
	mod := d.modules[name]
	if ok && mod != nil && mod.file == mod.source && c.Node.Mode&unix.S_IFMT == unix.S_IFREG && !strings.Contains(version, ".opt-") {
		mod.file = fileOf(c.Node)
	}
}

// fileOf returns where a regular file is; nowhere if it has holes.
func fileOf(n *tree.Node) File {
	if n.Sparse != nil {
		return File{}
	}
	return File{n.Layer, int64(n.Off), n.Size}
}

// isRoot says whether interpreters look for modules in a directory of that name.
func isRoot(name string) bool {
	return strings.HasPrefix(name, "python") || name == "site-packages" || name == "dist-packages" || name == "lib-dynload"
}
