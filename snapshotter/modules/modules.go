// Package modules tells, from a module that a program has begun to read, what it
// reads next: the modules that the first one imports, those that they import, and the
// libraries that any of them needs, in the order in which they are loaded. Modules are
// Python's; libraries and programs are ELF files.
//
// What files load is in the image's archive (see archive/imports). Where a name leads
// to is looked up in the image's root, as interpreter and loader would with the
// directories that distributions and pip use, and may be wrong.
package modules

import (
	"slices"
	"strings"

	"github.com/beam-cloud/containerd-clip/archive/imports"
)

// Modules are the Python modules of an image. They are for one goroutine at a time.
type Modules struct {
	layers    []layerSources
	roots     []*dir              // where absolute names are looked for
	libraries map[string]*library // by the names that others need them by
	files     []extent            // of modules and libraries, by place

	found, asked int // modules that were told of, and those that somebody read without
	followed     int // names
	stopped      bool
}

// layerSources are the sources of a layer: the i-th begins at offs[i].
type layerSources struct {
	list imports.List
	offs []int64
}

// File is the content of a file, or a part of it: bytes of a layer's uncompressed
// stream.
type File struct {
	Layer    int
	Off, Len int64
}

// dir is a directory with modules, or above one.
type dir struct {
	parent  *dir // nil for the image's root
	dirs    map[string]*dir
	modules map[string]*module
}

// module is what is loaded for a name.
type module struct {
	dir    *dir     // that its relative imports begin in
	source File     // its Len is 0 if there is none, as for an extension
	file   File     // what is read: the extension, the compiled source, or the source
	native *library // the extension; nil if it is none
	seen   bool
}

// library is an ELF file.
type library struct {
	file    File
	program bool // others do not need it by its name
	python  bool // it is the interpreter
	seen    bool
}

// small says whether all of it is fetched.
func (lib *library) small() bool {
	return lib.file.Len <= smallLibrary || lib.program && lib.file.Len <= smallProgram
}

// told says whether somebody was told of all of it. There may be no library.
func (lib *library) told() bool { return lib != nil && lib.seen && lib.small() }

// interpreterLoads are modules that Python loads before the program.
var interpreterLoads = []string{"encodings.aliases", "encodings.utf_8", "sitecustomize"}

// Sizes of files of which all is fetched, in bytes: most of what is called in them is
// near something else that is. Of larger ones it is what the loader reads.
const (
	smallLibrary = 1 << 20
	smallProgram = 8 << 20
)

// extent is a file of a module, or a library, or both.
type extent struct {
	File
	module  *module
	library *library
}

// seen says whether somebody was told of the file, or has read it.
func (e extent) seen() bool {
	return e.module != nil && e.module.seen && e.File == e.module.file || e.library != nil && e.library.seen
}

// initName is the module that a package is.
const initName = "__init__"

// maxDepth is how deep imports are followed, each in what another one imports.
const maxDepth = 512

// maxFollowed is how many names are followed in an image. One that names its sources
// many times could have somebody look for modules for hours else.
const maxFollowed = 1 << 20

// Somebody who reads module after module without importing them, such as a search
// or a copy, is told nothing more: whoever imports reads mostly what was told.
const (
	askedMost  = 64 // modules that nothing was told of
	askedShare = 4  // and for each of them so many others
)

// Empty says whether there is nothing to be told.
func (m *Modules) Empty() bool { return len(m.files) == 0 || m.stopped }

// Touch notes that somebody reads from the byte off of a layer on, up to the end of
// a page at least, and returns the files that are read next. Each is returned once
// in the life of m.
func (m *Modules) Touch(layer int, off int64) []File {
	if m.Empty() {
		return nil
	}
	l := loader{m: m}
	files := m.inPage(layer, off)
	if slices.ContainsFunc(files, extent.seen) {
		return nil // it is read as was expected, and its neighbours with it
	}
	for _, e := range files {
		// A file that ends in the page shares it with the one that is read.
		if first := e.Off >= off; first || e.Off+e.Len > off+page {
			l.touch(e, first)
		}
	}
	m.found += len(l.files)
	m.stopped = m.stopped || m.followed > maxFollowed || m.asked > askedMost && m.found < askedShare*m.asked
	return l.files
}

// page is what the kernel reads at least, in bytes.
const page = 4096

// inPage returns the files of which a part is in the page at off of a layer.
func (m *Modules) inPage(layer int, off int64) []extent {
	place := func(off int64) int {
		i, _ := slices.BinarySearchFunc(m.files, File{Layer: layer, Off: off}, func(e extent, f File) int { return e.compare(f) })
		return i
	}
	from, to := place(off), place(off+page)
	for from > 0 && m.files[from-1].Layer == layer && m.files[from-1].Off+m.files[from-1].Len > off {
		from-- // it reaches into the page
	}
	return m.files[from:to]
}

// compare orders files by where they begin.
func (f File) compare(g File) int {
	if f.Layer != g.Layer {
		return f.Layer - g.Layer
	}
	return int(min(max(f.Off-g.Off, -1), 1))
}

// loader collects what is loaded.
type loader struct {
	m     *Modules
	files []File
}

// touch loads what is loaded with a file that is being read, from its beginning or
// farther on.
func (l *loader) touch(e extent, first bool) {
	if first && e.library != nil {
		l.library(e.library, 0)
	}
	if e.module == nil || e.File != e.module.file || e.module.seen {
		return // a source that is compiled need not be read to be loaded
	}
	l.m.asked++
	e.module.seen = true
	l.imports(e.module, 0)
}

// load loads a module that has not been.
func (l *loader) load(mod *module, depth int) {
	if mod.seen || depth == maxDepth {
		return
	}
	mod.seen = true
	l.library(mod.native, depth+1)
	if mod.file.Len > 0 && !mod.native.told() {
		l.files = append(l.files, mod.file)
	}
	l.imports(mod, depth+1)
}

// library loads a library, and then those that it needs.
func (l *loader) library(lib *library, depth int) {
	if lib == nil || lib.seen || depth >= maxDepth {
		return
	}
	lib.seen = true
	source := l.m.source(lib.file)
	if lib.small() {
		l.files = append(l.files, lib.file)
	} else {
		for _, p := range source.Parts {
			if p.End() <= lib.file.Len {
				l.files = append(l.files, File{lib.file.Layer, lib.file.Off + p.Off, p.Len})
			}
		}
	}
	for _, name := range source.Needs {
		l.library(l.m.libraries[name], depth+1)
	}
	if lib.python {
		for _, name := range interpreterLoads {
			l.follow(l.m.rootOf(name), name, depth+1)
		}
	}
}

// imports loads what a module imports.
func (l *loader) imports(mod *module, depth int) {
	for _, x := range l.m.source(mod.source).Imports {
		if l.m.followed += 1 + len(x.Names); l.m.followed > maxFollowed {
			return
		}
		at := l.start(mod.dir, x)
		if x.Module != "" {
			at = l.follow(at, x.Module, depth)
		}
		for _, name := range x.Names {
			l.follow(at, name, depth)
		}
	}
}

// source returns what a file loads.
func (m *Modules) source(file File) imports.Source {
	of := &m.layers[file.Layer]
	i, found := slices.BinarySearch(of.offs, file.Off)
	if !found || file.Len == 0 || m.followed > maxFollowed {
		return imports.Source{}
	}
	return of.list.Source(i)
}

// start returns the directory in which an import's name begins, or nil.
func (l *loader) start(d *dir, x imports.Import) *dir {
	if x.Level > 0 {
		for range x.Level - 1 {
			if d == nil {
				return nil
			}
			d = d.parent
		}
		return d
	}
	first, _, _ := strings.Cut(x.Module, ".")
	own := d
	for own.modules[initName] != nil && own.parent != nil {
		own = own.parent
	}
	if own.has(first) {
		return own
	}
	return l.m.rootOf(first)
}

// rootOf returns the directory in which an absolute name begins, or nil.
func (m *Modules) rootOf(name string) *dir {
	first, _, _ := strings.Cut(name, ".")
	if i := slices.IndexFunc(m.roots, func(r *dir) bool { return r.has(first) }); i >= 0 {
		return m.roots[i]
	}
	return nil
}

func (d *dir) has(name string) bool { return d.modules[name] != nil || d.dirs[name] != nil }

// follow loads all modules of a dotted name and returns the directory of the last
// one, or nil if it has none.
func (l *loader) follow(at *dir, name string, depth int) *dir {
	for at != nil && name != "" {
		var first string
		first, name, _ = strings.Cut(name, ".")
		below := at.dirs[first]
		switch {
		case below != nil && below.modules[initName] != nil:
			l.load(below.modules[initName], depth)
		case at.modules[first] != nil:
			l.load(at.modules[first], depth)
			below = nil
		}
		at = below
	}
	return at
}
