package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"strings"
)

// WriteSparse writes a layer with a file of 3 MiB that has two pieces of data and holes around them, as GNU tar's
// --sparse --format=posix does. Package archive/tar reads this, but does not write it.
func WriteSparse(w io.Writer) error {
	pieces := strings.Repeat("x", 512) + strings.Repeat("y", 512)
	// Number of pieces, then offset and length of each, padded to a block.
	data := fmt.Sprintf("%-512s", "2\n4096\n512\n1048576\n512\n")
	data = strings.ReplaceAll(data, " ", "\x00") + pieces

	var records strings.Builder
	for _, r := range [][2]string{
		{"GNU.sparse.major", "1"}, {"GNU.sparse.minor", "0"}, {"GNU.sparse.name", "sparse"}, {"GNU.sparse.realsize", "3145728"},
	} {
		records.WriteString(paxRecord(r[0], r[1]))
	}
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, f := range []struct{ name, body string }{
		{"PaxHeaders.0/sparse", records.String()},
		{"GNUSparseFile.0/sparse", data},
	} {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o644, Size: int64(len(f.body)), ModTime: Epoch.Truncate(1e9), Format: tar.FormatUSTAR}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.WriteString(tw, f.body); err != nil {
			return err
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	// The first of the two describes the second.
	retype(b.Bytes()[:512], tar.TypeXHeader)
	_, err := w.Write(b.Bytes())
	return err
}

// paxRecord is "LENGTH KEY=VALUE\n", where the length counts its own digits.
func paxRecord(key, value string) string {
	rest := " " + key + "=" + value + "\n"
	length := len(rest)
	for len(fmt.Sprint(length))+len(rest) != length {
		length = len(fmt.Sprint(length)) + len(rest)
	}
	return fmt.Sprint(length) + rest
}

// retype changes the type in a header block, and its checksum: the sum of all bytes, the checksum's own being blanks.
func retype(block []byte, typeflag byte) {
	block[156] = typeflag
	sum := 0
	copy(block[148:156], "        ")
	for _, c := range block {
		sum += int(c)
	}
	copy(block[148:156], fmt.Sprintf("%06o\x00 ", sum))
}
