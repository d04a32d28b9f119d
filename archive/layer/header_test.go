package layer

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// headers are headers that are ordinary, and ones that are not.
func headers() (ordinary, others []tar.Header) {
	now := time.Unix(1700000000, 0)
	ordinary = []tar.Header{
		{Typeflag: tar.TypeReg, Name: "a", Size: 5, Mode: 0o4755, ModTime: now},
		{Typeflag: tar.TypeReg, Name: strings.Repeat("n", 100), Size: 1<<33 - 1, Uid: 1<<21 - 1, Gid: 1<<21 - 1},
		{Typeflag: tar.TypeReg, Name: strings.Repeat("p", 100) + "/" + strings.Repeat("n", 99), Uname: "user", Gname: "group"},
		{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o1777},
		{Typeflag: tar.TypeSymlink, Name: "s", Linkname: strings.Repeat("t", 100)},
		{Typeflag: tar.TypeLink, Name: "h", Linkname: "a"},
	}
	others = []tar.Header{
		{Typeflag: tar.TypeReg, Name: strings.Repeat("n", 300)},
		{Typeflag: tar.TypeReg, Name: "ns", ModTime: now.Add(1), Format: tar.FormatPAX},
		{Typeflag: tar.TypeReg, Name: "before", ModTime: time.Unix(-1, 0), Format: tar.FormatGNU},
		{Typeflag: tar.TypeReg, Name: "large", Uid: 1 << 30},
		{Typeflag: tar.TypeReg, Name: "gnu", Format: tar.FormatGNU},
		{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3},
		{Typeflag: tar.TypeFifo, Name: "f"},
		{Typeflag: tar.TypeReg, Name: "xattr", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}},
	}
	return ordinary, others
}

// block is the first block that archive/tar writes for a header.
func block(tb testing.TB, h tar.Header) []byte {
	tb.Helper()
	var b bytes.Buffer
	require.NoError(tb, tar.NewWriter(&b).WriteHeader(&h))
	return b.Bytes()[:blockSize]
}

// sameAsTar compares an entry with what archive/tar says of its header.
func sameAsTar(tb testing.TB, b []byte, got Entry, off inflate.Out) {
	tb.Helper()
	hdr, err := tar.NewReader(io.MultiReader(bytes.NewReader(b), zeros{})).Next()
	require.NoError(tb, err)
	want, stored, err := newEntry(hdr, off, b)
	require.NoError(tb, err)
	require.Equal(tb, want, got)
	require.Equal(tb, got.Size, stored)
}

// zeros is the content of any file.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestOrdinaryEntry(t *testing.T) {
	ordinary, others := headers()
	for _, h := range ordinary {
		b := block(t, h)
		e, ok := ordinaryEntry(b, 1024)
		require.True(t, ok, h.Name)
		sameAsTar(t, b, e, 1024)
		_, ok = ordinaryEntry(b[:blockSize-1], 0)
		require.False(t, ok, "a part of a block")
		for i := range b { // whatever a byte becomes
			for _, c := range []byte{0, ' ', '0', '7', '8', 0x80, 0xff} {
				altered := bytes.Clone(b)
				altered[i] = c
				if e, ok := ordinaryEntry(altered, 1024); ok {
					sameAsTar(t, altered, e, 1024)
				}
				sign(altered)
				if e, ok := ordinaryEntry(altered, 1024); ok {
					sameAsTar(t, altered, e, 1024)
				}
			}
		}
	}
	for _, h := range others {
		_, ok := ordinaryEntry(block(t, h), 0)
		require.False(t, ok, h.Name)
	}
	_, ok := ordinaryEntry(make([]byte, blockSize), 0)
	require.False(t, ok, "end of the archive")
}

// sign makes the checksum right.
func sign(b []byte) { copy(b[fieldChecksum:fieldType], fmt.Sprintf("%06o\x00 ", checksum(b))) }

// FuzzOrdinaryEntry compares with archive/tar on blocks whose checksum is right.
func FuzzOrdinaryEntry(f *testing.F) {
	ordinary, others := headers()
	for _, h := range append(ordinary, others...) {
		f.Add(block(f, h))
	}
	full := bytes.Repeat([]byte("0"), blockSize) // no field ends
	copy(full[fieldMagic:], posixMagic)
	f.Add(full)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < blockSize {
			return
		}
		b = b[:blockSize]
		sign(b)
		if e, ok := ordinaryEntry(b, 512); ok {
			sameAsTar(t, b, e, 512)
		}
	})
}
