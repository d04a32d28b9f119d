package fuseconn

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// stuck answers a Lookup when it is told to.
type stuck struct {
	fuse.RawFileSystem
	goOn chan struct{}
}

func (s stuck) Lookup(_ <-chan struct{}, _ *fuse.InHeader, _ string, out *fuse.EntryOut) fuse.Status {
	<-s.goOn
	out.EntryValid, out.AttrValid = Forever, Forever
	out.NodeId, out.Attr = 2, fuse.Attr{Ino: 2, Mode: unix.S_IFREG | 0o400, Size: 7}
	return fuse.OK
}

// TestStuckRequest has a request that is never answered: its reader gets an error, and is counted until the worker is
// free again. Others are answered meanwhile.
func TestStuckRequest(t *testing.T) {
	for _, kept := range []bool{true, false} {
		t.Run(fmt.Sprintf("kept %v", kept), func(t *testing.T) {
			t.Parallel()
			fs := stuck{fuse.NewDefaultRawFileSystem(), make(chan struct{})}
			// All other requests must be answered within it, however busy the machine is.
			o := Options{Source: "test", Flags: []string{"allow_other"}, timeout: 6 * time.Second, Session: NewSession(nil)}
			if kept {
				o.Session, o.Name, o.KeepMount = session(t, t.TempDir()), "test-1", true
			}
			c, err := Mount(context.Background(), fs, o)
			require.NoError(t, err)
			path := fmt.Sprintf("/proc/self/fd/%d/file", c.FD())
			began := time.Now()
			var st unix.Stat_t
			require.ErrorIs(t, unix.Stat(path, &st), unix.EIO)
			require.GreaterOrEqual(t, time.Since(began), o.timeout)
			require.Less(t, time.Since(began), AnswerTimeout/2)
			n, oldest := o.Session.InFlight()
			require.Equal(t, 1, n, "its worker is still stuck")
			require.GreaterOrEqual(t, oldest, o.timeout)

			var fsst unix.Statfs_t
			require.ErrorIs(t, unix.Statfs(fmt.Sprintf("/proc/self/fd/%d", c.FD()), &fsst), unix.ENOSYS, "it is answered")
			close(fs.goOn)
			require.Eventually(t, func() bool { n, _ := o.Session.InFlight(); return n == 0 }, time.Minute, time.Millisecond)
			require.NoError(t, unix.Stat(path, &st), "the answer that came too late is not that of another request")
			require.EqualValues(t, 7, st.Size)
			n, oldest = o.Session.InFlight()
			require.Zero(t, n)
			require.Zero(t, oldest)
			require.NoError(t, c.Release())
			require.True(t, c.Wait(time.Minute))
		})
	}
}
