// Package inflate decodes gzip streams and can resume decoding in the middle of one.
//
// Two offsets exist side by side and never mix: In counts bytes of the
// compressed stream, Out counts bytes of what it decompresses to. A seek point
// joins one of each with the decoder state between them.
//
// A gzip stream (RFC 1952) is a sequence of members, each a header, a DEFLATE
// stream (RFC 1951) and a trailer. A DEFLATE stream is a sequence of blocks:
// stored ones, and compressed ones made of literals and matches. A match copies
// from the window, the last 32 KiB of output. A block that is not stored has
// its own Huffman codes, which its header describes or which are fixed.
//
// Decoding can therefore start at a bit of the stream, given the window there
// and, inside a block, the block's header. Of the window only those bytes
// count that a later match copies: in practice about a tenth, so a seek point
// holds them alone and the rest of its window compresses to nothing.
//
// The package does not read tar, compute digests or fetch anything, and it
// does not compress.
package inflate

import (
	"errors"
	"fmt"
)

// In is a byte offset in (or a length of) the compressed stream.
type In int64

// Out is a byte offset in (or a length of) the uncompressed stream.
type Out int64

// WindowSize is how far back a DEFLATE match can reach, in uncompressed bytes
// (RFC 1951, section 3.2.5).
const WindowSize = 32 << 10

// MaxState bounds Point.State.
//
// A state is a block header (RFC 1951, section 3.2.3) from bit 0 of its first
// byte on: that of the block that the point lies in, or for a stored block, one
// whose length is what is left of the block.
const MaxState = 1 << 10

// Point is a seek point: a place in a gzip stream where decoding can start.
type Point struct {
	Out    Out    // first byte produced after resuming here
	In     In     // the byte of the compressed stream that contains the next bit
	Bit    uint8  // 0-7: bits of that byte already consumed, from the least significant
	State  []byte // decoder state inside a block; empty at the start of a block
	Window []byte // up to WindowSize bytes before Out; zero where nothing refers to them
}

// ErrCorrupt is wrapped by every error that is the compressed stream's fault:
// the bytes are not gzip, or are truncated or altered.
var ErrCorrupt = errors.New("corrupt gzip stream")

// FormatError says where a compressed stream is wrong. It unwraps to
// ErrCorrupt and to its cause.
type FormatError struct {
	In   In    // compressed offset at which decoding stopped
	Out  Out   // uncompressed bytes produced before it
	What error // what is wrong
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("gzip stream at compressed offset %d (uncompressed %d): %v", e.In, e.Out, e.What)
}

// Unwrap makes errors.Is find ErrCorrupt and the cause.
func (e *FormatError) Unwrap() []error { return []error{ErrCorrupt, e.What} }
