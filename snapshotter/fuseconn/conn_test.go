package fuseconn

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestLife mounts a file system that implements nothing: every request gets
// an answer, and the connection ends with the mount's last use.
func TestLife(t *testing.T) {
	c, err := Mount(context.Background(), fuse.NewDefaultRawFileSystem(), Options{Source: "test", Flags: []string{"allow_other"}, ReadAhead: MaxRead})
	require.NoError(t, err, "this test needs root and /dev/fuse")
	top := fmt.Sprintf("/proc/self/fd/%d", c.FD())
	var st unix.Stat_t
	require.ErrorIs(t, unix.Stat(top+"/file", &st), unix.ENOSYS)

	var dev unix.Statx_t
	require.NoError(t, unix.Statx(c.FD(), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &dev))
	ra, err := os.ReadFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", dev.Dev_major, dev.Dev_minor))
	require.NoError(t, err)
	require.Equal(t, "1024", strings.TrimSpace(string(ra)))

	other, err := unix.Open(top, unix.O_PATH|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, c.Release())
	require.False(t, c.Wait(50*time.Millisecond), "the mount is still used")
	require.NoError(t, unix.Close(other))
	require.True(t, c.Wait(time.Minute))
}

func TestRefusedOptions(t *testing.T) {
	_, err := Mount(context.Background(), fuse.NewDefaultRawFileSystem(), Options{Source: "test", Flags: []string{"nonsense"}})
	require.ErrorContains(t, err, "option nonsense")
}

// TestRequestBuffer has so many buffers that most are in new memory.
func TestRequestBuffer(t *testing.T) {
	buffers := make([][]byte, 1024)
	for i := range buffers {
		buffers[i] = requestBuffer()
		require.Len(t, buffers[i], inBufferSize)
	}
	for _, b := range buffers {
		begin := uintptr(unsafe.Pointer(&b[0])) &^ (pageSize - 1)
		end := uintptr(unsafe.Pointer(&b[len(b)-1]))
		resident := make([]byte, (end-begin)/pageSize+1)
		_, _, errno := unix.Syscall(unix.SYS_MINCORE, begin, end-begin+1, uintptr(unsafe.Pointer(&resident[0])))
		require.Zero(t, errno)
		for _, r := range resident {
			require.NotZero(t, r&1, "a page is not in memory")
		}
	}
	runtime.KeepAlive(buffers)
}

func TestReplyBuffer(t *testing.T) {
	for range 10 {
		b := replyBuffer()
		require.Len(t, b, outHeaderSize+MaxRead)
		require.Zero(t, uintptr(unsafe.Pointer(&b[outHeaderSize]))%pageSize)
	}
}

func TestErrorReply(t *testing.T) {
	in, out := make([]byte, 40), make([]byte, 64)
	binary.NativeEndian.PutUint64(in[8:], 12345)
	require.Equal(t, 16, errorReply(in, out, fuse.EIO))
	require.EqualValues(t, 16, binary.NativeEndian.Uint32(out))
	require.EqualValues(t, -int32(unix.EIO), int32(binary.NativeEndian.Uint32(out[4:])))
	require.EqualValues(t, 12345, binary.NativeEndian.Uint64(out[8:]))
}
