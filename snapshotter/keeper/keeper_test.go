package keeper

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// keeperArg makes the test's program a keeper.
const keeperArg = "-keeper"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == keeperArg {
		if err := Main(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func open(t *testing.T, dir string) *Keeper {
	t.Helper()
	k, err := Open(t.Context(), dir, os.Args[0], keeperArg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, k.Close()) })
	return k
}

// pipe returns a descriptor to keep, and the other end, which ends when all
// copies of it are closed.
func pipe(t *testing.T) (fd int, end *os.File) {
	t.Helper()
	var p [2]int
	require.NoError(t, unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
	end = os.NewFile(uintptr(p[0]), "pipe")
	t.Cleanup(func() { end.Close() })
	return p[1], end
}

// requireEnded waits until nobody has the other end of a pipe.
func requireEnded(t *testing.T, end *os.File) {
	t.Helper()
	require.NoError(t, end.SetReadDeadline(time.Now().Add(time.Minute)))
	_, err := end.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
}

// pidOf returns the keeper that k started.
func pidOf(t *testing.T, k *Keeper) int {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	pid := k.place.(*process).pid
	require.Greater(t, pid, 1)
	return pid
}

func kill(t *testing.T, pid int) {
	t.Helper()
	require.NoError(t, unix.Kill(pid, unix.SIGKILL))
}

// TestKeep goes through several daemons with one keeper.
func TestKeep(t *testing.T) {
	dir := t.TempDir()
	k := open(t, dir)
	require.Empty(t, k.Names())
	one, end := pipe(t)
	two, _ := pipe(t)
	require.NoError(t, k.Keep("a", one, two))
	require.NoError(t, k.Keep("b", two))
	require.ErrorIs(t, k.Keep("a", one), errdefs.ErrAlreadyExists)
	require.NoError(t, unix.Close(one))
	require.NoError(t, unix.Close(two))
	require.NoError(t, k.Close())

	k = open(t, dir)
	require.Equal(t, []string{"a", "b"}, k.Names())
	require.Nil(t, k.Take("c"))
	fds := k.Take("a")
	require.Len(t, fds, 2)
	require.Nil(t, k.Take("a"), "it is taken")
	require.Equal(t, []string{"b"}, k.Names())
	_, err := unix.Write(fds[0], []byte("x"))
	require.NoError(t, err)
	got := make([]byte, 1)
	_, err = end.Read(got)
	require.NoError(t, err)
	require.Equal(t, "x", string(got), "it is the same pipe")
	closeAll(fds)
	require.NoError(t, k.Close())

	k = open(t, dir)
	require.Equal(t, []string{"a", "b"}, k.Names(), "taken is not dropped")
	require.NoError(t, k.Drop("a"))
	requireEnded(t, end)
	require.NoError(t, k.Drop("b"))
	require.NoError(t, k.Drop("nothing"))
	require.NoError(t, k.Keep("a", int(end.Fd())), "the name is free again")
	require.NoError(t, k.Drop("a"))
}

// TestEnds has keepers end when they hold nothing and their daemon has gone,
// and not before.
func TestEnds(t *testing.T) {
	dir := t.TempDir()
	k := open(t, dir)
	pid := pidOf(t, k)
	fd, end := pipe(t)
	require.NoError(t, k.Keep("a", fd))
	require.NoError(t, unix.Close(fd))
	require.NoError(t, k.Close())
	time.Sleep(100 * time.Millisecond)
	require.NoError(t, unix.Kill(pid, 0))
	k = open(t, dir)
	require.NoError(t, k.Drop("a"))
	requireEnded(t, end)
	require.NoError(t, unix.Kill(pid, 0))
	require.NoError(t, k.Close())
	require.Eventually(t, func() bool { return unix.Kill(pid, 0) == unix.ESRCH }, time.Minute, 10*time.Millisecond)
	require.Empty(t, open(t, dir).Names(), "a socket without a keeper does no harm")
}

// TestKeeperDies gives a new keeper what the old one had.
func TestKeeperDies(t *testing.T) {
	dir := t.TempDir()
	k := open(t, dir)
	fd, end := pipe(t)
	require.NoError(t, k.Keep("a", fd))
	pid := pidOf(t, k)
	kill(t, pid)
	require.Eventually(t, func() bool { return pidOf(t, k) != pid }, time.Minute, 10*time.Millisecond)
	pid = pidOf(t, k)
	require.NoError(t, unix.Close(fd))
	require.NoError(t, k.Close())
	k = open(t, dir)
	require.Equal(t, []string{"a"}, k.Names())
	require.NoError(t, k.Drop("a"))
	requireEnded(t, end)

	// One that dies without a daemon takes what it has with it.
	fd, end = pipe(t)
	require.NoError(t, k.Keep("b", fd))
	require.NoError(t, unix.Close(fd))
	require.NoError(t, k.Close())
	kill(t, pid)
	requireEnded(t, end)
	require.Empty(t, open(t, dir).Names())
}

func TestRefused(t *testing.T) {
	k := open(t, t.TempDir())
	fd, _ := pipe(t)
	defer unix.Close(fd)
	for name, fds := range map[string][]int{
		"":                             {fd},
		"none":                         {},
		strings.Repeat("x", maxName+1): {fd},
		"too many":                     {fd, fd, fd, fd, fd, fd, fd, fd, fd},
	} {
		require.ErrorIs(t, k.Keep(name, fds...), errdefs.ErrInvalidArgument, name)
	}
	require.Error(t, k.Keep("closed", 1<<20))
	_, err := Open(t.Context(), "/nowhere", os.Args[0], keeperArg)
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Open(t.Context(), t.TempDir(), "/nowhere")
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorContains(t, Main(), "started by the daemon")
}

// TestWire talks to a keeper as daemons do that are older, newer or broken.
func TestWire(t *testing.T) {
	addr := &net.UnixAddr{Net: "unixpacket", Name: filepath.Join(t.TempDir(), "s")}
	l, err := net.ListenUnix(addr.Net, addr)
	require.NoError(t, err)
	ended := make(chan error, 1)
	go func() { ended <- serve(l) }()
	first := dial(t, addr)
	fd, end := pipe(t)
	for name, c := range map[string]struct {
		packet string
		fds    []int
		says   string // empty: the keeper hangs up
	}{
		"a later version":            {packet: `{"version":7,"op":"drop","name":"x","new":[1]}`, says: `{"version":1}`},
		"an unknown operation":       {packet: `{"version":7,"op":"dance"}`, fds: []int{fd}, says: `"dance"`},
		"no descriptor":              {packet: `{"version":1,"op":"keep","name":"x"}`, says: "missing"},
		"no name":                    {packet: `{"version":1,"op":"keep"}`, fds: []int{fd}, says: "missing"},
		"a name that is too long":    {packet: `{"version":1,"op":"keep","name":"` + strings.Repeat("n", maxName+1) + `"}`, fds: []int{fd}, says: "missing"},
		"no JSON":                    {packet: "hello"},
		"a packet that is too large": {packet: strings.Repeat(" ", maxMessage+1)},
		"too many descriptors":       {packet: `{"version":1,"op":"keep","name":"x"}`, fds: []int{fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd}},
	} {
		t.Run(name, func(t *testing.T) {
			conn := dial(t, addr)
			var rights []byte
			if c.fds != nil {
				rights = unix.UnixRights(c.fds...)
			}
			_, _, err := conn.WriteMsgUnix([]byte(c.packet), rights, nil)
			require.NoError(t, err)
			answer := make([]byte, maxMessage)
			n, err := conn.Read(answer)
			if c.says == "" {
				require.ErrorIs(t, err, io.EOF)
				return
			}
			require.NoError(t, err)
			require.True(t, json.Valid(answer[:n]))
			require.Contains(t, string(answer[:n]), c.says[1:len(c.says)-1])
		})
	}
	require.NoError(t, unix.Close(fd))
	requireEnded(t, end) // it kept none of them
	first.Close()
	require.NoError(t, <-ended)
}

func dial(t *testing.T, addr *net.UnixAddr) *net.UnixConn {
	t.Helper()
	conn, err := net.DialUnix(addr.Net, nil, addr)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// TestOtherUser connects as another user, whom no mode of a file keeps from it: the keeper hangs up.
func TestOtherUser(t *testing.T) {
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: fmt.Sprintf("@keeper-test-%d", os.Getpid())})
	require.NoError(t, err)
	ended := make(chan error)
	go func() { ended <- serve(l) }()
	first := dial(t, l.Addr().(*net.UnixAddr))
	require.NoError(t, send(first, message{Op: opList}, nil))
	_, _, err = receive(first)
	require.NoError(t, err)

	const keep = ^uintptr(0)
	other := make(chan error)
	go func() {
		runtime.LockOSThread() // which ends with the goroutine
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, 65534, keep); errno != 0 {
			other <- errno
			return
		}
		conn, err := net.DialUnix("unixpacket", nil, l.Addr().(*net.UnixAddr))
		if err == nil {
			defer conn.Close()
			_ = send(conn, message{Op: opList}, nil) // it may be gone already
			_, _, err = receive(conn)
		}
		other <- err
	}()
	err = <-other
	require.NotErrorIs(t, err, unix.EPERM, "this needs root")
	require.Error(t, err)
	require.NoError(t, send(first, message{Op: opList}, nil), "others are answered still")
	_, _, err = receive(first)
	require.NoError(t, err)
	first.Close()
	require.NoError(t, <-ended)
}

// serviceManager does what systemd's documentation says of the store, but that it
// keeps nothing. It returns what it is told.
func serviceManager(t *testing.T) <-chan string {
	t.Helper()
	addr := &net.UnixAddr{Net: "unixgram", Name: filepath.Join(t.TempDir(), "notify")}
	conn, err := net.ListenUnixgram(addr.Net, addr)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", addr.Name)
	t.Setenv("FDSTORE", "16")
	got := make(chan string, 10)
	go func() {
		raw, rights := make([]byte, 4096), make([]byte, 4096)
		for {
			n, nr, _, _, err := conn.ReadMsgUnix(raw, rights)
			if err != nil {
				return
			}
			fds, _ := parseRights(rights[:nr])
			got <- fmt.Sprintf("%s (%d)", raw[:n], len(fds))
			closeAll(fds)
		}
	}()
	return got
}

func TestSystemd(t *testing.T) {
	got := serviceManager(t)
	k, err := Open(context.Background(), "/nowhere")
	require.NoError(t, err)
	fd, end := pipe(t)
	require.NoError(t, k.Keep("a", fd))
	require.Equal(t, "FDSTORE=1\nFDPOLL=0\nFDNAME=a (1)", <-got)
	require.Equal(t, "BARRIER=1 (1)", <-got)
	require.NoError(t, k.Drop("a"))
	require.Equal(t, "FDSTOREREMOVE=1\nFDNAME=a (0)", <-got)
	require.Equal(t, "BARRIER=1 (1)", <-got)
	require.NoError(t, k.Close())
	require.NoError(t, unix.Close(fd))
	requireEnded(t, end)
	t.Setenv("FDSTORE", "0")
	_, place := openSystemd()
	require.Nil(t, place, "a unit without a store")
}

// TestAdopt has systemd become one that keeps descriptors while a process does it.
func TestAdopt(t *testing.T) {
	dir := t.TempDir()
	k := open(t, dir)
	pid := pidOf(t, k)
	fd, end := pipe(t)
	require.NoError(t, k.Keep("a", fd))
	require.NoError(t, unix.Close(fd))
	require.NoError(t, k.Close())

	got := serviceManager(t)
	k = open(t, dir)
	require.Equal(t, "FDSTORE=1\nFDPOLL=0\nFDNAME=a (1)", <-got)
	require.Equal(t, "BARRIER=1 (1)", <-got)
	require.Eventually(t, func() bool { return unix.Kill(pid, 0) == unix.ESRCH }, time.Minute, 10*time.Millisecond)
	require.Equal(t, []string{"a"}, k.Names())
	fds := k.Take("a")
	_, err := unix.Write(fds[0], []byte("x"))
	require.NoError(t, err)
	closeAll(fds)
	_, err = end.Read(make([]byte, 1))
	require.NoError(t, err)
	requireEnded(t, end)
}
