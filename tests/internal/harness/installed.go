package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Installed finds the programs where the Makefile puts them: the product in bin (or $CLIP_BIN), the parts in
// .cache/bin.
func Installed() (Options, error) {
	if os.Getuid() != 0 {
		return Options{}, errors.New("containerd and mounts need root")
	}
	top, err := Top()
	if err != nil {
		return Options{}, err
	}
	o := Options{Parts: filepath.Join(top, ".cache", "bin"), Product: filepath.Join(top, "bin")}
	if dir := os.Getenv("CLIP_BIN"); dir != "" {
		o.Product = dir
	}
	for dir, programs := range map[string][]string{
		o.Parts:   {"buildctl", "buildkitd", "containerd", "containerd-shim-runc-v2", "crane", "ctr", "registry", "versitygw"},
		o.Product: {"clipctl", "containerd-clip-grpc"},
	} {
		for _, program := range programs {
			if _, err := os.Stat(filepath.Join(dir, program)); err != nil {
				return Options{}, fmt.Errorf("%s is missing, `make build parts` makes it: %w", program, err)
			}
		}
	}
	return o, nil
}

// Top is the root of the source tree: the nearest directory above that holds the Makefile.
func Top() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "Makefile")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("not below a directory with the Makefile")
		}
		dir = filepath.Dir(dir)
	}
}
