package layer_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// sparseFile is a sparse file in all three versions, one after the other.
func sparseFiles(t *testing.T, size int64, pieces ...testimage.Piece) []byte {
	t.Helper()
	var data []byte
	for _, version := range []string{"0.0", "0.1", "1.0"} {
		s := testimage.Sparse{Header: tar.Header{Typeflag: tar.TypeReg, Name: "f" + version, Mode: 0o640}, Version: version, Size: size, Pieces: pieces}
		data = append(data, s.Bytes(t)...)
		data = append(data, testimage.Tar(t, testimage.Reg("plain", "plain"))[:1024]...)
	}
	return append(data, make([]byte, 1024)...)
}

// piece is n blocks of text at a position, and some bytes.
func piece(pos int64, blocks, bytes int) testimage.Piece {
	text := fmt.Sprintf("at %d, ", pos)
	return testimage.Piece{Pos: pos, Data: strings.Repeat(text, blocks*512/len(text)+bytes+1)[:blocks*512+bytes]}
}

// requireContents reads every file of an index as its extents say, and
// compares with what archive/tar reads, which is what containerd unpacks.
func requireContents(t *testing.T, x *layer.Index, data []byte) {
	t.Helper()
	tr := tar.NewReader(bytes.NewReader(data))
	for _, e := range x.Entries {
		h, err := tr.Next()
		for ; err == nil && h.Typeflag == tar.TypeXGlobalHeader; h, err = tr.Next() {
		}
		require.NoError(t, err)
		require.Equal(t, h.Name, e.Name)
		require.Equal(t, h.Size, e.Size)
		want, err := io.ReadAll(tr)
		require.NoError(t, err)
		got := make([]byte, e.Size)
		extents := e.Extents
		if e.Type == layer.TypeReg {
			extents = []layer.Extent{{Len: e.Size, Off: e.Off}}
		}
		for _, x := range extents {
			copy(got[x.Pos:x.End()], data[x.Off:])
		}
		require.True(t, bytes.Equal(want, got), "content of %q", e.Name)
	}
	_, err := tr.Next()
	require.Equal(t, io.EOF, err)
}

// noHole as a number of extents means an ordinary file.
const noHole = -1

func TestSparse(t *testing.T) {
	many := make([]testimage.Piece, 3000)
	for i := range many {
		many[i] = piece(int64(i)*1024, 1, 0)
	}
	for name, c := range map[string]struct {
		size   int64
		pieces []testimage.Piece
		want   int // extents
	}{
		"hole in the middle": {1 << 20, []testimage.Piece{piece(0, 8, 0), piece(1<<20-4096, 8, 0)}, 2},
		"hole at the start":  {10_000, []testimage.Piece{piece(8192, 3, 10_000-8192-3*512)}, 1},
		"hole at the end":    {1 << 20, []testimage.Piece{piece(0, 8, 0), {Pos: 1 << 20}}, 1},
		"all hole":           {1 << 20, []testimage.Piece{{Pos: 1 << 20}}, 0},
		"no hole":            {4097, []testimage.Piece{piece(0, 8, 1)}, noHole},
		"two without a hole": {4096, []testimage.Piece{piece(0, 4, 0), piece(2048, 4, 0)}, noHole},
		"nothing":            {0, []testimage.Piece{{Pos: 0}}, noHole},
		"empty pieces":       {8192, []testimage.Piece{{Pos: 0}, piece(4096, 1, 0), {Pos: 5000}, {Pos: 8192}}, 1},
		"touching pieces":    {8192, []testimage.Piece{piece(512, 1, 0), piece(1024, 2, 0), piece(4096, 8, 0)}, 2},
		"part of a block":    {1<<20 + 1, []testimage.Piece{piece(1<<20, 0, 1)}, 1},
		"many pieces":        {3 << 20, many, 3000},
	} {
		t.Run(name, func(t *testing.T) {
			data := sparseFiles(t, c.size, c.pieces...)
			for name, blob := range map[string][]byte{"plain": data, "gzip": testimage.Gzip(t, 1, data)} {
				x := mustBuild(t, blob)
				require.Len(t, x.Entries, 6, name)
				e := x.Entries[0]
				require.EqualValues(t, 0o640, e.Mode)
				if c.want == noHole {
					require.EqualValues(t, layer.TypeReg, e.Type)
				} else {
					require.EqualValues(t, layer.TypeSparse, e.Type)
					require.Len(t, e.Extents, c.want)
				}
				requireContents(t, x, data)
				requireRoundTrip(t, x)
			}
		})
	}
}

// Holes of a size that nobody unpacks.
func TestSparseHuge(t *testing.T) {
	const tib = 1 << 40
	for name, c := range map[string]struct {
		size   int64
		pieces []testimage.Piece
	}{
		"8 GiB":                  {8<<30 + 7, []testimage.Piece{piece(4096, 8, 0), piece(8<<30-1<<20, 2048, 7)}},
		"1 TiB":                  {tib, []testimage.Piece{piece(0, 2048, 0), piece(tib-1<<20, 2048, 0)}},
		"1 TiB of nothing":       {tib, []testimage.Piece{{Pos: tib}}},
		"as large as can be":     {math.MaxInt64, nil},
		"1 TiB with a small end": {tib + 5, []testimage.Piece{piece(tib, 0, 5)}},
	} {
		t.Run(name, func(t *testing.T) {
			s := testimage.Sparse{Header: tar.Header{Typeflag: tar.TypeReg, Name: "f"}, Version: "1.0", Size: c.size, Pieces: c.pieces}
			data := append(s.Bytes(t), make([]byte, 1024)...)
			x, err := build(t, data, small)
			if name == "as large as can be" {
				require.ErrorIs(t, err, layer.ErrUnsupported)
				return
			}
			require.NoError(t, err)
			requireRoundTrip(t, x)
			e := x.Entries[0]
			require.Equal(t, c.size, e.Size)
			for i, p := range c.pieces {
				if p.Data != "" {
					require.Equal(t, p.Pos, e.Extents[i].Pos)
					require.Equal(t, p.Data, string(data[e.Extents[i].Off:][:e.Extents[i].Len]))
				}
			}
		})
	}
}

// What cannot be read lazily, or what containerd refuses, is left to an
// ordinary unpack.
func TestSparseUnsupported(t *testing.T) {
	file := func(version string, size int64, stored string, pieces ...testimage.Piece) []byte {
		s := testimage.Sparse{Header: tar.Header{Typeflag: tar.TypeReg, Name: "f"}, Version: version, Size: size, Pieces: pieces, Stored: stored}
		return append(s.Bytes(t), make([]byte, 1024)...)
	}
	fine := file("1.0", 3<<29, "", piece(512, 1, 0)) // each takes more than half
	for name, c := range map[string]struct {
		data []byte
		says string
	}{
		"position in a block":     {file("1.0", 4096, "", piece(100, 1, 0)), "blocks"},
		"end in a block":          {file("1.0", 4096, "", piece(0, 0, 100)), "blocks"},
		"stored in a block":       {file("1.0", 9000, "", piece(0, 0, 100), piece(1024, 1, 0)), "blocks"},
		"less stored than mapped": {file("1.0", 4096, strings.Repeat("x", 512), piece(0, 2, 0)), "512 bytes of data, 1024 in its map"},
		"more stored than mapped": {file("0.1", 4096, strings.Repeat("x", 1024), piece(0, 1, 0)), "1024 bytes of data, 512 in its map"},
		"too fine for its size":   {file("1.0", 3<<30, "", piece(512, 1, 0)), "pieces"},
		"too fine together":       {append(bytes.TrimSuffix(fine, make([]byte, 1024)), fine...), "sparse files of the layer"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := build(t, c.data, small)
			require.ErrorIs(t, err, layer.ErrUnsupported)
			require.ErrorContains(t, err, c.says)
			require.ErrorContains(t, err, `entry "f"`)
		})
	}
}

// Maps that archive/tar refuses.
func TestSparseMalformed(t *testing.T) {
	for name, pieces := range map[string][]testimage.Piece{
		"overlap":         {piece(0, 2, 0), piece(512, 1, 0)},
		"order":           {piece(1024, 1, 0), piece(0, 1, 0)},
		"beyond the end":  {piece(4096, 1, 0)},
		"before the file": {piece(-512, 1, 0)},
	} {
		for _, version := range []string{"0.1", "1.0"} {
			s := testimage.Sparse{Header: tar.Header{Typeflag: tar.TypeReg, Name: "f"}, Version: version, Size: 4096, Pieces: pieces}
			_, err := build(t, append(s.Bytes(t), make([]byte, 1024)...), small)
			require.ErrorIs(t, err, tar.ErrHeader, "%s %s", name, version)
			require.True(t, damage(err), err)
		}
	}
}

// An unknown version is an ordinary file to archive/tar and containerd.
func TestSparseUnknownVersion(t *testing.T) {
	s := testimage.Sparse{Header: tar.Header{Typeflag: tar.TypeReg, Name: "f"}, Version: "2.0", Pieces: []testimage.Piece{piece(0, 1, 1)},
		Records: map[string]string{"GNU.sparse.major": "2", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9999"}}
	data := append(s.Bytes(t), make([]byte, 1024)...)
	x := mustBuild(t, data)
	require.EqualValues(t, layer.TypeReg, x.Entries[0].Type)
	requireContents(t, x, data)
}

// TestSparseHeaders has other headers around the sparse one: long names, a
// global one, a size in the records.
func TestSparseHeaders(t *testing.T) {
	long := strings.Repeat("long/", 60) + "f"
	var data []byte
	data = append(data, testimage.Retype(testimage.Tar(t, testimage.Reg("g", testimage.PAXRecord("comment", "all")))[:1024], 0, tar.TypeXGlobalHeader)...)
	data = append(data, testimage.Retype(testimage.Tar(t, testimage.Reg("L", long+"\x00"))[:1024], 0, tar.TypeGNULongName)...)
	s := testimage.Sparse{Header: tar.Header{Typeflag: tar.TypeReg, Name: "f"}, Version: "1.0", Size: 1 << 20, Pieces: []testimage.Piece{piece(4096, 8, 0)},
		Records: map[string]string{"path": long, "size": fmt.Sprint(512 + 4096), "mtime": "12.5", "SCHILY.xattr.user.a": "v"}}
	data = append(data, s.Bytes(t)...)
	s = testimage.Sparse{Header: tar.Header{Typeflag: tar.TypeReg, Name: "g"}, Version: "1.0", Size: 1 << 20, Pieces: []testimage.Piece{piece(8192, 8, 0)}}
	data = append(data, s.Bytes(t)...)
	data = append(data, make([]byte, 1024)...)
	x := mustBuild(t, data)
	require.Len(t, x.Entries, 2)
	require.Equal(t, long, x.Entries[0].Name)
	require.EqualValues(t, 500_000_000, x.Entries[0].ModNsec)
	require.Len(t, x.Entries[0].Xattrs, 1)
	requireContents(t, x, data)
}

// TestSparseRandom compares random maps with archive/tar.
func TestSparseRandom(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 3))
		pos, pieces := int64(0), []testimage.Piece(nil)
		for range r.IntN(20) {
			pos += int64(r.IntN(40)) * 512
			p := piece(pos, r.IntN(20), 0)
			pos += int64(len(p.Data))
			pieces = append(pieces, p)
		}
		if r.IntN(2) == 0 {
			p := piece(pos, 0, r.IntN(512))
			pieces, pos = append(pieces, p), pos+int64(len(p.Data))
		} else {
			pos += r.Int64N(10_000)
		}
		data := sparseFiles(t, pos, pieces...)
		requireContents(t, mustBuild(t, data), data)
	}
}

// TestSparseGNUTar reads what GNU tar itself writes.
func TestSparseGNUTar(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil {
		t.Fatal("tar is not installed")
	}
	dir := t.TempDir()
	for name, marks := range map[string][]int64{"hole": nil, "ends": {0, 1<<20 - 4}, "middle": {300 << 10, 700 << 10}, "full": {0}} {
		f, err := os.Create(filepath.Join(dir, name))
		require.NoError(t, err)
		size := int64(1 << 20)
		if name == "full" {
			size = 4
		}
		require.NoError(t, f.Truncate(size))
		for _, at := range marks {
			_, err := f.WriteAt([]byte("mark"), at)
			require.NoError(t, err)
		}
		require.NoError(t, f.Close())
	}
	for _, version := range []string{"0.0", "0.1", "1.0"} {
		data, err := exec.Command("tar", "-C", dir, "--format=posix", "--sparse", "--sparse-version="+version, "-c", "hole", "ends", "middle", "full").Output()
		require.NoError(t, err)
		x := mustBuild(t, data)
		require.Len(t, x.Entries, 4)
		sparse := 0
		for _, e := range x.Entries {
			if e.Type == layer.TypeSparse {
				sparse++
			}
		}
		require.GreaterOrEqual(t, sparse, 3, "version %s", version)
		requireContents(t, x, data)
		requireRoundTrip(t, x)
	}
	data, err := exec.Command("tar", "-C", dir, "--format=gnu", "--sparse", "-c", "hole").Output()
	require.NoError(t, err)
	_, err = build(t, data, small)
	require.ErrorIs(t, err, layer.ErrUnsupported)
}

// FuzzTar indexes tar streams: what is accepted reads as archive/tar has it.
func FuzzTar(f *testing.F) {
	for _, version := range []string{"0.0", "0.1", "1.0"} {
		s := testimage.Sparse{Header: tar.Header{Typeflag: tar.TypeReg, Name: "f"}, Version: version, Size: 9000,
			Pieces: []testimage.Piece{{Pos: 512, Data: strings.Repeat("x", 512)}, {Pos: 8192, Data: strings.Repeat("y", 808)}}}
		f.Add(append(append(s.Bytes(f), s.Bytes(f)...), make([]byte, 1024)...))
	}
	f.Add(testimage.Tar(f, testimage.Dir("d/"), testimage.Reg("d/f", "content"), testimage.Symlink("s", "t"), testimage.Link("h", "d/f")))
	f.Fuzz(func(t *testing.T, data []byte) {
		if bytes.HasPrefix(data, []byte{0x1f, 0x8b}) {
			return // the stream inside is not data
		}
		x, err := build(t, data, small)
		if err != nil {
			return
		}
		requireRoundTrip(t, x)
		for _, e := range x.Entries {
			if e.Size > 1<<20 {
				return // more than there is: holes
			}
		}
		requireContents(t, x, data)
	})
}
