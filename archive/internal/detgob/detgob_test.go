package detgob

import (
	"bytes"
	"encoding/gob"
	"math"
	"slices"
	"strings"
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

func TestFields(t *testing.T) {
	type part struct {
		A int64
		B uint32
	}
	type whole struct {
		Name   string
		hidden int
		Part   part
		Skip   string
		Bytes  []byte
		Ptr    *part
		Count  uint64
	}
	for _, v := range []whole{
		{},
		{Name: "n"},
		{Bytes: []byte{0}, Count: math.MaxUint64},
		{Part: part{A: -1}, Ptr: &part{}},
		{Name: "näme", hidden: 1, Part: part{math.MinInt64, math.MaxUint32}, Bytes: []byte("b"), Ptr: &part{127, 128}, Count: 1},
	} {
		want, err := Append([]byte("before"), v)
		require.NoError(t, err)
		f := NewFields([]byte("before"))
		String(&f, 0, v.Name)
		p := f.Struct(1)
		p.Int(0, v.Part.A)
		p.Uint(1, uint64(v.Part.B))
		f.EndStruct(p)
		String(&f, 3, v.Bytes)
		if v.Ptr != nil {
			p := f.Struct(4)
			p.Int(0, v.Ptr.A)
			p.Uint(1, uint64(v.Ptr.B))
			f.EndStruct(p)
		}
		f.Uint(5, v.Count)
		require.Equal(t, want, f.End(), "%+v", v)
	}
}

// TestEncodeSlice has more than one piece and elements that overwrite each other.
func TestEncodeSlice(t *testing.T) {
	var want []*outer
	pieces, err := EncodeSlice[*outer](func(yield func(func([]byte) []byte) bool) {
		v := sample()
		for i := range 3 * chunkSize / 1000 {
			v.Name = strings.Repeat("x", i%2000)
			c := v
			want = append(want, &c)
			if !yield(func(b []byte) []byte {
				b, err := Append(b, &v)
				require.NoError(t, err)
				return b
			}) {
				return
			}
		}
	})
	require.NoError(t, err)
	require.Greater(t, len(pieces), 3)
	whole, err := Encode(want)
	require.NoError(t, err)
	require.True(t, bytes.Equal(whole, slices.Concat(pieces...)))
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
