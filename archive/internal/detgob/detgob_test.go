package detgob

import (
	"bytes"
	"encoding/gob"
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

type inner struct {
	A int64
	B uint32
}

type embedded struct{ Owner uint64 }

type outer struct {
	Name    string
	Flag    bool
	When    time.Time
	Ptr     *inner
	Nil     *inner
	List    []*inner
	Strings []string
	Bytes   []byte
	Set     map[string]struct{}
	Map     map[string]*inner
	Empty   map[string]string
	embedded
	Kind kind
}

type kind string

func sample() outer {
	return outer{
		Name: "näme", Flag: true, When: time.Unix(1700000000, 123456789).UTC(),
		Ptr:     &inner{A: math.MinInt64, B: math.MaxUint32},
		List:    []*inner{{A: -1}, {}, {B: 127}, {B: 128}},
		Strings: []string{"", "x"},
		Bytes:   []byte{0, 1, 2},
		Set:     map[string]struct{}{"80/tcp": {}, "443/tcp": {}},
		Map:     map[string]*inner{"b": {A: 2}, "a": {A: 1}, "c": {}},
		Empty:   map[string]string{},
		Kind:    "dir",
	}
}

func TestGobDecodesTheSameValue(t *testing.T) {
	value := sample()
	b, err := Encode(&value)
	require.NoError(t, err)
	var got outer
	require.NoError(t, gob.NewDecoder(bytes.NewReader(b)).Decode(&got))
	want := sample()
	require.True(t, want.When.Equal(got.When))
	got.When = want.When
	require.Equal(t, want, got)
}

func TestLoneSlice(t *testing.T) {
	b, err := Encode([]*inner{{A: 5}, {B: 6}})
	require.NoError(t, err)
	var got []*inner
	require.NoError(t, gob.NewDecoder(bytes.NewReader(b)).Decode(&got))
	require.Equal(t, []*inner{{A: 5}, {B: 6}}, got)
}

func TestSameBytesEveryTime(t *testing.T) {
	first, err := Encode(sample())
	require.NoError(t, err)
	for range 50 {
		again, err := Encode(sample())
		require.NoError(t, err)
		require.Equal(t, first, again)
	}
}

func TestUnsupportedTypeIsNamed(t *testing.T) {
	_, err := Encode(struct{ F float64 }{1})
	require.ErrorContains(t, err, "field F")
	require.ErrorContains(t, err, "float64")
}
