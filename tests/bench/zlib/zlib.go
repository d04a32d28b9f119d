// Package zlib decompresses with the system's zlib, as a peer to measure.
package zlib

/*
#cgo LDFLAGS: -lz
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

enum { BUFFER = 256 << 10, WINDOW = 32 << 10 };

// inflate_all decompresses a gzip stream of one member and returns zlib's verdict. With an interval it stops at block
// ends and copies the window at the first one after each interval: what a random-access index needs.
static int inflate_all(unsigned char *src, unsigned n, unsigned long interval, unsigned long *size, unsigned long *points) {
	static __thread unsigned char buffer[BUFFER], window[WINDOW];
	z_stream s;
	memset(&s, 0, sizeof s);
	int result = inflateInit2(&s, 15 + 16);
	if (result != Z_OK)
		return result;
	s.next_in = src;
	s.avail_in = n;
	unsigned long next = 0;
	do {
		if (s.avail_out == 0) {
			s.next_out = buffer;
			s.avail_out = BUFFER;
		}
		result = inflate(&s, interval ? Z_BLOCK : Z_NO_FLUSH);
		if (interval && s.data_type & 128 && s.total_out >= next) {
			unsigned got;
			inflateGetDictionary(&s, window, &got);
			next = s.total_out + interval;
			++*points;
		}
	} while (result == Z_OK);
	*size = s.total_out;
	inflateEnd(&s);
	return result;
}
*/
import "C"

import (
	"fmt"
	"unsafe"
)

// Version is the version of the zlib in use.
func Version() string { return C.GoString(C.zlibVersion()) }

// Inflate decompresses the gzip stream src, of one member, and returns the uncompressed size and how many seek points
// it passed. An interval of zero asks for none.
func Inflate(src []byte, interval int64) (size, points int64, err error) {
	if len(src) == 0 || len(src) >= 1<<32 {
		return 0, 0, fmt.Errorf("stream of %d bytes", len(src))
	}
	var total, stops C.ulong
	result := C.inflate_all((*C.uchar)(unsafe.Pointer(&src[0])), C.uint(len(src)), C.ulong(interval), &total, &stops)
	if result != C.Z_STREAM_END {
		return 0, 0, fmt.Errorf("zlib stopped after %d bytes with %d", total, result)
	}
	return int64(total), int64(stops), nil
}
