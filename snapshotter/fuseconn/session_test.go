package fuseconn

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/snapshotter/keeper"
)

// Arguments with which the test's own program is another one.
const (
	keeperArg = "-keeper"
	serverArg = "-server"
)

func TestMain(m *testing.M) {
	var err error
	switch {
	case len(os.Args) == 2 && os.Args[1] == keeperArg:
		err = keeper.Main()
	case len(os.Args) == 3 && os.Args[1] == serverArg:
		err = serveSilently(os.Args[2])
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

var testOptions = Options{Source: "test", Flags: []string{"allow_other"}, Name: "test-1", KeepMount: true}

func session(t *testing.T, dir string) *Session {
	t.Helper()
	k, err := keeper.Open(t.Context(), dir, os.Args[0], keeperArg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, k.Close()) })
	return NewSession(k)
}

// answers gives each file of its only directory the size that it has.
type answers struct {
	fuse.RawFileSystem
	size uint64
}

func (a answers) Lookup(_ <-chan struct{}, _ *fuse.InHeader, _ string, out *fuse.EntryOut) fuse.Status {
	if a.size == 0 {
		fmt.Println("asked")
		select {} // it never says anything
	}
	out.EntryValid, out.AttrValid = Forever, Forever
	out.NodeId, out.Attr = 2, fuse.Attr{Ino: 2, Mode: unix.S_IFREG | 0o400, Size: a.size}
	return fuse.OK
}

// serveSilently mounts a file system that takes requests and answers none, and
// has a process ask it something.
func serveSilently(dir string) error {
	k, err := keeper.Open(context.Background(), dir, os.Args[0], keeperArg)
	if err != nil {
		return err
	}
	o := testOptions
	o.Session = NewSession(k)
	c, err := Mount(context.Background(), answers{RawFileSystem: fuse.NewDefaultRawFileSystem()}, o)
	if err != nil {
		return err
	}
	cmd := exec.Command("stat", "--format=%s", "/proc/self/fd/3/file")
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(c.FD()), "mount")}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

func TestGreeting(t *testing.T) {
	in, out := make([]byte, 200), make([]byte, initOutSize)
	for i := range in {
		in[i] = byte(i)
	}
	binary.NativeEndian.PutUint32(in[4:], opInit)
	binary.NativeEndian.PutUint32(out[initOutMinor:], 28)
	binary.NativeEndian.PutUint32(out[initOutMinor+4:], 131072)
	binary.NativeEndian.PutUint32(out[initOutFlags:], 0x11223344)
	require.Nil(t, greetingOf(in[:initInSize-1], out))
	require.Nil(t, greetingOf(in, out[:initOutSize-1]))
	require.False(t, canResend(nil))
	g := greetingOf(in, out)
	require.False(t, canResend(g), "it was not agreed upon")
	binary.NativeEndian.PutUint32(out[initOutFlags2:], uint32(fuse.CAP_HAS_RESEND>>32))
	g = greetingOf(in, out)
	require.True(t, canResend(g))
	require.Equal(t, in[:initInMinor], g[:initInMinor], "header and major version")
	for i, want := range []uint32{28, 131072, 0x11223344, uint32(fuse.CAP_HAS_RESEND >> 32)} {
		require.Equal(t, want, binary.NativeEndian.Uint32(g[initInMinor+4*i:]), "%d", i)
	}
	require.Equal(t, in[initInMinor+16:initInSize], g[initInMinor+16:])

	fd, err := writeGreeting(g)
	require.NoError(t, err)
	got, err := readGreeting(fd)
	require.NoError(t, err)
	require.Equal(t, g, got)
	require.NoError(t, unix.Ftruncate(fd, 50))
	_, err = readGreeting(fd)
	require.ErrorContains(t, err, "damaged")
	require.NoError(t, unix.Close(fd))
}

// TestCannotResume has what is kept be of no use: it is let go of.
func TestCannotResume(t *testing.T) {
	_, err := Resume(t.Context(), fuse.NewDefaultRawFileSystem(), Options{})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	dev := func() int {
		fd, err := unix.Open(fuseDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		return fd
	}
	greeting := func() int {
		fd, err := writeGreeting(make([]byte, initInSize))
		require.NoError(t, err)
		return fd
	}
	dirFD := func() int {
		fd, err := unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		return fd
	}
	for name, c := range map[string]struct {
		fds  []func() int
		says string
	}{
		"nothing mounted": {[]func() int{dirFD, greeting, dev}, "ended"},
		"no greeting":     {[]func() int{dev, dirFD}, "missing"},
		"no device":       {[]func() int{greeting, dirFD}, "missing"},
		"no mount":        {[]func() int{greeting, dev}, "mount is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			first := session(t, dir)
			var fds []int
			for _, open := range c.fds {
				fds = append(fds, open())
			}
			require.NoError(t, first.keeper.Keep(testOptions.Name, fds...))
			for _, fd := range fds {
				require.NoError(t, unix.Close(fd))
			}
			require.NoError(t, first.keeper.Close())

			o := testOptions
			o.Session = session(t, dir)
			require.Equal(t, []string{o.Name}, o.Session.Waiting())
			_, err := Resume(t.Context(), fuse.NewDefaultRawFileSystem(), o)
			require.ErrorContains(t, err, c.says)
			_, err = Resume(t.Context(), fuse.NewDefaultRawFileSystem(), o)
			require.ErrorIs(t, err, errdefs.ErrNotFound)
			require.NoError(t, o.Session.keeper.Close())
			require.Empty(t, session(t, dir).Waiting())
		})
	}
}

// TestResume kills a server that took a request, and answers in its place.
func TestResume(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], serverArg, dir)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	cmd.Stderr = os.Stderr
	require.NoError(t, cmd.Start())
	line := make([]byte, 6)
	_, err = out.Read(line)
	require.NoError(t, err)
	require.Equal(t, "asked\n", string(line))
	require.NoError(t, cmd.Process.Kill())
	// The asking process has the other end of out and prints the answer to it.
	require.NoError(t, cmd.Process.Release())

	o := testOptions
	o.Session = session(t, dir)
	c, err := Resume(t.Context(), answers{fuse.NewDefaultRawFileSystem(), 42}, o)
	require.NoError(t, err)
	got, err := io.ReadAll(out)
	require.NoError(t, err)
	require.Equal(t, "42\n", string(got), "who asked the killed server")
	require.NoError(t, c.Release())
	require.True(t, c.Wait(time.Minute))
	require.Empty(t, o.Session.Waiting())
}
