package layer

import (
	"errors"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/beam-cloud/containerd-clip/archive/imports"
)

// Bounds on what is looked at: the bytes that a source begins with, since that is
// where imports are, and the number of names in all sources of a layer.
const (
	sourceHead = 32 << 10
	maxNames   = 1 << 19
)

// sources collects what Python sources of a layer import, and what its libraries need.
type sources struct {
	scanner imports.Scanner
	all     []imports.Source
	names   int
	buf     []byte // for what is not in one chunk
	front   []byte // of a library
	dynamic []byte
}

// read looks at the content of a file that is a layer's entry, and returns how many
// bytes of it it has read.
func (s *sources) read(r *chunkReader, e *Entry, entry int) (n int64, err error) {
	switch {
	case s.names > maxNames:
	case isSource(e):
		n, err = s.readSource(r, e.Size, entry)
	case mayBeLibrary(e):
		n, err = s.readLibrary(r, e.Size, entry)
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// mayBeLibrary says whether an entry may be a file that the dynamic loader loads.
func mayBeLibrary(e *Entry) bool {
	return e.Type == TypeReg && e.Size > 0 && (e.Mode&0o111 != 0 || strings.Contains(e.Name, ".so"))
}

// readLibrary reads what the loader reads of a file, if it is a library or a program.
func (s *sources) readLibrary(r *chunkReader, size int64, entry int) (int64, error) {
	start := r.pos
	front, err := s.content(r, min(size, imports.HeaderSize))
	if err != nil {
		return r.pos - start, err
	}
	p, ok := imports.NewProgram(front, size)
	if !ok {
		return r.pos - start, nil
	}
	s.front = append(s.front[:0], front...)
	if rest := p.Front - int64(len(s.front)); rest > 0 {
		front, err = s.content(r, rest)
		s.front = append(s.front, front...)
	}
	if err == nil {
		_, err = r.Seek(p.Dynamic.Off-(r.pos-start), io.SeekCurrent)
	}
	if err != nil {
		return r.pos - start, err
	}
	dynamic, err := s.content(r, p.Dynamic.Len)
	if err != nil {
		return r.pos - start, err
	}
	s.dynamic = append(s.dynamic[:0], dynamic...)
	names, err := s.libraryNames(r, p.Names(s.dynamic), start)
	if err == nil {
		l := p.Library(names, s.dynamic)
		s.names += 1 + len(l.Needs)
		s.all = append(s.all, imports.Source{Entry: entry, Library: l})
	}
	return r.pos - start, err
}

// libraryNames returns a part of a library that begins at start, or what was read of it
// already.
func (s *sources) libraryNames(r *chunkReader, names imports.Part, start int64) ([]byte, error) {
	front := int64(len(s.front))
	if ahead := names.Off - (r.pos - start); ahead < 0 || names.Len == 0 {
		return s.front[min(names.Off, front):min(names.End(), front)], nil
	} else if _, err := r.Seek(ahead, io.SeekCurrent); err != nil {
		return nil, err
	}
	return s.content(r, names.Len)
}

// isSource says whether an entry is a Python source that a program may load. Tests
// of libraries are many and are not.
func isSource(e *Entry) bool {
	return e.Type == TypeReg && e.Size > 0 && strings.HasSuffix(e.Name, ".py") && !strings.Contains(e.Name, "/tests/")
}

// readSource reads what a source of size bytes begins with.
func (s *sources) readSource(r *chunkReader, size int64, entry int) (int64, error) {
	n := min(size, sourceHead)
	src, err := s.content(r, n)
	if err != nil {
		return n, err
	}
	found := s.scanner.Scan(src)
	for _, x := range found {
		s.names += 1 + len(x.Names)
	}
	if len(found) > 0 {
		s.all = append(s.all, imports.Source{Entry: entry, Imports: found})
	}
	return n, nil
}

// content returns the next n bytes of the stream, which are valid until more is read.
func (s *sources) content(r *chunkReader, n int64) ([]byte, error) {
	if err := r.fill(); err != nil {
		return nil, err
	}
	first := r.next(int(n))
	if int64(len(first)) == n {
		return first, nil
	}
	s.buf = append(s.buf[:0], first...)
	for int64(len(s.buf)) < n {
		if err := r.fill(); err != nil {
			return nil, err
		}
		s.buf = append(s.buf, r.next(int(n)-len(s.buf))...)
	}
	return s.buf, nil
}

// encode returns what the sources import, encoded, without names that cannot be
// modules: most of what is taken from a module is a function or a class.
func (s *sources) encode(entries []Entry) []byte {
	if len(s.all) == 0 {
		return nil
	}
	modules := moduleNames(entries)
	for _, source := range s.all {
		for i, x := range source.Imports {
			first, _, _ := strings.Cut(x.Module, ".")
			if x.Level == 0 && !modules[first] {
				continue // it is in another layer, and so are its modules
			}
			source.Imports[i].Names = slices.DeleteFunc(x.Names, func(name string) bool { return !modules[name] })
		}
	}
	return imports.Append(nil, s.all)
}

// moduleNames returns the last parts of the names of all Python modules of a layer.
func moduleNames(entries []Entry) map[string]bool {
	names := map[string]bool{}
	for i := range entries {
		if !strings.HasSuffix(entries[i].Name, ".py") && !strings.HasSuffix(entries[i].Name, ".so") {
			continue
		}
		dir, base := path.Split(entries[i].Name)
		name, source := strings.CutSuffix(base, ".py")
		switch {
		case source && name == "__init__":
			names[path.Base(dir)] = true
		case source:
			names[name] = true
		default:
			name, _, _ = strings.Cut(base, ".")
			names[name] = true
		}
	}
	return names
}
