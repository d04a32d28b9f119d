package images

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
)

// SmallLayer returns what opens an uncompressed layer of ten files of 10 kB, which differ from those with another
// number.
func SmallLayer(number int) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) {
		var b bytes.Buffer
		t := newTarball(&b)
		random := rand.NewChaCha8([32]byte{'s', 'm', 'a', 'l', 'l', byte(number)})
		noise := make([]byte, 10_000)
		dir := fmt.Sprintf("layer-%d", number)
		t.dir(dir, 0o755)
		for i := range 10 {
			_, _ = random.Read(noise) // it never fails
			t.file(fmt.Sprintf("%s/%d", dir, i), 0o644, string(noise))
		}
		return io.NopCloser(&b), t.close()
	}
}
