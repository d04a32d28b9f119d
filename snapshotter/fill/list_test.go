package fill

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/snapshotter/cache"
)

// TestListComesFirst fetches a list at once and in few requests, and the rest
// after the delay.
func TestListComesFirst(t *testing.T) {
	src, x := image(t, 20<<20)
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s, l := open(t, dir, src, x, cache.Limit{})
		f := New(t.Context(), Options{Workers: 2, Delay: time.Minute})
		f.Add(l)
		f.Prefetch([]Want{{l, cache.Spans{First: 60, End: 64}}, {l, cache.Spans{First: 0, End: 2}}, {l, cache.Spans{First: 64, End: 66}}})
		require.Len(t, f.State(), 1, "lists are not layers")
		time.Sleep(5 * time.Second)
		require.GreaterOrEqual(t, l.Fetched(), int64(8*256<<10))
		require.LessOrEqual(t, l.Fetched(), int64((8+2*4)*256<<10), "and what lies between them and seek points")
		require.LessOrEqual(t, src.requests.Load(), int64(3))
		require.Equal(t, 1, jobsOf(f), "the list is done")
		time.Sleep(3 * time.Minute)
		require.Equal(t, l.Size(), l.Fetched())
		f.Close()
		require.NoError(t, s.Close())
	})
}

// TestListsOnly has nothing else fetched, and lists that cannot be fetched forgotten.
func TestListsOnly(t *testing.T) {
	src, x := image(t, 20<<20)
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s, l := open(t, dir, src, x, cache.Limit{Size: 4 << 20})
		f := New(t.Context(), Options{Workers: 2, ListsOnly: true})
		f.Add(l)
		f.Prefetch([]Want{{l, cache.Spans{First: -5, End: 1}}, {l, cache.Spans{First: 1 << 29, End: 1 << 30}}, {l, cache.Spans{First: 5, End: 5}}})
		time.Sleep(time.Minute)
		require.Equal(t, int64(256<<10), l.Fetched())
		require.Equal(t, 1, jobsOf(f))

		src.away.Store(true)
		before := src.requests.Load()
		f.Prefetch([]Want{{l, cache.Spans{First: 8, End: 9}}})
		time.Sleep(time.Hour)
		require.Equal(t, 1, jobsOf(f), "it is given up")
		require.LessOrEqual(t, src.requests.Load(), before+int64(listAttempts)+1)
		src.away.Store(false)

		f.Prefetch([]Want{{l, cache.Spans{First: 0, End: 80}}})
		time.Sleep(time.Minute)
		require.Less(t, l.Fetched(), int64(4<<20), "it displaces nothing and stays within the limit")
		require.Equal(t, 1, jobsOf(f))
		f.Close()
		require.NoError(t, s.Close())
	})
}

func TestCut(t *testing.T) {
	_, x := image(t, 1<<20)
	s, l := open(t, t.TempDir(), &registry{}, x, cache.Limit{})
	defer s.Close()
	want := func(n int) Want { return Want{l, cache.Spans{First: 0, End: n}} }
	wants := []Want{want(2), want(3), want(1)}
	part, rest := cut(wants, 1<<20)
	require.Equal(t, wants[:2], part)
	require.Equal(t, wants[2:], rest)
	part, rest = cut(wants, 1<<30)
	require.Equal(t, wants, part)
	require.Empty(t, rest)
}

func TestNextSize(t *testing.T) {
	require.EqualValues(t, 1250<<10, nextSize(2500<<10, 200*time.Millisecond, listTime, leastList))
	require.EqualValues(t, 3<<20, nextSize(2<<20, 2*rangeTime/3, rangeTime, leastRange))
	require.EqualValues(t, leastList, nextSize(1, time.Second, listTime, leastList))
	require.EqualValues(t, rangeSize, nextSize(1<<30, 0, listTime, leastList))
}

// jobsOf returns how many lists and layers are waiting or being fetched.
func jobsOf(f *Filler) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.jobs)
}
