package inflate

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/require"
)

// decodeStd is the reference: what compress/gzip makes of a stream.
func decodeStd(gz []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(gz))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

func decode(r io.Reader, opts Options) ([]byte, error) {
	z, err := NewReader(r, opts)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

// withBits returns a gzip stream whose DEFLATE part begins with the given bits,
// written in stream order.
func withBits(bits string) []byte {
	w := newStreamWriter(0)
	for _, b := range bits {
		if b != ' ' {
			w.put(uint(b-'0'), 1)
		}
	}
	w.align()
	return append(w.gz, make([]byte, 64)...)
}

func TestCorrupt(t *testing.T) {
	hello := stdGzip(t, gzip.DefaultCompression, []byte("hello, hello, hello"))
	altered := func(i int, b byte) []byte {
		gz := bytes.Clone(hello)
		gz[(i+len(gz))%len(gz)] ^= b
		return gz
	}
	// Dynamic blocks: HLIT, HDIST, HCLEN, then the code length code's lengths
	// in the order 16 17 18 0 8 7 9 6 10 5 11 4 12 3 13 2 14 1 15.
	const dynamic = "1 01 00000 00000 0111 "
	tests := []struct {
		name string
		gz   []byte
		in   In
		out  Out
		what error
	}{
		{"empty", nil, 0, 0, io.ErrUnexpectedEOF},
		{"half a header", hello[:5], 5, 0, io.ErrUnexpectedEOF},
		{"no magic", altered(0, 1), 10, 0, errHeader},
		{"unknown method", altered(2, 1), 10, 0, errHeader},
		{"checksum", altered(-8, 1), In(len(hello)), 19, errChecksum},
		{"size", altered(-1, 1), In(len(hello)), 19, errChecksum},
		{"half a trailer", hello[:len(hello)-3], In(len(hello) - 3), 19, io.ErrUnexpectedEOF},
		{"trailing garbage", append(bytes.Clone(hello), make([]byte, 20)...), In(len(hello) + 10), 19, errHeader},
		{"short trailing garbage", append(bytes.Clone(hello), 0), In(len(hello) + 1), 19, io.ErrUnexpectedEOF},
		{"block type", withBits("1 11"), 10, 0, errBlockType},
		{"stored length", withBits("1 00 00000 1000000000000000 1111111111111111"), 15, 0, errStored},
		{"286 literals and lengths at most", withBits("1 01 01111 00000 0000"), 12, 0, errCodeCount},
		{"30 distances at most", withBits("1 01 00000 01111 0000"), 12, 0, errCodeCount},
		{"over-subscribed", withBits(dynamic + "100 100 100"), 18, 0, errCode},
		{"incomplete", withBits(dynamic + "100 010"), 18, 0, errCode},
		{"nothing to repeat", withBits(dynamic + "100 000 000 100" + "000 000 000 000 000 000 000 000 000 000 000 000 000 000 " + "1"), 19, 0, errRepeat},
		{"distance before the start", withBits("1 10 00110000 0000001 00001"), 12, 1, errTooFarBack},
		{"distance symbol 30", withBits("1 10 00110000 0000001 11110"), 12, 1, errSymbol},
		{"length symbol 286", withBits("1 10 00110000 11000110"), 11, 1, errSymbol},
	}
	for _, tt := range tests {
		_, err := decodeStd(tt.gz)
		require.Error(t, err, tt.name)
		data, err := decode(bytes.NewReader(tt.gz), Options{})
		var f *FormatError
		require.ErrorAs(t, err, &f, tt.name)
		require.ErrorIs(t, err, ErrCorrupt, tt.name)
		require.ErrorIs(t, err, tt.what, tt.name)
		require.Equal(t, tt.out, f.Out, tt.name)
		require.Equal(t, int(tt.out), len(data), tt.name)
		require.Equal(t, tt.in, f.In, tt.name)
	}
}

// TestTruncated cuts streams everywhere.
func TestTruncated(t *testing.T) {
	for _, s := range []stream{
		{gz: stdGzip(t, 6, mixedData(newRand(4), 3000)), data: mixedData(newRand(4), 3000)},
		{gz: stdGzip(t, 0, []byte("stored")), data: []byte("stored")},
		randomStream(17),
	} {
		for n := 0; n < len(s.gz); n += 1 + len(s.gz)/300 {
			data, err := decode(bytes.NewReader(s.gz[:n]), Options{})
			require.ErrorIs(t, err, ErrCorrupt)
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			require.True(t, bytes.HasPrefix(s.data, data))
		}
	}
}

// TestSourceError wants the source's own error, behind all that could be decoded.
func TestSourceError(t *testing.T) {
	broken := errors.New("connection reset")
	data := mixedData(newRand(5), 100_000)
	gz := stdGzip(t, 6, data)
	for _, cause := range []error{broken, io.ErrUnexpectedEOF, errors.Join(io.EOF)} {
		for n := 0; n < len(gz); n += 1 + n/10 {
			var s bytes.Reader
			s.Reset(gz[:n])
			got, err := decode(io.MultiReader(&s, iotest.ErrReader(cause)), Options{})
			require.Same(t, cause, err)
			require.NotErrorIs(t, err, ErrCorrupt)
			require.Len(t, got, decodable(t, gz[:n]))
		}
	}
}

func TestNoProgress(t *testing.T) {
	_, err := NewReader(io.MultiReader(emptyReader{}), Options{})
	require.ErrorIs(t, err, io.ErrNoProgress)
}

type emptyReader struct{}

func (emptyReader) Read([]byte) (int, error) { return 0, nil }

func TestOnPointError(t *testing.T) {
	stop := errors.New("stop")
	data := mixedData(newRand(6), 300_000)
	calls := 0
	got, err := decode(bytes.NewReader(stdGzip(t, 6, data)), Options{Interval: 50_000, OnPoint: func(p Point) error {
		if calls++; calls == 3 {
			return stop
		}
		return nil
	}})
	require.Same(t, stop, err)
	require.Equal(t, 3, calls)
	require.True(t, bytes.HasPrefix(data, got))
	require.GreaterOrEqual(t, len(got), 2*50_000*3/4+WindowSize)
}

func TestUnusablePoint(t *testing.T) {
	fixed := []byte{typeFixed << 1}
	for _, p := range []Point{
		{In: -1},
		{Out: -1},
		{In: maxOffset + 1},
		{Out: maxOffset + 1},
		{Bit: 8},
		{Out: 1, Window: make([]byte, 2)},
		{Out: 1 << 20, Window: make([]byte, WindowSize+1)},
		{State: make([]byte, MaxState+1)},
		{State: []byte{0xff}},                // invalid block type
		{State: []byte{typeDynamic << 1}},    // truncated
		{State: append(fixed, 0)},            // more than a header
		{State: []byte{0, 1, 0, 0xff, 0xff}}, // stored, lengths differ
	} {
		_, err := Resume(bytes.NewReader(make([]byte, 100)), p)
		require.ErrorIs(t, err, errPoint)
		require.ErrorIs(t, err, ErrCorrupt)
	}
	_, err := Resume(bytes.NewReader(nil), Point{Bit: 3})
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
}

// TestResumeTooFarBack: behind a seek point a match may reach bytes that the
// window lacks, but not before the start of the stream.
func TestResumeTooFarBack(t *testing.T) {
	w := newStreamWriter(0)
	w.gz = nil
	w.header(true, 1)
	w.put(0b1000000, 7) // length 3
	w.put(0b01000, 5)   // distance symbol 2: distance 3
	w.put(0, 7)         // end of block
	w.align()
	w.gz = append(w.gz, make([]byte, 8)...)
	z, err := Resume(bytes.NewReader(w.gz), Point{Out: 3, In: 10, Window: []byte{'x'}})
	require.NoError(t, err)
	data, err := io.ReadAll(z)
	require.NoError(t, err)
	require.Equal(t, []byte{0, 0, 'x'}, data)

	z, err = Resume(bytes.NewReader(w.gz), Point{Out: 2, In: 10, Window: []byte{'x'}})
	require.NoError(t, err)
	_, err = io.ReadAll(z)
	require.ErrorIs(t, err, errTooFarBack)
}

// TestMembersStandAlone: a match does not reach into the member before.
func TestMembersStandAlone(t *testing.T) {
	gz := append(stdGzip(t, 6, []byte("first")), withBits("1 10 0000001 00000 0000000")...)
	_, err := decode(bytes.NewReader(gz), Options{})
	require.ErrorIs(t, err, errTooFarBack)
}

// TestHeaderFields compares headers with all flags to compress/gzip's reading.
func TestHeaderFields(t *testing.T) {
	body := stdGzip(t, 6, []byte("body"))[10:]
	for flags := range 32 {
		gz := []byte{0x1f, 0x8b, 8, byte(flags), 0, 0, 0, 0, 0, 255}
		if flags&flagExtra != 0 {
			gz = append(binary.LittleEndian.AppendUint16(gz, 3), "xyz"...)
		}
		if flags&flagName != 0 {
			gz = append(gz, "name\x00"...)
		}
		if flags&flagComment != 0 {
			gz = append(gz, "comment\x00"...)
		}
		for _, sum := range []uint16{0, headerSum(gz)} {
			full := gz
			if flags&flagHeaderCRC != 0 {
				full = binary.LittleEndian.AppendUint16(bytes.Clone(gz), sum)
			}
			full = append(bytes.Clone(full), body...)
			want, wantErr := decodeStd(full)
			got, err := decode(bytes.NewReader(full), Options{})
			require.Equal(t, wantErr == nil, err == nil, "flags %d: %v, %v", flags, wantErr, err)
			require.Equal(t, want, got)
		}
	}
}

func headerSum(header []byte) uint16 { return uint16(crc32.ChecksumIEEE(header)) }
