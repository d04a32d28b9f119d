package images

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// ProgramName is the image in the layout that Program makes.
const ProgramName = "example.com/programs/linked:1"

// What the image that Program makes has.
const (
	ProgramPath  = "usr/bin/prog"
	OtherLibrary = "usr/local/lib/libother.so.1" // which nothing needs
	NeededPath   = "usr/local/lib/libneeded.so.1.0"
)

// linked is a program of every Debian, which needs libraries.
const linked = "/bin/ls"

// Program makes an image in dir with a program of this machine and a library that it needs, by the name of a link,
// which lie far from each other in the layer. The program is there to be read, and cannot be run.
func Program(dir string) (*Layout, error) {
	program, err := os.ReadFile(linked)
	if err != nil {
		return nil, err
	}
	name, library, err := neededLibrary()
	if err != nil {
		return nil, err
	}
	return onBusybox(dir, ProgramName, func(t *tarball) {
		apart(t, 0o755, []namedFile{{ProgramPath, string(program)}, {NeededPath, library}, {OtherLibrary, library}})
		t.symlink(filepath.Join(filepath.Dir(NeededPath), name), filepath.Base(NeededPath))
	})
}

// neededLibrary returns a library of this machine that the program needs, and the name it needs it by. It is not the C
// library, which every start reads.
func neededLibrary() (name, body string, err error) {
	f, err := elf.Open(linked)
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	names, err := f.ImportedLibraries()
	if err != nil {
		return "", "", err
	}
	for _, name := range names {
		if strings.HasPrefix(name, "libc.") {
			continue
		}
		for _, pattern := range []string{"/lib/*/", "/lib64/", "/lib/"} {
			paths, err := filepath.Glob(pattern + name)
			if err != nil {
				return "", "", err
			}
			if len(paths) > 0 {
				b, err := os.ReadFile(paths[0])
				return name, string(b), err
			}
		}
	}
	return "", "", fmt.Errorf("libraries that %s needs: %q: %w", linked, names, errors.ErrUnsupported)
}
