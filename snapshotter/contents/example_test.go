package contents_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/beam-cloud/clip/pkg/clip"

	"github.com/beam-cloud/containerd-clip/snapshotter/contents"
)

// archive makes an archive that holds a greeting.
func archive(dir string) string {
	if err := clip.SetLogLevel("disabled"); err != nil {
		log.Fatal(err)
	}
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "hello.clip")
	if err := os.MkdirAll(filepath.Join(in, "etc"), 0o755); err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(in, "etc/motd"), []byte("Hello.\n"), 0o644); err != nil {
		log.Fatal(err)
	}
	if err := clip.CreateArchive(clip.CreateOptions{InputPath: in, OutputPath: out}); err != nil {
		log.Fatal(err)
	}
	return out
}

func tempDir() (string, func()) {
	dir, err := os.MkdirTemp("", "contents-")
	if err != nil {
		log.Fatal(err)
	}
	return dir, func() { os.RemoveAll(dir) }
}

// Any kind of archive is opened, listed and read the same way. One that has to
// ask a registry needs Options.Fetch.
func ExampleOpen() {
	dir, remove := tempDir()
	defer remove()
	a, err := contents.Open(archive(dir), contents.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer a.Close()
	fmt.Println("kind:", a.Kind)
	err = a.List("/", func(f contents.File) error {
		fmt.Println(f.Path)
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := a.Copy(context.Background(), os.Stdout, "/etc/motd"); err != nil {
		log.Fatal(err)
	}
	// Output:
	// kind: data
	// /
	// /etc
	// /etc/motd
	// Hello.
}

// An archive is mounted without containerd. This needs /dev/fuse, and root or fusermount.
func ExampleArchive_Mount() {
	dir, remove := tempDir()
	defer remove()
	a, err := contents.Open(archive(dir), contents.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer a.Close()
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		log.Fatal(err)
	}
	unmount, err := a.Mount(context.Background(), mnt)
	if err != nil {
		log.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(mnt, "etc/motd"))
	if err != nil {
		log.Print(err)
	}
	fmt.Print(string(text))
	if err := unmount(); err != nil {
		log.Fatal(err)
	}
	// Output:
	// Hello.
}
