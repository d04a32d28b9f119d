package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"strings"
)

// sparse is a file with holes as GNU tar's --sparse --format=posix writes it. Package archive/tar reads this, but does
// not write it.
type sparse struct {
	name    string
	version string // of the format: 0.0, 0.1 or 1.0
	size    int64
	pieces  []piece
}

// piece is data in a sparse file.
type piece struct {
	pos  int64
	data string
}

// WriteSparse is a layer with a file of each version, and one that has nothing but a hole. All have the same content
// otherwise: two pieces of data, one of them at the end, in 64 MiB.
func WriteSparse(w io.Writer) error {
	const size = 64<<20 + 100
	pieces := []piece{{4096, strings.Repeat("x", 4096)}, {8 << 20, strings.Repeat("text ", 1<<16)[:256<<10]}, {size - 100, strings.Repeat("y", 100)}}
	return sparseLayer(w,
		sparse{"sparse-0.0", "0.0", size, pieces},
		sparse{"sparse-0.1", "0.1", size, pieces},
		sparse{"sparse-1.0", "1.0", size, pieces},
		sparse{"sparse-hole", "1.0", size, []piece{{size, ""}}},
	)
}

// writeOddSparse has data that starts and ends inside a block: an extent that no file system can map.
func writeOddSparse(w io.Writer) error {
	return sparseLayer(w, sparse{"sparse-odd", "1.0", 100_000, []piece{{100, "odd"}, {5000, "odder"}}})
}

// WriteHole is a layer with a file of 9 GiB that has nothing but a hole.
func WriteHole(w io.Writer) error {
	const size = 9 << 30
	return sparseLayer(w, sparse{"hole-9G", "1.0", size, []piece{{size, ""}}})
}

// writeHugeHole has files whose holes nobody unpacks.
func writeHugeHole(w io.Writer) error {
	const gib, mib = 1 << 30, 1 << 20
	text := strings.Repeat("12345678", mib/8)
	return sparseLayer(w,
		sparse{"huge-8G", "1.0", 8*gib + 5, []piece{{8 * mib, text}, {8 * gib, "the e"}}},
		sparse{"huge-1T", "1.0", 1024 * gib, []piece{{512 * gib, text}, {1024*gib - mib, text}}},
	)
}

func sparseLayer(w io.Writer, files ...sparse) error {
	for _, f := range files {
		if err := f.write(w); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return tar.NewWriter(w).Close()
}

// write writes the file's two entries: records that describe it, and its data.
func (s *sparse) write(w io.Writer) error {
	records, body := s.records(), ""
	if s.version == "1.0" {
		body = fmt.Sprintln(len(s.pieces))
		for _, p := range s.pieces {
			body += fmt.Sprintf("%d\n%d\n", p.pos, len(p.data))
		}
		body += strings.Repeat("\x00", -len(body)&511)
	}
	for _, p := range s.pieces {
		body += p.data
	}
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, f := range []struct{ name, body string }{{"PaxHeaders.0/" + s.name, records}, {"GNUSparseFile.0/" + s.name, body}} {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o644, Size: int64(len(f.body)), ModTime: Epoch.Truncate(1e9), Format: tar.FormatUSTAR}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.WriteString(tw, f.body); err != nil {
			return err
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	// The first of the two describes the second.
	retype(b.Bytes()[:512], tar.TypeXHeader)
	_, err := w.Write(b.Bytes())
	return err
}

// records are the file's PAX records, with its name and, but for version 1.0, its map.
func (s *sparse) records() string {
	var numbers []string
	pairs := ""
	for _, p := range s.pieces {
		numbers = append(numbers, fmt.Sprint(p.pos), fmt.Sprint(len(p.data)))
		pairs += paxRecord("GNU.sparse.offset", fmt.Sprint(p.pos)) + paxRecord("GNU.sparse.numbytes", fmt.Sprint(len(p.data)))
	}
	size, count := fmt.Sprint(s.size), paxRecord("GNU.sparse.numblocks", fmt.Sprint(len(s.pieces)))
	switch s.version {
	case "0.0":
		return paxRecord("path", s.name) + paxRecord("GNU.sparse.size", size) + count + pairs
	case "0.1":
		return paxRecord("GNU.sparse.name", s.name) + paxRecord("GNU.sparse.size", size) + count +
			paxRecord("GNU.sparse.map", strings.Join(numbers, ","))
	default:
		return paxRecord("GNU.sparse.major", "1") + paxRecord("GNU.sparse.minor", "0") +
			paxRecord("GNU.sparse.name", s.name) + paxRecord("GNU.sparse.realsize", size)
	}
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
