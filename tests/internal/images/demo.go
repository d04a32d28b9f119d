package images

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

const (
	// DemoName is the demo image's name in the file that Demo makes.
	DemoName = "example.com/demo/python:1"

	// demoRecipe changes whenever what Demo makes changes.
	demoRecipe = "demo-1"
)

//go:embed demo.sh
var demoScript string

// Demo returns the demo image, an OCI archive in the directory cache, and makes it when it is not there. That needs
// root, debootstrap, a Debian mirror and some minutes.
func Demo(ctx context.Context, cache string) (file string, err error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(filepath.Join(cache, "lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	file = filepath.Join(cache, demoRecipe+".tar")
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	work, err := os.MkdirTemp(cache, "work-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	if err := makeDemo(ctx, work, file); err != nil {
		return "", fmt.Errorf("making the demo image: %w", err)
	}
	return file, nil
}

// lock has a second run wait for the first one's image.
func lock(file string) (unlock func(), err error) {
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

func makeDemo(ctx context.Context, work, file string) error {
	build := exec.CommandContext(ctx, "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c", demoScript, "demo.sh", work)
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		return err
	}
	layout, err := NewLayout(filepath.Join(work, "layout"))
	if err != nil {
		return err
	}
	var layers []Layer
	for _, write := range []func(io.Writer) error{
		func(w io.Writer) error { return WriteUpper(w, filepath.Join(work, "base")) },
		func(w io.Writer) error { return WriteUpper(w, filepath.Join(work, "python")) },
		writeDemoApp,
	} {
		layer, err := layout.AddLayer(write)
		if err != nil {
			return err
		}
		layers = append(layers, layer)
	}
	config := ocispec.ImageConfig{
		Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"},
		Cmd:        []string{"python3", "/app/hello.py"},
		WorkingDir: "/app",
	}
	if _, err := layout.AddImage(DemoName, config, layers...); err != nil {
		return err
	}
	if err := layout.Finish(); err != nil {
		return err
	}
	part := filepath.Join(work, "image.tar")
	if err := layout.WriteTar(part); err != nil {
		return err
	}
	return os.Rename(part, file)
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
