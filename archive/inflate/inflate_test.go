package inflate

import (
	"bytes"
	"compress/gzip"
	"io"
	"reflect"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/require"
)

// TestStreamsAreValid keeps the streams that the tests write themselves honest.
func TestStreamsAreValid(t *testing.T) {
	for _, s := range streams(t) {
		r, err := gzip.NewReader(bytes.NewReader(s.gz))
		require.NoError(t, err, s.name)
		data, err := io.ReadAll(r)
		require.NoError(t, err, s.name)
		require.True(t, bytes.Equal(s.data, data), s.name)
	}
}

func TestRead(t *testing.T) {
	sources := []struct {
		name string
		wrap func(io.Reader) io.Reader
	}{
		{"whole", func(r io.Reader) io.Reader { return r }},
		{"byte by byte", iotest.OneByteReader},
		{"data with EOF", iotest.DataErrReader},
	}
	for _, s := range streams(t) {
		for _, source := range sources {
			z, err := NewReader(source.wrap(bytes.NewReader(s.gz)), Options{})
			require.NoError(t, err, s.name)
			data, err := io.ReadAll(z)
			require.NoError(t, err, "%s, %s", s.name, source.name)
			require.True(t, bytes.Equal(s.data, data), "%s, %s", s.name, source.name)
			require.Equal(t, Out(len(data)), z.Out())
		}
	}
}

// TestReset uses one Reader for everything, also behind errors.
func TestReset(t *testing.T) {
	var z Reader
	for _, s := range streams(t) {
		require.NoError(t, z.Reset(bytes.NewReader(s.gz[:len(s.gz)-1]), Options{Interval: WindowSize, OnPoint: func(Point) error { return nil }}))
		_, err := io.ReadAll(&z)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		require.Error(t, z.Reset(bytes.NewReader(nil), Options{}))
		require.NoError(t, z.Reset(bytes.NewReader(s.gz), Options{}))
		data, err := io.ReadAll(&z)
		require.NoError(t, err, s.name)
		require.True(t, bytes.Equal(s.data, data), s.name)
	}
}

func TestMemory(t *testing.T) {
	require.Less(t, reflect.TypeFor[Reader]().Size(), uintptr(512<<10))
	var z Reader
	r := bytes.NewReader(nil)
	buf := make([]byte, 64<<10)
	for _, s := range streams(t) {
		allocs := testing.AllocsPerRun(1, func() {
			r.Reset(s.gz)
			require.NoError(t, z.Reset(r, Options{}))
			for err := error(nil); err == nil; {
				_, err = z.Read(buf)
			}
		})
		require.Less(t, allocs, 100.0, s.name) // a few for each member's header
	}
}

// TestConcurrent is for the race detector: readers share nothing.
func TestConcurrent(t *testing.T) {
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for _, s := range streams(t)[:20] {
				if data, err := decode(bytes.NewReader(s.gz), Options{}); err != nil || !bytes.Equal(s.data, data) {
					t.Error(s.name, err)
				}
			}
		})
	}
	wg.Wait()
}
