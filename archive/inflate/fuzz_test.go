package inflate

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"reflect"
	"testing"

	kgzip "github.com/klauspost/compress/gzip"
	"github.com/stretchr/testify/require"
)

// maxFuzzOut bounds what a fuzz target decompresses: a small input can make
// a thousand times its size.
const maxFuzzOut = 1 << 20

// fuzzSeeds are streams small enough to be mutated at speed.
func fuzzSeeds(f *testing.F) []stream {
	f.Helper()
	var small []stream
	for _, s := range streams(f) {
		if len(s.gz) < 5_000 {
			small = append(small, s)
		}
	}
	data := mixedData(newRand(9), 4_000)
	for _, level := range []int{kgzip.StatelessCompression, kgzip.HuffmanOnly, 0, 1, 6, 9} {
		small = append(small, stream{gz: klauspostGzip(f, level, data), data: data})
	}
	for seed := range uint64(20) {
		w := newStreamWriter(seed)
		symbols := 100 + 400*int(seed)
		more := func() bool { symbols--; return symbols > 0 }
		w.dynamic(false, more)
		symbols = 300
		w.fixed(false, more)
		w.stored(true, data[:100])
		small = append(small, w.finish(""))
	}
	return small
}

func addStreams(f *testing.F) {
	f.Helper()
	for _, s := range fuzzSeeds(f) {
		f.Add(s.gz)
	}
}

// readSome reads up to maxFuzzOut bytes. It reports io.EOF as no error.
func readSome(r io.Reader) ([]byte, error) {
	return io.ReadAll(io.LimitReader(r, maxFuzzOut))
}

// FuzzRead compares with compress/gzip and klauspost: the same output, or
// an error from each. What they return before an error may differ in length.
func FuzzRead(f *testing.F) {
	addStreams(f)
	f.Fuzz(func(t *testing.T, gz []byte) {
		var data []byte
		z, err := NewReader(bytes.NewReader(gz), Options{})
		if err == nil {
			data, err = readSome(z)
		}
		if err != nil {
			var f *FormatError
			require.ErrorAs(t, err, &f)
			require.LessOrEqual(t, f.In, In(len(gz)))
		}
		peers := map[string]func() ([]byte, error){
			"compress/gzip": func() ([]byte, error) {
				r, err := gzip.NewReader(bytes.NewReader(gz))
				if err != nil {
					return nil, err
				}
				return readSome(r)
			},
			"klauspost": func() ([]byte, error) {
				r, err := kgzip.NewReader(bytes.NewReader(gz))
				if err != nil {
					return nil, err
				}
				return readSome(r)
			},
		}
		for name, peer := range peers {
			want, wantErr := peer()
			if name == "klauspost" && errors.Is(wantErr, gzip.ErrHeader) {
				continue // it alone refuses reserved flags
			}
			if len(data) == maxFuzzOut || len(want) == maxFuzzOut {
				wantErr = err // not all was read
			}
			require.Equal(t, wantErr == nil, err == nil, "%s: %v, ours: %v", name, wantErr, err)
			n := len(want)
			if err != nil {
				n = min(n, len(data))
				data = data[:n]
			}
			require.True(t, bytes.Equal(want[:n], data), name)
		}
	})
}

// fuzzAt are offsets of points that are close to others, to each other, and not.
var fuzzAt = []Out{0, 1, WindowSize + 257, WindowSize + 259, 3*WindowSize + 1, 3*WindowSize + 2, 4*WindowSize + 1, 8 * WindowSize}

// FuzzResume resumes from every seek point of whatever decodes.
func FuzzResume(f *testing.F) {
	addStreams(f)
	var z, r Reader // used again and again, as a server does
	f.Fuzz(func(t *testing.T, gz []byte) {
		var points []Point
		var wantErr error
		if wantErr = z.Reset(bytes.NewReader(gz), Options{Interval: 2 * WindowSize, At: fuzzAt, OnPoint: func(p Point) error {
			p.Window = bytes.Clone(p.Window)
			points = append(points, p)
			return nil
		}}); wantErr != nil {
			return
		}
		data, wantErr := readSome(&z)
		for _, p := range points {
			require.NoError(t, r.ResetAt(bytes.NewReader(gz[p.In:]), p))
			got, err := io.ReadAll(io.LimitReader(&r, maxFuzzOut-int64(p.Out)))
			require.True(t, bytes.Equal(data[p.Out:], got))
			if !errors.Is(wantErr, errChecksum) { // the trailer is not checked
				require.Equal(t, wantErr == nil, err == nil)
			}
		}
	})
}

// FuzzPoint resumes from arbitrary points of arbitrary bytes.
func FuzzPoint(f *testing.F) {
	for _, s := range fuzzSeeds(f) {
		for _, p := range buildIndex(f, s, WindowSize, maxFuzzOut).points {
			f.Add(s.gz[p.In:], int64(p.In), int64(p.Out), p.Bit, p.State, p.Window)
		}
	}
	var z Reader
	f.Fuzz(func(t *testing.T, gz []byte, in, out int64, bit uint8, state, window []byte) {
		p := Point{In: In(in), Out: Out(out), Bit: bit, State: state, Window: window}
		err := z.ResetAt(bytes.NewReader(gz), p)
		if err == nil {
			var data []byte
			data, err = readSome(&z)
			require.Equal(t, Out(out)+Out(len(data)), z.Out())
			require.LessOrEqual(t, z.In(), In(in)+In(len(gz)))
		}
		if err != nil {
			require.ErrorIs(t, err, ErrCorrupt)
		}
	})
}

// FuzzReads cuts the output at arbitrary places, some of it read and some filled into
// buffers: the pieces are the whole, with the same seek points, and In never goes back.
func FuzzReads(f *testing.F) {
	for seed := range uint64(4) {
		s := randomStream(seed)
		f.Add(s.gz, []byte{1, 200, 3})
		f.Add(s.gz, []byte{255, 255})
	}
	var buffers [2]Buffer
	f.Fuzz(func(t *testing.T, gz, sizes []byte) {
		var points []Point
		opts := Options{Interval: WindowSize, OnPoint: func(p Point) error {
			p.Window = append([]byte(nil), p.Window...) // nil if it is empty
			points = append(points, p)
			return nil
		}}
		z, err := NewReader(bytes.NewReader(gz), opts)
		if err != nil || len(sizes) == 0 {
			return
		}
		want, wantErr := readSome(z)
		whole, wantPoints := z.In(), points
		points = nil
		require.NoError(t, z.Reset(bytes.NewReader(gz), opts))
		var got []byte
		last := In(0)
		for i := 0; ; i++ {
			size := sizes[i%len(sizes)]
			n := min(1+int(size)<<(i%13), maxFuzzOut-len(got))
			p := make([]byte, n)
			if size%2 == 0 {
				n, err = z.Read(p)
				p = p[:n]
			} else {
				b := &buffers[i%2]
				for j := range b[:WindowSize] {
					b[j] = 0xff // what was there must not matter
				}
				p, err = z.Fill(b, n)
			}
			got = append(got, p...)
			require.GreaterOrEqual(t, z.In(), last)
			last = z.In()
			if err != nil || len(got) == maxFuzzOut {
				if len(got) < maxFuzzOut {
					require.Equal(t, wantErr == nil, errors.Is(err, io.EOF))
				}
				break
			}
		}
		require.True(t, bytes.Equal(want, got))
		require.Equal(t, whole, last)
		if wantErr == nil && len(got) < maxFuzzOut {
			require.True(t, reflect.DeepEqual(wantPoints, points))
		}
	})
}
