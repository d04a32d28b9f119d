package imports

import (
	"encoding/binary"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func testSources() []Source {
	return []Source{
		{Entry: 0, Imports: plain("a", "b.c")},
		{Entry: 3, Imports: nil},
		{Entry: 4, Imports: append(from(2, "", "x", "y"), from(MaxLevel, "größe")...)},
		{Entry: 5, Library: Library{Parts: []Part{{0, 4096}, {8192, 1}, {8193, 1 << 40}}, Needs: []string{"libc.so.6", "libm.so.6"}}},
		{Entry: math.MaxInt32, Imports: from(0, strings.Repeat("m", MaxModule), strings.Repeat("n", MaxModule))},
	}
}

func TestList(t *testing.T) {
	sources := testSources()
	l, err := Open(Append([]byte("before"), sources)[len("before"):])
	require.NoError(t, err)
	require.Equal(t, len(sources), l.Len())
	for i, s := range sources {
		require.Equal(t, s, l.Source(i))
		require.Equal(t, s.Entry, l.Entry(i))
	}
	require.Equal(t, sources[2].Imports, l.Source(2).Imports, "they are not in order")
}

func TestEmptyList(t *testing.T) {
	require.Empty(t, Append(nil, nil))
	l, err := Open(nil)
	require.NoError(t, err)
	require.Zero(t, l.Len())
	require.Equal(t, List{}, l)
}

// TestListTooLong has more sources than there is room for.
func TestListTooLong(t *testing.T) {
	const size = MaxNames * (2 + MaxModule) // of a source, about
	name := strings.Repeat("n", MaxModule)
	x := Import{Module: "a"}
	for range MaxNames {
		x.Names = append(x.Names, name)
	}
	var sources []Source
	for i := range 2 * MaxList / size {
		sources = append(sources, Source{Entry: i, Imports: []Import{x}})
	}
	b := Append([]byte("before"), sources)[len("before"):]
	require.LessOrEqual(t, len(b), MaxList)
	require.Greater(t, len(b), MaxList-size)
	l, err := Open(b)
	require.NoError(t, err)
	require.Greater(t, l.Len(), 0)
	require.Equal(t, sources[l.Len()-1].Imports, l.Source(l.Len()-1).Imports)

	_, err = Open(make([]byte, MaxList+1))
	require.ErrorIs(t, err, ErrFormat)
	require.ErrorContains(t, err, "16777217 bytes")
}

// encode encodes numbers and strings as they come.
func encode(all ...any) (b []byte) {
	for _, v := range all {
		switch v := v.(type) {
		case int:
			b = binary.AppendUvarint(b, uint64(v))
		case uint64:
			b = binary.AppendUvarint(b, v)
		case string:
			b = appendString(b, v)
		case []byte:
			b = append(b, v...)
		}
	}
	return b
}

func TestOpenMalformed(t *testing.T) {
	zeros := make([]byte, 3*(MaxImports+1))
	for _, c := range []struct {
		what, want string
		b          []byte
	}{
		{"an entry that is cut", "entry", []byte{0x80}},
		{"an entry too large", "entry", encode(math.MaxInt32+1, 0)},
		{"entries too large together", "entry", encode(math.MaxInt32, 0, 0, 0, 1, 0, 0, 0)},
		{"no number of parts", "number", encode(0, 0)},
		{"too many parts", "number", encode(0, 0, MaxParts+1, zeros)},
		{"a part too far back", "part", encode(0, 0, 1, uint64(math.MaxInt64)+1, 0, 0)},
		{"a part too long", "part", encode(0, 0, 1, 1, uint64(math.MaxInt64), 0)},
		{"a part without its length", "part", encode(0, 0, 1, 5, []byte{0x80})},
		{"no number of libraries", "number", encode(0, 0, 0)},
		{"too many libraries", "number", encode(0, 0, 0, MaxNeeds+1, zeros)},
		{"a library's name that is cut", "name", encode(0, 0, 0, 1, 2, []byte("a"))},
		{"an entry of too many bytes", "entry", append([]byte(strings.Repeat("\x80", 10)), 1, 0)},
		{"no number of imports", "number", encode(0)},
		{"more imports than there are bytes for", "number", encode(0, 2, 0, "", 0)},
		{"too many imports", "number", encode(0, MaxImports+1, zeros)},
		{"no level", "level", encode(0, 1, []byte{0x80, 0x80, 0x80})},
		{"a level too large", "level", encode(0, 1, MaxLevel+1, "", 0)},
		{"a module too long", "name", encode(0, 1, 0, MaxModule+1, zeros)},
		{"a module that is cut", "name", encode(0, 1, 0, 3, []byte("ab"))},
		{"no number of names", "number", encode(0, 1, 0, "a")},
		{"more names than there are bytes for", "number", encode(0, 1, 0, "", 2, "")[:5]},
		{"too many names", "number", encode(0, 1, 0, "", MaxNames+1, zeros)},
		{"a name too long", "name", encode(0, 1, 0, "", 1, MaxModule+1, zeros)},
		{"a name that is cut", "name", encode(0, 1, 0, "", 1, 2, []byte("a"))},
		{"a length that overflows", "name", encode(0, 1, 0, uint64(math.MaxUint64), zeros)},
	} {
		l, err := Open(c.b)
		require.ErrorIs(t, err, ErrFormat, c.what)
		require.ErrorContains(t, err, ": "+c.want, c.what)
		require.Equal(t, List{}, l, c.what)
	}
	b := Append(nil, testSources())
	for i := range b {
		if l, err := Open(b[:i]); err == nil {
			require.Less(t, l.Len(), len(testSources()))
		} else {
			require.ErrorIs(t, err, ErrFormat, "%d bytes", i)
		}
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(Append(nil, testSources()))
	f.Add(encode(0, 2, 0, "", 0))
	f.Add(encode(math.MaxInt32, 0, 0, 0, 1, 0, 0, 0))
	f.Add(encode(0, 1, 0, "", MaxNames+1))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := Open(b)
		if err != nil {
			require.ErrorIs(t, err, ErrFormat)
			return
		}
		var sources []Source
		for i := range l.Len() {
			s := l.Source(i)
			require.LessOrEqual(t, len(s.Imports), MaxImports)
			require.LessOrEqual(t, len(s.Parts), MaxParts)
			require.LessOrEqual(t, len(s.Needs), MaxNeeds)
			sources = append(sources, s)
		}
		again, err := Open(Append(nil, sources))
		require.NoError(t, err)
		require.Equal(t, l.Len(), again.Len())
		for i, s := range sources {
			require.Equal(t, s, again.Source(i))
		}
	})
}
