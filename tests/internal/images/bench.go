package images

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Names of the images in the layout that Bench makes. They differ in compression and in the top layer.
const (
	BenchGzip    = "example.com/bench/gzip:1"
	BenchChanged = "example.com/bench/changed:1" // gzip, with another top layer
	BenchZstd    = "example.com/bench/zstd:1"

	// benchRecipe changes whenever what Bench makes changes.
	benchRecipe = "bench-3"
)

// Bench returns the layout of the images that benchmarks measure, in the directory cache, and makes it when it is not
// there: Debian, python with what data science needs, node with what building a web page needs, and an app.
func Bench(ctx context.Context, cache string) (dir string, err error) {
	return cached(cache, benchRecipe, func(work string) (string, error) { return makeBench(ctx, cache, work) })
}

// BenchDerived returns what build makes of the images of Bench, kept in the directory cache. build gets a directory to
// work in and returns what there is to keep; name changes whenever that does.
func BenchDerived(cache, name string, build func(work string) (made string, err error)) (path string, err error) {
	return cached(cache, benchRecipe+"-"+name, build)
}

// BenchStart is a file in the layout: the paths that benchStart opens, one a line, as the layers name them.
const BenchStart = "start.txt"

// benchStart is a typical start. What it opens is left where no layer keeps it.
const benchStart = `MPLCONFIGDIR=/tmp python3 -B - <<END
import numpy, scipy.stats, pandas, sklearn.linear_model, matplotlib.pyplot
import os, sys
files = {getattr(m, "__cached__", None) or getattr(m, "__file__", None) for m in list(sys.modules.values())}
files |= {line.split()[-1] for line in open("/proc/self/maps")}
files = {os.path.realpath(f) for f in files if f and f.startswith("/")}
with open("/start.txt", "w") as f:
    f.writelines(name[1:] + "\n" for name in sorted(files) if os.path.isfile(name))
END
`

// benchNode installs packages as they were on one day, and leaves out what installed them.
const benchNode = `mkdir -p /srv/web
cd /srv/web
NODE_EXTRA_CA_CERTS=/tmp/trusted.crt npm install --before=2024-11-01 --no-audit --no-fund \
	typescript @babel/core @babel/preset-env webpack eslint lodash react date-fns core-js
` + apt + " purge -y --auto-remove npm\n"

func makeBench(ctx context.Context, cache, work string) (dir string, err error) {
	steps := []step{
		{name: "python", commands: install("python3", "python3-numpy", "python3-scipy", "python3-pandas", "python3-sklearn", "python3-matplotlib", "git", "curl") + benchStart},
		{name: "node", commands: install("nodejs", "npm") + benchNode},
	}
	base, err := debian(ctx, cache, work, steps...)
	if err != nil {
		return "", err
	}
	layout, err := NewLayout(filepath.Join(work, "layout"))
	if err != nil {
		return "", err
	}
	if err := os.Rename(filepath.Join(work, "python", BenchStart), filepath.Join(layout.Dir, BenchStart)); err != nil {
		return "", err
	}
	upper := func(dir string) func(io.Writer) error {
		return func(w io.Writer) error { return writeUpper(w, dir) }
	}
	python, node := filepath.Join(work, "python"), filepath.Join(work, "node")
	gzipped, err := addLayers(layout.AddLayer, upper(base), upper(python), upper(node), benchApp(1), benchApp(2))
	if err != nil {
		return "", err
	}
	zstded, err := addLayers(layout.AddZstdLayer, upper(base), upper(python), upper(node), benchApp(1))
	if err != nil {
		return "", err
	}
	for _, img := range []struct {
		name   string
		layers []Layer
	}{
		{BenchGzip, gzipped[:4]},
		{BenchChanged, append(slices.Clone(gzipped[:3]), gzipped[4])},
		{BenchZstd, zstded},
	} {
		if _, err := layout.AddImage(img.name, ocispec.ImageConfig{Cmd: []string{"python3"}}, img.layers...); err != nil {
			return "", err
		}
	}
	return layout.Dir, layout.Finish()
}

// addLayers adds what each of writes writes.
func addLayers(add func(func(io.Writer) error) (Layer, error), writes ...func(io.Writer) error) (layers []Layer, err error) {
	for _, write := range writes {
		layer, err := add(write)
		if err != nil {
			return nil, err
		}
		layers = append(layers, layer)
	}
	return layers, nil
}

// benchApp is the top layer, 8 MB in one of several versions: text and noise, files of the base removed, a directory of
// it replaced.
func benchApp(version byte) func(io.Writer) error {
	return func(w io.Writer) error {
		t := newTarball(w)
		random := rand.NewChaCha8([32]byte{'a', 'p', 'p', version})
		noise := make([]byte, 25<<10)
		t.dir("app", 0o755)
		for i := range 200 {
			_, _ = random.Read(noise) // it never fails
			t.file(fmt.Sprintf("app/%03d", i), 0o644, string(noise)+strings.Repeat(fmt.Sprintf("line of file %d\n", i), 1000))
		}
		t.whiteout("etc/", "issue")
		t.whiteout("etc/", "issue.net")
		t.dir("usr/share/doc/bash", 0o755)
		t.file("usr/share/doc/bash/"+opaqueMarker, 0, "")
		t.file("usr/share/doc/bash/README", 0o644, "The documentation was replaced.\n")
		return t.close()
	}
}
