package images

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// WindowsName is the image in the layout that Windows makes, and WindowsFiles how many files of a MiB are in it.
const (
	WindowsName  = "example.com/windows/texts:1"
	WindowsFiles = 40
)

// WindowsFile is the path, without a slash before it, and the content of a file in the image that Windows makes.
func WindowsFile(i int) (path, content string) {
	r := rand.New(rand.NewPCG(uint64(i), 0))
	var b strings.Builder
	for b.Len() < 1<<20 {
		fmt.Fprintf(&b, "%d words of %d. ", r.IntN(2000), r.IntN(50))
	}
	return fmt.Sprintf("texts/%02d", i), b.String()[:1<<20]
}

// Windows makes an image in dir with a layer in which decompression can start at many places, and needs what came before
// at each.
func Windows(dir string) (*Layout, error) {
	return onBusybox(dir, WindowsName, func(t *tarball) {
		t.dir("texts", 0o755)
		for i := range WindowsFiles {
			path, content := WindowsFile(i)
			t.file(path, 0o644, content)
		}
	})
}
