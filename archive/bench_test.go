package archive

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
)

// BenchmarkWriteFile writes the archive of an image of 65,000 files in four
// layers, as many as a Python or Node image has.
func BenchmarkWriteFile(b *testing.B) {
	var streams [][]byte
	for l := range 4 {
		var files []testimage.File
		for d := range 500 {
			dir := fmt.Sprintf("usr/lib/python3/dist-packages/layer%d/package%03d/", l, d)
			files = append(files, testimage.Dir(dir))
			for f := range 32 {
				files = append(files, testimage.Reg(fmt.Sprintf("%smodule_%02d.py", dir, f), testimage.Content(uint64(f), 100+d)))
			}
		}
		streams = append(streams, testimage.Tar(b, files...))
	}
	img := newImageLevel(b, 1, streams...)
	path := filepath.Join(b.TempDir(), "image.clip")
	b.ReportAllocs()
	for b.Loop() {
		st, err := WriteFile(path, &img.Image)
		require.NoError(b, err)
		b.ReportMetric(float64(st.Compat), "compat-B")
		b.ReportMetric(float64(st.Sections), "sections-B")
	}
}
