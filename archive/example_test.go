package archive_test

import (
	"fmt"
	"log"

	"github.com/beam-cloud/containerd-clip/archive"
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
