package command

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestWatchdog listens in systemd's place: it hears from a daemon while no read is stuck.
func TestWatchdog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	require.NoError(t, err)
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "60000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	var oldest atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	require.NoError(t, feedWatchdog(ctx, func() (int, time.Duration) { return 1, time.Duration(oldest.Load()) }))
	heard := func(within time.Duration) error {
		require.NoError(t, l.SetReadDeadline(time.Now().Add(within)))
		b := make([]byte, 100)
		n, err := l.Read(b)
		if err == nil {
			require.Equal(t, "WATCHDOG=1", string(b[:n]))
		}
		return err
	}
	silence := func() {
		t.Helper()
		require.Eventually(t, func() bool { return heard(300*time.Millisecond) != nil }, time.Minute, time.Millisecond)
	}
	for range 3 {
		require.NoError(t, heard(time.Minute))
	}
	oldest.Store(int64(stuckAfter))
	silence()
	oldest.Store(int64(stuckAfter - 1))
	require.NoError(t, heard(time.Minute), "it was slow, not stuck")
	cancel()
	silence()

	t.Setenv("WATCHDOG_USEC", "soon")
	require.Error(t, feedWatchdog(t.Context(), nil))
	t.Setenv("WATCHDOG_USEC", "")
	require.NoError(t, feedWatchdog(t.Context(), nil), "the unit has no watchdog")
}
