// Package testimage makes layers for the tests of archive and archive/layer.
//
// What it makes depends on nothing but its arguments: the same streams, blobs
// and descriptors every time.
package testimage

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// File is a tar entry with its content.
type File struct {
	tar.Header
	Data string
}

// Reg, Dir, Symlink and Link are the entries that most tests need.
func Reg(name, data string) File {
	return File{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data}
}

// Dir is a directory.
func Dir(name string) File {
	return File{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, ""}
}

// Symlink is a symbolic link.
func Symlink(name, target string) File {
	return File{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, ""}
}

// Link is a hard link.
func Link(name, target string) File {
	return File{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, ""}
}

// Tar writes a tar stream.
func Tar(tb testing.TB, files ...File) []byte {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := f.Header
		h.Size = int64(len(f.Data))
		if err := w.WriteHeader(&h); err != nil {
			tb.Fatalf("%q: %v", h.Name, err)
		}
		if _, err := io.WriteString(w, f.Data); err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// Gzip compresses parts into one gzip member each. The level is one of
// klauspost/compress/gzip's.
func Gzip(tb testing.TB, level int, parts ...[]byte) []byte {
	tb.Helper()
	var b bytes.Buffer
	for _, p := range parts {
		w, err := gzip.NewWriterLevel(&b, level)
		if err != nil {
			tb.Fatal(err)
		}
		if _, err := w.Write(p); err != nil {
			tb.Fatal(err)
		}
		if err := w.Close(); err != nil {
			tb.Fatal(err)
		}
	}
	return b.Bytes()
}

// Descriptor describes a blob.
func Descriptor(mediaType string, blob []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
}

// Content returns size bytes of text, records, zeros and noise.
func Content(seed uint64, size int) string {
	rng := rand.New(rand.NewPCG(seed, 1))
	words := make([]string, 500)
	for i := range words {
		w := make([]byte, 2+rng.IntN(9))
		for j := range w {
			w[j] = byte('a' + min(rng.IntN(26), rng.IntN(26)))
		}
		words[i] = string(w)
	}
	var b strings.Builder
	for b.Len() < size {
		switch rng.IntN(6) {
		case 0:
			b.Write(make([]byte, rng.IntN(4000)))
		case 1:
			for range rng.IntN(300) {
				b.Write(binary.LittleEndian.AppendUint64(nil, rng.Uint64()))
			}
		case 2:
			for i := range rng.IntN(500) {
				b.Write(binary.LittleEndian.AppendUint32(nil, uint32(0x4000+24*i)))
			}
		default:
			for range rng.IntN(1000) {
				b.WriteString(words[min(rng.IntN(len(words)), rng.IntN(len(words)))])
				b.WriteByte(' ')
			}
		}
	}
	return b.String()[:size]
}
