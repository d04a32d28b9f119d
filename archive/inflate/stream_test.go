package inflate

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	kgzip "github.com/klauspost/compress/gzip"
	"github.com/stretchr/testify/require"
)

// stream is a gzip stream and what it decompresses to.
type stream struct {
	name     string
	gz, data []byte
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }

// mixedData looks like what layers hold, in miniature: text, records, runs and
// bytes that do not compress.
func mixedData(rng *rand.Rand, size int) []byte {
	words := make([][]byte, 2000)
	for i := range words {
		words[i] = make([]byte, 2+rng.IntN(9))
		for j := range words[i] {
			words[i][j] = byte('a' + min(rng.IntN(26), rng.IntN(26)))
		}
	}
	var b []byte
	for len(b) < size {
		switch rng.IntN(8) {
		case 0:
			b = append(b, bytes.Repeat([]byte{byte(rng.IntN(3))}, rng.IntN(3000))...)
		case 1:
			for range rng.IntN(600) {
				b = append(b, byte(rng.Uint32()))
			}
		case 2, 3:
			for i := range rng.IntN(400) {
				b = binary.LittleEndian.AppendUint32(b, uint32(0x4000+i*rng.IntN(40)))
				b = append(b, 0xe8, byte(rng.IntN(8)), 0, 0)
			}
		default:
			for range rng.IntN(1500) {
				b = append(b, words[min(rng.IntN(len(words)), rng.IntN(len(words)))]...)
				b = append(b, " \n"[rng.IntN(2)])
			}
		}
	}
	return b[:size]
}

func compress(t testing.TB, open func(io.Writer) (io.WriteCloser, error), data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := open(&b)
	require.NoError(t, err)
	_, err = w.Write(data)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return b.Bytes()
}

func stdGzip(t testing.TB, level int, data []byte) []byte {
	t.Helper()
	return compress(t, func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriterLevel(w, level) }, data)
}

func klauspostGzip(t testing.TB, level int, data []byte) []byte {
	t.Helper()
	return compress(t, func(w io.Writer) (io.WriteCloser, error) { return kgzip.NewWriterLevel(w, level) }, data)
}

var allStreams struct {
	once sync.Once
	s    []stream
}

// streams returns streams of every kind of writer and of none. Tests share
// them and do not change them.
func streams(t testing.TB) []stream {
	t.Helper()
	allStreams.once.Do(func() { allStreams.s = makeStreams(t) })
	require.NotEmpty(t, allStreams.s)
	return allStreams.s
}

func makeStreams(t testing.TB) []stream {
	rng := newRand(1)
	data := mixedData(rng, 500_000)
	noise := make([]byte, 150_000)
	for i := range noise {
		noise[i] = byte(rng.Uint32())
	}
	inputs := []stream{
		{name: "mixed", data: data},
		{name: "noise", data: noise},
		{name: "zeros", data: make([]byte, 300_000)},
		{name: "period7", data: bytes.Repeat([]byte("abcdefg"), 30_000)},
		{name: "short", data: []byte("hello, hello, hello")},
		{name: "empty"},
	}
	var all []stream
	for _, in := range inputs {
		add := func(writer string, gz []byte) {
			all = append(all, stream{name: in.name + "/" + writer, gz: gz, data: in.data})
		}
		for level := gzip.HuffmanOnly; level <= gzip.BestCompression; level++ {
			if in.name == "mixed" || level <= gzip.BestSpeed || level == 6 {
				add(fmt.Sprintf("std%d", level), stdGzip(t, level, in.data))
			}
		}
		for level := kgzip.StatelessCompression; level <= kgzip.BestCompression; level++ {
			if in.name == "mixed" || level == kgzip.StatelessCompression || level == 6 {
				add(fmt.Sprintf("klauspost%d", level), klauspostGzip(t, level, in.data))
			}
		}
	}
	all = append(all, flushed(t, data), members(t, data), fixedBlock(t, 400_000), storedBlocks(noise))
	for seed := range uint64(12) {
		all = append(all, randomStream(seed))
	}
	return all
}

// flushed has many blocks, and empty ones between them.
func flushed(t testing.TB, data []byte) stream {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	for part := range slices.Chunk(data, 20_011) {
		_, err := w.Write(part)
		require.NoError(t, err)
		require.NoError(t, w.Flush())
	}
	require.NoError(t, w.Close())
	return stream{name: "flushed", gz: b.Bytes(), data: data}
}

// members has one member for each part of data, an empty one among them, with
// all fields that a header can have.
func members(t testing.TB, data []byte) stream {
	var b bytes.Buffer
	parts := append(slices.Collect(slices.Chunk(data, 70_001)), nil, data[:10])
	for i, part := range parts {
		w := gzip.NewWriter(&b)
		w.Name, w.Comment, w.Extra = "name", "comment", []byte("extra")
		if i%2 == 0 {
			w.Header = gzip.Header{}
		}
		_, err := w.Write(part)
		require.NoError(t, err)
		require.NoError(t, w.Close())
	}
	return stream{name: "members", gz: b.Bytes(), data: slices.Concat(parts...)}
}

// fixedBlock is one block of the fixed codes, however long, as igzip -0 and
// klauspost's small writers make them.
func fixedBlock(t testing.TB, size int) stream {
	w := newStreamWriter(2)
	w.fixed(true, func() bool { return len(w.data) < size })
	return w.finish("fixedblock")
}

// storedBlocks has stored blocks of the greatest and the least lengths.
func storedBlocks(data []byte) stream {
	w := newStreamWriter(3)
	w.stored(false, data[:0xffff])
	w.stored(false, nil)
	w.stored(false, data[:1])
	w.stored(true, data[1:40_000])
	return w.finish("storedblocks")
}

// randomStream has random blocks of all kinds with random complete codes, up to
// the longest codewords.
func randomStream(seed uint64) stream {
	w := newStreamWriter(100 + seed)
	blocks := 2 + w.rng.IntN(12)
	for i := range blocks {
		final := i == blocks-1
		symbols := w.rng.IntN(8_000)
		more := func() bool { symbols--; return symbols >= 0 }
		switch w.rng.IntN(6) {
		case 0:
			raw := make([]byte, w.rng.IntN(0x10000))
			for i := range raw {
				raw[i] = byte(w.rng.Uint32())
			}
			w.stored(final, raw)
		case 1:
			w.fixed(final, more)
		default:
			w.dynamic(final, more)
		}
	}
	return w.finish(fmt.Sprintf("random%d", seed))
}

// streamWriter writes a gzip stream of one member, symbol by symbol.
type streamWriter struct {
	rng  *rand.Rand
	gz   []byte
	bits uint64
	n    uint
	data []byte
}

func newStreamWriter(seed uint64) *streamWriter {
	return &streamWriter{rng: newRand(seed), gz: []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}}
}

func (w *streamWriter) put(v uint, n uint) {
	w.bits |= uint64(v) << w.n
	for w.n += n; w.n >= 8; w.n -= 8 {
		w.gz = append(w.gz, byte(w.bits))
		w.bits >>= 8
	}
}

func (w *streamWriter) align() { w.put(0, -w.n&7) }

func (w *streamWriter) finish(name string) stream {
	w.align()
	w.gz = binary.LittleEndian.AppendUint32(w.gz, crc32.ChecksumIEEE(w.data))
	w.gz = binary.LittleEndian.AppendUint32(w.gz, uint32(len(w.data)))
	return stream{name: name, gz: w.gz, data: w.data}
}

func (w *streamWriter) header(final bool, blockType uint) {
	if final {
		blockType = blockType<<1 | 1
	} else {
		blockType <<= 1
	}
	w.put(blockType, 3)
}

func (w *streamWriter) stored(final bool, data []byte) {
	w.header(final, 0)
	w.align()
	w.gz = binary.LittleEndian.AppendUint16(w.gz, uint16(len(data)))
	w.gz = binary.LittleEndian.AppendUint16(w.gz, ^uint16(len(data)))
	w.gz = append(w.gz, data...)
	w.data = append(w.data, data...)
}

// codeword is held with its first bit highest, as RFC 1951 prints it.
type codeword struct{ bits, n uint }

// canonical is the algorithm of RFC 1951, section 3.2.2, word by word.
func canonical(lengths []uint8) []codeword {
	codes := make([]codeword, len(lengths))
	next := uint(0)
	for l := uint(1); l <= 15; l++ {
		next <<= 1
		for symbol := range lengths {
			if uint(lengths[symbol]) == l {
				codes[symbol] = codeword{next, l}
				next++
			}
		}
	}
	return codes
}

func (w *streamWriter) symbol(c codeword) {
	for i := c.n; i > 0; i-- {
		w.put(c.bits>>(i-1)&1, 1)
	}
}

func (w *streamWriter) fixed(final bool, more func() bool) {
	w.header(final, 1)
	litLen := slices.Concat(bytes.Repeat([]byte{8}, 144), bytes.Repeat([]byte{9}, 112),
		bytes.Repeat([]byte{7}, 24), bytes.Repeat([]byte{8}, 8))
	w.body(litLen, bytes.Repeat([]byte{5}, 32), more)
}

// The symbols of lengths and distances: base and extra bits, from the tables
// of RFC 1951, section 3.2.5.
var (
	lengthBase = []int{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258}
	lengthBits = []uint{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0}
	distBase   = []int{1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577}
	distExtra  = []uint{0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13}
)

// body writes random symbols of the given codes while more, then end of block.
func (w *streamWriter) body(litLen, dist []uint8, more func() bool) {
	litLenCodes, distCodes := canonical(litLen), canonical(dist)
	var symbols, dists []int
	for s, l := range litLen[:min(len(litLen), 286)] {
		if l != 0 && s != 256 {
			symbols = append(symbols, s)
		}
	}
	for s, l := range dist[:min(len(dist), 30)] {
		if l != 0 {
			dists = append(dists, s)
		}
	}
	for more() && len(symbols) > 0 {
		s := symbols[w.rng.IntN(len(symbols))]
		if s < 256 {
			w.symbol(litLenCodes[s])
			w.data = append(w.data, byte(s))
			continue
		}
		if len(dists) == 0 {
			continue
		}
		ds := dists[w.rng.IntN(len(dists))]
		dx := w.rng.IntN(1 << distExtra[ds])
		d := distBase[ds] + dx
		if d > len(w.data) {
			continue
		}
		s -= 257
		lx := w.rng.IntN(1 << lengthBits[s])
		w.symbol(litLenCodes[s+257])
		w.put(uint(lx), lengthBits[s])
		w.symbol(distCodes[ds])
		w.put(uint(dx), distExtra[ds])
		for range lengthBase[s] + lx {
			w.data = append(w.data, w.data[len(w.data)-d])
		}
	}
	w.symbol(litLenCodes[256])
}

// randomLengths returns the lengths of a complete code, for a random choice of
// n of the alphabet's symbols. With n = 1 it is a one-bit code.
func randomLengths(rng *rand.Rand, alphabet, n int, longest uint8) []uint8 {
	leaves := []uint8{1}
	if n > 1 {
		leaves = []uint8{1, 1}
	}
	skew := rng.IntN(3)
	for len(leaves) < n {
		i := rng.IntN(len(leaves))
		if skew > 0 && rng.IntN(5) < skew*2 {
			i = len(leaves) - 1 // lengthen the longest: a skewed code
		}
		if leaves[i] < longest {
			leaves[i]++
			leaves = append(leaves, leaves[i])
		}
	}
	lengths := make([]uint8, alphabet)
	for i, symbol := range rng.Perm(alphabet)[:n] {
		lengths[symbol] = leaves[i]
	}
	return lengths
}

func (w *streamWriter) dynamic(final bool, more func() bool) {
	w.header(final, 2)
	litLen := randomLengths(w.rng, 286, 2+w.rng.IntN(285), 15)
	if litLen[256] == 0 {
		for s, l := range litLen {
			if l != 0 {
				litLen[s], litLen[256] = 0, l
				break
			}
		}
	}
	dist := randomLengths(w.rng, 30, 1+w.rng.IntN(30), 15)
	if w.rng.IntN(8) == 0 {
		clear(dist)
	}
	numLitLen, numDist := 257, 1
	for s, l := range litLen {
		if l != 0 {
			numLitLen = max(numLitLen, s+1)
		}
	}
	for s, l := range dist {
		if l != 0 {
			numDist = max(numDist, s+1)
		}
	}
	w.put(uint(numLitLen-257), 5)
	w.put(uint(numDist-1), 5)
	w.codeLengths(slices.Concat(litLen[:numLitLen], dist[:numDist]))
	w.body(litLen, dist, more)
}

// codeLengths writes lengths, repetitions sometimes as such.
func (w *streamWriter) codeLengths(lengths []uint8) {
	type item struct{ symbol, extra, bits uint }
	var items []item
	for i := 0; i < len(lengths); {
		run := 1
		for i+run < len(lengths) && lengths[i+run] == lengths[i] {
			run++
		}
		l := uint(lengths[i])
		switch {
		case w.rng.IntN(4) == 0:
			run = 1
			items = append(items, item{symbol: l})
		case l == 0 && run >= 11:
			run = min(run, 138)
			items = append(items, item{18, uint(run - 11), 7})
		case l == 0 && run >= 3:
			run = min(run, 10)
			items = append(items, item{17, uint(run - 3), 3})
		case i > 0 && lengths[i-1] == lengths[i] && run >= 3:
			run = min(run, 6)
			items = append(items, item{16, uint(run - 3), 2})
		default:
			run = 1
			items = append(items, item{symbol: l})
		}
		i += run
	}
	var symbols []uint
	for _, it := range items {
		if !slices.Contains(symbols, it.symbol) {
			symbols = append(symbols, it.symbol)
		}
	}
	tree := randomLengths(w.rng, len(symbols), len(symbols), 7)
	precode := make([]uint8, 19)
	for i, s := range symbols {
		precode[s] = tree[i]
	}
	w.put(15, 4)
	for _, s := range []int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15} {
		w.put(uint(precode[s]), 3)
	}
	codes := canonical(precode)
	for _, it := range items {
		w.symbol(codes[it.symbol])
		w.put(it.extra, it.bits)
	}
}
