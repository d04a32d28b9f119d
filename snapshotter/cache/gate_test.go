package cache

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// TestBegin lets a fill begin that nobody expects when a start seems to be over, one
// that is expected a moment after the last reader that it is not for.
func TestBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g gate
		took := func(expected bool) time.Duration {
			began := time.Now()
			require.NoError(t, g.begin(t.Context(), expected))
			return time.Since(began)
		}
		require.Zero(t, took(false), "nobody has read yet")
		other, expected := &run{}, &run{expected: true}
		g.enter(other)
		time.AfterFunc(time.Second, func() { g.leave(other) })
		require.Equal(t, time.Second+startQuiet, took(false))

		g.enter(other)
		g.leave(other)
		require.Equal(t, quiet, took(true))
		g.enter(expected)
		require.Zero(t, took(true))
		g.leave(expected)
		require.Equal(t, startQuiet, took(false))

		stop := make(chan struct{})
		go func() { // misses something all the time
			for tick := time.NewTicker(startQuiet / 2); ; {
				select {
				case <-tick.C:
					g.enter(other)
					g.leave(other)
				case <-stop:
					return
				}
			}
		}()
		g.enter(other)
		g.leave(other)
		require.Equal(t, startHold, took(false))
		close(stop)
	})
}
