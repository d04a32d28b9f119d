package layer

import (
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
)

// ErrMismatch is wrapped when bytes are not the ones the index was made from.
var ErrMismatch = errors.New("content does not match its digest")

// chain is a SHA-256 whose chaining value can be read at block boundaries.
type chain struct {
	h     hash.Hash
	state []byte // scratch for the marshalled hash
}

func newChain() *chain { return &chain{h: sha256.New()} }

// The marshalled form of crypto/sha256's hash: magic, eight chaining words,
// one block of input not yet hashed, length so far. The package keeps it
// stable, since programs store it.
const (
	chainMagic   = "sha\x03"
	chainValueAt = len(chainMagic)
	chainBlockAt = chainValueAt + sha256.Size
	chainSize    = chainBlockAt + sha256.BlockSize + 8
)

func (c *chain) write(p []byte) { c.h.Write(p) }

// value returns the chaining value. The bytes written so far must be a
// multiple of sha256.BlockSize.
func (c *chain) value() ([sha256.Size]byte, error) {
	var v [sha256.Size]byte
	state, err := c.h.(encoding.BinaryAppender).AppendBinary(c.state[:0])
	if err != nil {
		return v, err
	}
	if len(state) != chainSize || string(state[:len(chainMagic)]) != chainMagic {
		return v, errors.New("crypto/sha256 marshals its state in an unknown form")
	}
	c.state = state
	copy(v[:], state[chainValueAt:])
	return v, nil
}

// sum returns the finished SHA-256.
func (c *chain) sum() (v [sha256.Size]byte) {
	c.h.Sum(v[:0])
	return v
}

// resumeChain returns a chain that has hashed off bytes (a multiple of
// sha256.BlockSize) and stands at chaining value v.
func resumeChain(v [sha256.Size]byte, off inflate.Out) (*chain, error) {
	state := make([]byte, 0, chainSize)
	state = append(state, chainMagic...)
	state = append(state, v[:]...)
	state = append(state, make([]byte, sha256.BlockSize)...)
	state = binary.BigEndian.AppendUint64(state, uint64(off))
	c := &chain{h: sha256.New(), state: state}
	if err := c.h.(encoding.BinaryUnmarshaler).UnmarshalBinary(state); err != nil {
		return nil, err
	}
	return c, nil
}

// VerifySpan checks the uncompressed bytes of span i. The error wraps
// ErrMismatch if they are not the span's.
func (x *Index) VerifySpan(i int, data []byte) error {
	start, end := x.SpanRange(i)
	if inflate.Out(len(data)) != end-start {
		return fmt.Errorf("span %d of %s: %d bytes instead of %d: %w", i, x.DiffID, len(data), end-start, ErrMismatch)
	}
	c := newChain()
	if i > 0 {
		var err error
		if c, err = resumeChain(x.Spans[i-1].Digest, start); err != nil {
			return err
		}
	}
	c.write(data)
	got, err := c.sum(), error(nil)
	if i < len(x.Spans)-1 {
		got, err = c.value()
	}
	if err != nil {
		return err
	}
	if got != x.Spans[i].Digest {
		return fmt.Errorf("span %d of %s: %w", i, x.DiffID, ErrMismatch)
	}
	return nil
}
