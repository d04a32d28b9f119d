package inflate

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/flate"
	kgzip "github.com/klauspost/compress/gzip"
	"github.com/stretchr/testify/require"
)

// benchmarkStream is a tar of the Go distribution's sources and of the test
// binary, gzip'ed as image builders do: some text, some machine code.
func benchmarkStream(b *testing.B) (gz []byte, size int64) {
	const most = 64 << 20
	var out bytes.Buffer
	zw := gzip.NewWriter(&out)
	tw := tar.NewWriter(zw)
	add := func(path string) error {
		content, err := os.ReadFile(path)
		if err != nil || size > most {
			return err
		}
		size += int64(len(content))
		if err := tw.WriteHeader(&tar.Header{Name: path, Mode: 0o644, Size: int64(len(content))}); err != nil {
			return err
		}
		_, err = tw.Write(content)
		return err
	}
	self, err := os.Executable()
	require.NoError(b, err)
	require.NoError(b, add(self))
	root, err := exec.Command("go", "env", "GOROOT").Output()
	require.NoError(b, err)
	require.NoError(b, filepath.WalkDir(filepath.Join(strings.TrimSpace(string(root)), "src"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		return add(path)
	}))
	require.NoError(b, tw.Close())
	require.NoError(b, zw.Close())
	z, err := NewReader(bytes.NewReader(out.Bytes()), Options{})
	require.NoError(b, err)
	n, err := io.Copy(io.Discard, z)
	require.NoError(b, err)
	return out.Bytes(), n
}

// BenchmarkInflate compares this package, with and without seek points, with
// compress/gzip and with klauspost's flate and its checkpoints.
func BenchmarkInflate(b *testing.B) {
	gz, size := benchmarkStream(b)
	points := Options{Interval: 640 << 10, OnPoint: func(Point) error { return nil }}
	for _, engine := range []struct {
		name string
		open func(io.Reader) (io.Reader, error)
	}{
		{"this", func(r io.Reader) (io.Reader, error) { return NewReader(r, Options{}) }},
		{"this+points", func(r io.Reader) (io.Reader, error) { return NewReader(r, points) }},
		{"std", func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
		{"klauspost", func(r io.Reader) (io.Reader, error) { return kgzip.NewReader(r) }},
		{"klauspost+checkpoints", func(r io.Reader) (io.Reader, error) {
			// A gzip header of 10 bytes, as compress/gzip writes it; no CRC is computed.
			if _, err := io.CopyN(io.Discard, r, 10); err != nil {
				return nil, err
			}
			return flate.NewReaderOpts(r, flate.WithEobCallback(func(flate.InflateCheckpoint) {})), nil
		}},
	} {
		b.Run(engine.name, func(b *testing.B) {
			buf := make([]byte, 256<<10)
			b.SetBytes(size)
			for b.Loop() {
				r, err := engine.open(bytes.NewReader(gz))
				require.NoError(b, err)
				n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf)
				require.NoError(b, err)
				require.Equal(b, size, n)
			}
		})
	}
}
