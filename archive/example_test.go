package archive_test

import (
	"fmt"
	"log"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

func ExampleOpenFile() {
	a, err := archive.OpenFile("testdata/hello.clip")
	if err != nil {
		log.Fatal(err)
	}
	defer a.Close()
	fmt.Println(a.Info().StorageRef)
	m, _ := a.Manifest()
	for i := range m.Layers {
		index, err := a.Layer(i)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("layer %d: %s, %d bytes, %d span\n", i, index.Compression, index.OutSize, len(index.Spans))
		for _, e := range index.Entries {
			fmt.Printf("  %c %04o %s: %d bytes at %d\n", e.Type, e.Mode, e.Name, e.Size, e.Off)
		}
	}
	// Output:
	// registry.example:5000/team/app:v1
	// layer 0: gzip, 2560 bytes, 1 span
	//   5 0755 etc/: 0 bytes at 0
	//   0 0644 etc/motd: 7 bytes at 1024
	// layer 1: gzip, 2048 bytes, 1 span
	//   0 0644 etc/.wh.motd: 0 bytes at 512
	//   2 0777 etc/issue: 0 bytes at 0
}

// The root of the image, as a container sees it, is the layers merged.
func ExampleArchive_Layer() {
	a, err := archive.OpenFile("testdata/hello.clip")
	if err != nil {
		log.Fatal(err)
	}
	defer a.Close()
	layers := make([]*layer.Index, len(a.DiffIDs()))
	for i := range layers {
		if reason := a.NotLazy(i); reason != "" {
			log.Fatalf("layer %d has no index: %s", i, reason)
		}
		if layers[i], err = a.Layer(i); err != nil {
			log.Fatal(err)
		}
	}
	root, err := tree.Merge(layers)
	if err != nil {
		log.Fatal(err)
	}
	for _, dir := range root.Children {
		for _, f := range dir.Node.Children {
			fmt.Printf("%s/%s %o %s\n", dir.Name, f.Name, f.Node.Mode, f.Node.Target)
		}
	}
	// Output:
	// etc/issue 120777 motd
}

// The part that upstream CLIP reads can be read of any archive, whoever wrote it.
func ExampleOpenUpstreamFile() {
	u, err := archive.OpenUpstreamFile("testdata/hello.clip")
	if err != nil {
		log.Fatal(err)
	}
	defer u.Close()
	m, err := u.Metadata()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(m.StorageInfo.Type(), m.Get("/etc/issue").Target)
	// Output:
	// oci motd
}
