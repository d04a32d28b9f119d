package inflate_test

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// A first pass over a stream collects its seek points. From then on any part
// of it can be read from the nearest one.
func ExampleResume() {
	var blob bytes.Buffer
	w := gzip.NewWriter(&blob)
	for i := range 100_000 {
		fmt.Fprintf(w, "line %06d\n", i)
	}
	w.Close()

	var points []inflate.Point
	z, err := inflate.NewReader(bytes.NewReader(blob.Bytes()), inflate.Options{
		Interval: 256 << 10,
		OnPoint: func(p inflate.Point) error {
			p.Window = bytes.Clone(p.Window)
			points = append(points, p)
			return nil
		},
	})
	if err != nil {
		panic(err)
	}
	if _, err := io.Copy(io.Discard, z); err != nil {
		panic(err)
	}

	const want = 12 * 98_765 // where line 98765 starts
	p := points[0]
	for _, q := range points {
		if q.Out <= want {
			p = q
		}
	}
	z, err = inflate.Resume(bytes.NewReader(blob.Bytes()[p.In:]), p)
	if err != nil {
		panic(err)
	}
	if _, err := io.CopyN(io.Discard, z, int64(want-p.Out)); err != nil {
		panic(err)
	}
	line := make([]byte, 11)
	if _, err := io.ReadFull(z, line); err != nil {
		panic(err)
	}
	fmt.Printf("%d points, %s\n", len(points), line)
	// Output: 5 points, line 098765
}
