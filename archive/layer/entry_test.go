package layer_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

func zstdFrame(tb testing.TB, data []byte) []byte {
	tb.Helper()
	w, err := zstd.NewWriter(nil)
	require.NoError(tb, err)
	return w.EncodeAll(data, nil)
}

func TestEntries(t *testing.T) {
	long := "d/" + string(bytes.Repeat([]byte("long-"), 60))
	cases := []struct {
		file testimage.File
		want layer.Entry
	}{
		{testimage.Dir("./"), layer.Entry{Name: "./", Type: layer.TypeDir, Mode: 0o755}},
		{testimage.Reg("a", "content"), layer.Entry{Name: "a", Type: layer.TypeReg, Mode: 0o644, Size: 7}},
		{testimage.Reg("empty", ""), layer.Entry{Name: "empty", Type: layer.TypeReg, Mode: 0o644}},
		{testimage.Symlink("s", "../a"), layer.Entry{Name: "s", Type: layer.TypeSymlink, Mode: 0o777, Link: "../a"}},
		{testimage.Link("/h", "./a"), layer.Entry{Name: "/h", Type: layer.TypeLink, Mode: 0o644, Link: "./a"}},
		{
			testimage.File{Header: tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}},
			layer.Entry{Name: "null", Type: layer.TypeChar, Mode: 0o666, DevMajor: 1, DevMinor: 3},
		},
		{
			testimage.File{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "disk", Devmajor: 1<<32 - 1, Devminor: 1 << 20, Format: tar.FormatGNU}},
			layer.Entry{Name: "disk", Type: layer.TypeBlock, DevMajor: 1<<32 - 1, DevMinor: 1 << 20},
		},
		{testimage.File{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "pipe"}}, layer.Entry{Name: "pipe", Type: layer.TypeFifo}},
		{testimage.Reg("d/.wh.gone", ""), layer.Entry{Name: "d/.wh.gone", Type: layer.TypeReg, Mode: 0o644}},
		{testimage.Reg("d/.wh..wh..opq", ""), layer.Entry{Name: "d/.wh..wh..opq", Type: layer.TypeReg, Mode: 0o644}},
		{testimage.Reg(long, "x"), layer.Entry{Name: long, Type: layer.TypeReg, Mode: 0o644, Size: 1}},
		{
			testimage.File{Header: tar.Header{Typeflag: tar.TypeReg, Name: "b\xffin\xfe", Mode: 0o107755, Format: tar.FormatGNU}, Data: "setuid"},
			layer.Entry{Name: "b\xffin\xfe", Type: layer.TypeReg, Mode: 0o7755, Size: 6},
		},
		{
			testimage.File{Header: tar.Header{Typeflag: tar.TypeReg, Name: "owner", Uid: 1<<32 - 2, Gid: 3_000_000_000}},
			layer.Entry{Name: "owner", Type: layer.TypeReg, UID: 1<<32 - 2, GID: 3_000_000_000},
		},
		{
			testimage.File{Header: tar.Header{Typeflag: tar.TypeReg, Name: "time", ModTime: time.Unix(1700000000, 123456789), Format: tar.FormatPAX}},
			layer.Entry{Name: "time", Type: layer.TypeReg, ModTime: 1700000000, ModNsec: 123456789},
		},
		{
			testimage.File{Header: tar.Header{Typeflag: tar.TypeReg, Name: "old", ModTime: time.Unix(-5, 250000000), Format: tar.FormatPAX}},
			layer.Entry{Name: "old", Type: layer.TypeReg, ModTime: -5, ModNsec: 250000000},
		},
		{
			testimage.File{Header: tar.Header{Typeflag: tar.TypeReg, Name: "xattrs", Format: tar.FormatPAX, PAXRecords: map[string]string{
				"SCHILY.xattr.user.z": "1", "SCHILY.xattr.security.capability": "\x01\x00\xff=\n", "SCHILY.xattr.user.empty": "", "comment": "no xattr",
			}}, Data: "data"},
			layer.Entry{Name: "xattrs", Type: layer.TypeReg, Size: 4, Xattrs: []layer.Xattr{
				{Name: "security.capability", Value: "\x01\x00\xff=\n"}, {Name: "user.empty"}, {Name: "user.z", Value: "1"},
			}},
		},
	}
	var files []testimage.File
	for _, c := range cases {
		files = append(files, c.file)
	}
	data := testimage.Tar(t, files...)
	for name, blob := range blobs(t, data) {
		x := mustBuild(t, blob)
		require.Len(t, x.Entries, len(cases), name)
		for i, c := range cases {
			got := x.Entries[i]
			if got.Type == layer.TypeReg {
				require.Equal(t, c.file.Data, string(data[got.Off:][:got.Size]), "%s: content of %q", name, got.Name)
			}
			got.Off = 0
			require.Equal(t, c.want, got, name)
		}
	}
	requireRoundTrip(t, mustBuild(t, data))
}

// Global PAX headers are no entries.
func TestEntriesGlobalHeader(t *testing.T) {
	global := testimage.File{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "g", PAXRecords: map[string]string{"comment": "commit"}}}
	x := mustBuild(t, testimage.Tar(t, global, testimage.Reg("a", "b")))
	require.Len(t, x.Entries, 1)
	require.EqualValues(t, 3*512, x.Entries[0].Off)
}

func TestUnsupportedEntries(t *testing.T) {
	for name, data := range map[string][]byte{
		"sparse, old GNU":  testimage.Retype(testimage.Tar(t, testimage.File{Header: tar.Header{Name: "f", Typeflag: '0', Format: tar.FormatGNU, ModTime: time.Unix(1<<40, 0)}}), 0, 'S'),
		"contiguous":       testimage.Retype(testimage.Tar(t, testimage.Reg("f", "x")), 0, '7'),
		"unknown type":     testimage.Retype(testimage.Tar(t, testimage.Reg("f", "x")), 0, 'Z'),
		"no owner":         testimage.Tar(t, testimage.File{Header: tar.Header{Name: "f", Uid: 1<<32 - 1}}),
		"no group":         testimage.Tar(t, testimage.File{Header: tar.Header{Name: "f", Gid: 1 << 32}}),
		"negative owner":   testimage.Tar(t, testimage.File{Header: tar.Header{Name: "f", Uid: -1, Format: tar.FormatGNU}}),
		"big device":       testimage.Tar(t, testimage.File{Header: tar.Header{Name: "f", Typeflag: tar.TypeChar, Devmajor: 1 << 32, Format: tar.FormatGNU}}),
		"large xattr":      testimage.Tar(t, testimage.File{Header: tar.Header{Name: "f", PAXRecords: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("v", 65536)}}}),
		"many xattrs":      testimage.Tar(t, testimage.File{Header: tar.Header{Name: "f", PAXRecords: largeXattrs(5)}}),
		"negative device ": testimage.Tar(t, testimage.File{Header: tar.Header{Name: "f", Typeflag: tar.TypeBlock, Devminor: -1, Format: tar.FormatGNU}}),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := build(t, data, small)
			require.ErrorIs(t, err, layer.ErrUnsupported)
			require.ErrorContains(t, err, `entry "f"`)
		})
	}
}

func largeXattrs(n int) map[string]string {
	records := map[string]string{}
	for i := range n {
		records[fmt.Sprint("SCHILY.xattr.user.", i)] = strings.Repeat("v", 65535)
	}
	return records
}

func requireRoundTrip(tb testing.TB, x *layer.Index) {
	tb.Helper()
	y, err := layer.DecodeSpans(x.AppendSpans(nil))
	require.NoError(tb, err)
	if y.Windows = x.Windows; len(x.Groups) > 0 {
		require.NoError(tb, y.DecodePoints(x.AppendPoints(nil)))
	}
	require.NoError(tb, y.DecodeEntries(x.AppendEntries(nil)))
	if !reflect.DeepEqual(x, y) {
		tb.Fatal("the index is not what it was before encoding")
	}
}
