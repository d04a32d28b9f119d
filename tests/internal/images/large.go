package images

import (
	"archive/tar"
	"fmt"
	"io"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// LargeName is the image in the layout that Large makes.
const LargeName = "example.com/large/entries:1"

// largeDirectory is how many files are in each of the directories /large/0, /large/1 and so on.
const largeDirectory = 100_000

// LargeFile is the path, without a slash before it, and the content of a file in the image that Large makes.
func LargeFile(i int) (path, content string) {
	return fmt.Sprintf("large/%d/file-%07d", i/largeDirectory, i), fmt.Sprintf("%d\n", i)[:i%2*2]
}

// Large makes an image in dir with a layer of so many files, half of them empty, most in directories of 100,000, and a
// layer on top of it that removes the last file.
func Large(dir string, files int) (*Layout, error) {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return nil, err
	}
	l, err := NewLayout(dir)
	if err != nil {
		return nil, err
	}
	m := maker{layout: l}
	layers := []Layer{
		m.layer(l.AddLayer, func(t *tarball) {
			t.file("bin/busybox", 0o755, string(program))
			t.symlink("bin/sh", "busybox")
			t.dir("proc", 0o755)
		}),
		m.raw(l.AddLayer, func(w io.Writer) error { return writeLarge(w, files) }),
		m.layer(l.AddLayer, func(t *tarball) {
			path, _ := LargeFile(files - 1)
			dir, name := path[:len(path)-len("file-0000000")], path[len(path)-len("file-0000000"):]
			t.whiteout(dir, name)
		}),
	}
	m.image(LargeName, ocispec.ImageConfig{Env: []string{"PATH=/bin"}}, layers...)
	if m.err != nil {
		return nil, m.err
	}
	return l, l.Finish()
}

func writeLarge(w io.Writer, files int) error {
	tw := tar.NewWriter(w)
	for i := range files {
		path, content := LargeFile(i)
		h := tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: 0o644, Uid: i % 7, Size: int64(len(content)), ModTime: Epoch.Truncate(1e9), Format: tar.FormatUSTAR}
		if err := tw.WriteHeader(&h); err != nil {
			return err
		}
		if _, err := io.WriteString(tw, content); err != nil {
			return err
		}
	}
	return tw.Close()
}
