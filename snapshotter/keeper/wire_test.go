package keeper

import (
	"bytes"
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// seqpacket returns the two ends of a connection like that between daemon and keeper.
func seqpacket(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		c, err := net.FileConn(f)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		ends[i] = c.(*net.UnixConn)
	}
	return ends[0], ends[1]
}

func openFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(entries)
}

// FuzzWire sends a keeper packets, separated by line breaks and each with as many descriptors as its first byte says:
// it never holds more than it was given, and nothing is left when all that it holds is dropped.
func FuzzWire(f *testing.F) {
	f.Add([]byte("\x00{\"op\":\"list\"}"))
	f.Add([]byte("\x01{\"version\":1,\"op\":\"keep\",\"name\":\"a\"}\n\x02{\"op\":\"keep\",\"name\":\"b\"}\n\x00{\"op\":\"list\"}\n\x00{\"op\":\"drop\",\"name\":\"a\"}"))
	f.Add([]byte("\x01{\"op\":\"keep\",\"name\":\"a\"}\n\x01{\"op\":\"keep\",\"name\":\"a\"}\n\x03{\"op\":\"drop\"}"))
	f.Add([]byte("\x09{\"op\":\"keep\",\"name\":\"too many\"}"))
	f.Add(append([]byte("\x01{\"op\":\"keep\",\"name\":\""), bytes.Repeat([]byte("n"), maxMessage)...))
	f.Add([]byte("\x02\n\x01null\n\x01[]\n\x01{\"op\":7}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		const most = 16
		packets := bytes.SplitN(data, []byte("\n"), most)
		before := openFDs(t)
		client, conn := seqpacket(t)
		s := &server{sets: map[string][]int{}, clients: 2}
		done := make(chan struct{})
		go func() { defer close(done); s.client(conn) }()
		given, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		for _, p := range packets {
			if len(p) == 0 {
				continue
			}
			var rights []byte
			if n := int(p[0]) % (maxFDs + 3); n > 0 {
				fds := make([]int, n)
				for i := range fds {
					fds[i] = given
				}
				rights = unix.UnixRights(fds...)
			}
			if _, _, err := client.WriteMsgUnix(p[1:], rights, nil); err != nil {
				break // it hung up, which it may after nonsense
			}
		}
		require.NoError(t, client.CloseWrite())
		require.NoError(t, client.SetReadDeadline(time.Now().Add(time.Minute)))
		for { // answers, with descriptors of ours
			_, fds, err := receive(client)
			closeAll(fds)
			if err != nil {
				require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
				break
			}
		}
		<-done
		require.LessOrEqual(t, len(s.sets), len(packets))
		for name, fds := range s.sets {
			require.NotEmpty(t, name)
			require.LessOrEqual(t, len(name), maxName)
			require.NotEmpty(t, fds)
			require.LessOrEqual(t, len(fds), maxFDs)
			closeAll(fds)
		}
		require.NoError(t, client.Close())
		closeAll([]int{given})
		require.Equal(t, before, openFDs(t), "all descriptors are closed")
	})
}
