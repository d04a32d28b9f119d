package layer_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"log"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// blob is a layer of one file.
func blob() []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	const text = "Hello.\n"
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "etc/motd", Mode: 0o644, Size: int64(len(text))}); err != nil {
		log.Fatal(err)
	}
	if _, err := io.WriteString(w, text); err != nil {
		log.Fatal(err)
	}
	w.Close()
	z.Close()
	return b.Bytes()
}

// A file is read with the bytes of the layer that hold it. Here they come from
// memory; a registry delivers them for a range request.
func ExampleIndex_Copy() {
	b := blob()
	desc := ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
	x, err := layer.Build(context.Background(), bytes.NewReader(b), desc, layer.Options{})
	if err != nil {
		log.Fatal(err)
	}
	fetch := func(_ context.Context, off, n inflate.In) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(b[off:][:n])), nil
	}
	for _, e := range x.Entries {
		var content bytes.Buffer
		if err := x.Copy(context.Background(), &content, e.Off, e.Size, fetch); err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s: %s", e.Name, &content)
	}
	// Output:
	// etc/motd: Hello.
}
