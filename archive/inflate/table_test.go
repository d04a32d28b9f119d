package inflate

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// TestBuildTable decodes every codeword of random complete codes, with whatever
// bits may follow it.
func TestBuildTable(t *testing.T) {
	rng := newRand(11)
	subtables := 0
	for _, alphabet := range []struct {
		size, tableSize int
		tableBits       uint
		longest         uint8
		templates       []entry
	}{
		{maxLitLen, litLenSize, litLenBits, 15, litLenEntries[:]},
		{maxDist, distSize, distBits, 15, distEntries[:]},
		{numPrecode, litLenSize, precodeBits, 7, precodeEntries[:]},
	} {
		for range 1500 {
			n := 2 + rng.IntN(alphabet.size-1)
			lengths := randomLengths(rng, alphabet.size, n, alphabet.longest)
			table := make([]entry, alphabet.tableSize)
			require.True(t, buildTable(table, alphabet.tableBits, lengths, alphabet.templates))
			for symbol, c := range canonical(lengths) {
				if c.n == 0 {
					continue
				}
				var b bitReader
				b.bits, b.n = rng.Uint64()<<c.n, 64
				for i := range c.n {
					b.bits |= uint64(c.bits>>(c.n-1-i)&1) << i
				}
				e, err := b.code(table, alphabet.tableBits)
				require.NoError(t, err)
				require.Equal(t, alphabet.templates[symbol].value(), e.value())
				consumed := 64 - b.n + e.codeBits()
				require.Equal(t, c.n, consumed)
				require.Equal(t, alphabet.templates[symbol].consume(), e.consume()-e.codeBits())
				if c.n > alphabet.tableBits {
					subtables++
				}
			}
		}
	}
	require.Greater(t, subtables, 10_000)
}

// TestUnusableCodes alters complete codes by one length: then they are not
// complete any more.
func TestUnusableCodes(t *testing.T) {
	rng := newRand(12)
	table := make([]entry, litLenSize)
	for range 2000 {
		lengths := randomLengths(rng, maxLitLen, 3+rng.IntN(280), 15)
		i := rng.IntN(len(lengths))
		old := lengths[i]
		lengths[i] = uint8(rng.IntN(16))
		require.Equal(t, lengths[i] == old, buildTable(table, litLenBits, lengths, litLenEntries[:]))
	}
	// What zlib accepts although it is incomplete.
	for _, lengths := range [][]uint8{{}, {0}, {1}, {0, 0, 1, 0}} {
		require.True(t, buildTable(table, distBits, lengths, distEntries[:]))
	}
	for _, lengths := range [][]uint8{{2}, {0, 15}, {1, 2}, {2, 2, 2}, {1, 1, 1}, {1, 1, 15}} {
		require.False(t, buildTable(table, distBits, lengths, distEntries[:]))
	}
}
