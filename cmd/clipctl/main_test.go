package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/internal/testutil"
)

// TestMain is clipctl itself where a test runs it.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_IS_CLIPCTL") != "" {
		main()
	}
	os.Exit(m.Run())
}

// TestSignals ends clipctl while it reads a layer that would take it long: it says so and leaves nothing.
func TestSignals(t *testing.T) {
	const piece, pieces = 4 << 20, 4096
	var head bytes.Buffer
	require.NoError(t, tar.NewWriter(&head).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: piece * pieces, Format: tar.FormatPAX}))
	blob := append(testutil.Gzip(t, head.Bytes()), bytes.Repeat(testutil.Gzip(t, make([]byte, piece)), pieces)...)
	img := testutil.NewImage(t, nil)
	manifest := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{img.Blobs.Add(ocispec.MediaTypeImageLayerGzip, blob)}}
	manifest.SchemaVersion, manifest.Config = 2, img.Blobs.Add(ocispec.MediaTypeImageConfig, img.Config)
	img.Descriptor = img.Blobs.Add(ocispec.MediaTypeImageManifest, testutil.JSON(t, manifest))
	layout := t.TempDir()
	img.WriteLayout(t, layout)

	for _, signal := range []os.Signal{unix.SIGINT, unix.SIGTERM} {
		t.Run(signal.String(), func(t *testing.T) {
			scratch, cache, out := t.TempDir(), t.TempDir(), t.TempDir()
			cmd := exec.Command("/proc/self/exe", "index", "oci:"+layout, "-o", filepath.Join(out, "a.clip"), "--storage-ref", "example.com/app:1", "--cache-dir", cache)
			cmd.Env = append(os.Environ(), "TEST_IS_CLIPCTL=1", "TMPDIR="+scratch)
			var said bytes.Buffer
			cmd.Stderr = &said
			require.NoError(t, cmd.Start())
			reading := func() bool {
				fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", cmd.Process.Pid))
				for _, fd := range fds {
					if file, _ := os.Readlink(fd); file == testutil.BlobPath(layout, manifest.Layers[0].Digest) {
						return true
					}
				}
				return false
			}
			require.Eventually(t, reading, time.Minute, time.Millisecond)
			require.NoError(t, cmd.Process.Signal(signal))
			var exit *exec.ExitError
			require.ErrorAs(t, cmd.Wait(), &exit)
			require.Equal(t, 1, exit.ExitCode(), said.String())
			require.Contains(t, said.String(), "signal")
			for _, dir := range []string{scratch, out, cache} {
				left, err := os.ReadDir(dir)
				require.NoError(t, err)
				require.Empty(t, left)
			}
		})
	}
}
