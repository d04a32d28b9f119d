package images

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

//go:embed debian.sh
var debianScript string

// step is a layer that commands make, run by sh as root on top of the layers before, or of the base alone. Nothing is
// on top of a step that is on the base alone.
type step struct {
	name, commands string
	onBase         bool
}

const apt = "apt-get -qq -o Acquire::Retries=3 -o Dpkg::Options::=--force-unsafe-io -o Dpkg::Use-Pty=0"

// install is how a step installs Debian packages.
func install(packages ...string) string {
	return apt + " update\n" + apt + " install -y --no-install-recommends " + strings.Join(packages, " ") + "\n"
}

// baseRecipe changes whenever what debianBase makes changes.
const baseRecipe = "debian-1"

// debianBase returns a Debian root in the directory cache, which is below all the images, and makes it when it is not
// there. It needs root, debootstrap, a Debian mirror and some minutes.
func debianBase(ctx context.Context, cache string) (dir string, err error) {
	return cached(cache, baseRecipe, func(work string) (string, error) {
		dir := filepath.Join(work, "base")
		return dir, runDebian(ctx, "base", dir)
	})
}

// debian returns the base of an image, a directory in cache that stays as it is, and makes its other layers as
// directories in work, one per step, without apt's caches. It needs root, a Debian mirror and some minutes.
func debian(ctx context.Context, cache, work string, steps ...step) (base string, err error) {
	if base, err = debianBase(ctx, cache); err != nil {
		return "", err
	}
	args := []string{"layers", base, work}
	for _, s := range steps {
		on := "all"
		if s.onBase {
			on = "base"
		}
		args = append(args, s.name, on, s.commands)
	}
	return base, runDebian(ctx, args...)
}

// runDebian runs debian.sh in namespaces of its own: no mount or process outlives it.
func runDebian(ctx context.Context, args ...string) error {
	unshare := []string{"--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c", debianScript, "debian.sh"}
	build := exec.CommandContext(ctx, "unshare", append(unshare, args...)...)
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	return build.Run()
}

// cached returns the file or directory called name in the directory cache, and has build make it when it is not there.
// build gets a directory to work in and returns what there is to keep.
func cached(cache, name string, build func(work string) (made string, err error)) (path string, err error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(filepath.Join(cache, name+".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	path = filepath.Join(cache, name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	work, err := os.MkdirTemp(cache, "work-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	made, err := build(work)
	if err != nil {
		return "", fmt.Errorf("making the image %s: %w", name, err)
	}
	return path, os.Rename(made, path)
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
