package erofs

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"reflect"
	"testing"
)

// TestDiskStructs checks sizes, and that put agrees with the declared order of
// fields.
func TestDiskStructs(t *testing.T) {
	type putter interface{ put([]byte) }
	r := rand.New(rand.NewPCG(1, 1))
	for _, c := range []struct {
		size int
		v    putter
	}{
		{sizeSuperBlock, &superBlock{}},
		{sizeDeviceSlot, &deviceSlot{}},
		{sizeInodeCompact, &inodeCompact{}},
		{sizeInodeExtended, &inodeExtended{}},
		{sizeChunkIndex, &chunkIndex{}},
		{sizeDirent, &dirent{}},
		{sizeXattrHeader, &xattrHeader{}},
		{sizeXattrEntry, &xattrEntry{}},
	} {
		name := reflect.TypeOf(c.v).Elem().Name()
		if n := binary.Size(c.v); n != c.size {
			t.Errorf("%s has %d bytes, its constant says %d", name, n, c.size)
			continue
		}
		want := make([]byte, c.size)
		for i := range want {
			want[i] = byte(r.Uint32())
		}
		if _, err := binary.Decode(want, binary.LittleEndian, c.v); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, c.size)
		c.v.put(got)
		if !bytes.Equal(got, want) {
			t.Errorf("%s: put writes\n%x, its fields are\n%x", name, got, want)
		}
	}
}
