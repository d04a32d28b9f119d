package inflate

import (
	"bytes"
	"compress/gzip"
	"io"
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
