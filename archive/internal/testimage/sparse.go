package testimage

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
)

// Sparse is a sparse file as GNU tar's --sparse --format=posix writes it,
// which archive/tar reads and does not write.
type Sparse struct {
	tar.Header        // what fits a plain header; records go to Records
	Version    string // of the sparse format: 0.0, 0.1 or 1.0
	Size       int64
	Pieces     []Piece
	Records    map[string]string // further PAX records
	Stored     string            // what is stored instead of the pieces' data, if anything
}

// Piece is data in a sparse file.
type Piece struct {
	Pos  int64
	Data string
}

// Content is the file's content as a reader sees it.
func (s *Sparse) Content() string {
	b := make([]byte, s.Size)
	for _, p := range s.Pieces {
		copy(b[p.Pos:], p.Data)
	}
	return string(b)
}

// Bytes is the entry in a tar stream: two headers, map and data.
func (s *Sparse) Bytes(tb testing.TB) []byte {
	tb.Helper()
	records := s.records()
	body := s.Stored
	if body == "" {
		for _, p := range s.Pieces {
			body += p.Data
		}
	}
	if s.Version == "1.0" {
		text := fmt.Sprintln(len(s.Pieces))
		for _, p := range s.Pieces {
			text += fmt.Sprintf("%d\n%d\n", p.Pos, len(p.Data))
		}
		body = text + strings.Repeat("\x00", -len(text)&511) + body
	}
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, h := range []struct {
		tar.Header
		body string
	}{{tar.Header{Typeflag: tar.TypeReg, Name: "PaxHeaders.0/sparse"}, records}, {s.Header, body}} {
		h.Size, h.Format = int64(len(h.body)), tar.FormatUSTAR
		if err := tw.WriteHeader(&h.Header); err != nil {
			tb.Fatalf("%q: %v", h.Name, err)
		}
		if _, err := io.WriteString(tw, h.body); err != nil {
			tb.Fatal(err)
		}
	}
	if err := tw.Flush(); err != nil {
		tb.Fatal(err)
	}
	return Retype(b.Bytes(), 0, tar.TypeXHeader)
}

func (s *Sparse) records() string {
	var b strings.Builder
	put := func(key string, value any) { b.WriteString(PAXRecord(key, fmt.Sprint(value))) }
	switch s.Version {
	case "0.0":
		put("GNU.sparse.size", s.Size)
		put("GNU.sparse.numblocks", len(s.Pieces))
		for _, p := range s.Pieces {
			put("GNU.sparse.offset", p.Pos)
			put("GNU.sparse.numbytes", len(p.Data))
		}
	case "0.1":
		numbers := make([]string, 0, 2*len(s.Pieces))
		for _, p := range s.Pieces {
			numbers = append(numbers, fmt.Sprint(p.Pos), fmt.Sprint(len(p.Data)))
		}
		put("GNU.sparse.size", s.Size)
		put("GNU.sparse.numblocks", len(s.Pieces))
		put("GNU.sparse.map", strings.Join(numbers, ","))
	case "1.0":
		put("GNU.sparse.major", 1)
		put("GNU.sparse.minor", 0)
		put("GNU.sparse.realsize", s.Size)
	}
	for _, key := range slices.Sorted(maps.Keys(s.Records)) {
		put(key, s.Records[key])
	}
	return b.String()
}

// PAXRecord is "LENGTH KEY=VALUE\n", where the length counts its own digits.
func PAXRecord(key, value string) string {
	rest := " " + key + "=" + value + "\n"
	n := len(rest)
	for len(fmt.Sprint(n))+len(rest) != n {
		n = len(fmt.Sprint(n)) + len(rest)
	}
	return fmt.Sprint(n) + rest
}

// Retype changes the type of the header at off in a tar stream, in place.
func Retype(data []byte, off int, typeflag byte) []byte {
	h := data[off : off+512]
	h[156] = typeflag
	copy(h[148:156], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return data
}
