package images

import (
	"context"
	"io"
	"path/filepath"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// DemoName is the demo image's name in the file that Demo makes.
	DemoName = "example.com/demo/python:1"

	// demoRecipe changes whenever what Demo makes changes.
	demoRecipe = "demo-3"
)

// Demo returns the demo image, an OCI archive in the directory cache, and makes it when it is not there.
func Demo(ctx context.Context, cache string) (file string, err error) {
	return cached(cache, demoRecipe+".tar", func(work string) (string, error) { return makeDemo(ctx, cache, work) })
}

func makeDemo(ctx context.Context, cache, work string) (file string, err error) {
	base, err := debian(ctx, cache, work, step{name: "python", commands: install("python3", "python3-numpy", "python3-pandas", "git")})
	if err != nil {
		return "", err
	}
	layout, err := NewLayout(filepath.Join(work, "layout"))
	if err != nil {
		return "", err
	}
	layers, err := addLayers(layout.AddLayer,
		func(w io.Writer) error { return writeUpper(w, base) },
		func(w io.Writer) error { return writeUpper(w, filepath.Join(work, "python")) },
		writeDemoApp,
	)
	if err != nil {
		return "", err
	}
	config := ocispec.ImageConfig{
		Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"},
		Cmd:        []string{"python3", "/app/hello.py"},
		WorkingDir: "/app",
	}
	if _, err := layout.AddImage(DemoName, config, layers...); err != nil {
		return "", err
	}
	if err := layout.Finish(); err != nil {
		return "", err
	}
	file = filepath.Join(work, "image.tar")
	return file, layout.WriteTar(file)
}

// writeDemoApp is the top layer: a program, a file of the base removed, a directory of it replaced.
func writeDemoApp(w io.Writer) error {
	t := newTarball(w)
	t.dir("app", 0o755)
	t.file("app/hello.py", 0o755, "import numpy\nprint('sum of 0..5 is', numpy.arange(6).sum())\n")
	t.dir("etc", 0o755)
	t.whiteout("etc/", "issue")
	t.dir("usr/share/doc/bash", 0o755)
	t.file("usr/share/doc/bash/"+opaqueMarker, 0, "")
	t.file("usr/share/doc/bash/README", 0o644, "The documentation was replaced.\n")
	return t.close()
}
