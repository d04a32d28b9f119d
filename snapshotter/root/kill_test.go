package root

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/snapshotter/fuseconn"
	"github.com/beam-cloud/containerd-clip/snapshotter/keeper"
	"github.com/beam-cloud/containerd-clip/snapshotter/layerfs"
)

// Arguments with which the test's own program is another one.
const (
	keeperArg  = "-keeper"
	mounterArg = "-mounter"
	helperArg  = "-helper"
)

func TestMain(m *testing.M) {
	var err error
	switch {
	case len(os.Args) == 2 && os.Args[1] == keeperArg:
		err = keeper.Main()
	case len(os.Args) == 2 && os.Args[1] == helperArg:
		err = HelperMain(context.Background(), os.Stdin, os.Stdout)
	case len(os.Args) == 4 && os.Args[1] == mounterArg:
		err = mountForEver(context.Background(), os.Args[2], Mode(os.Args[3]))
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// mountForEver mounts and reads roots, as a daemon does with itself, until it
// is killed.
func mountForEver(ctx context.Context, dir string, m Mode) error {
	k, err := keeper.Open(ctx, dir, os.Args[0], keeperArg)
	if err != nil {
		return err
	}
	session := fuseconn.NewSession(k)
	files, err := layerfs.Resume(ctx, session, nil)
	if errdefs.IsNotFound(err) {
		files, err = layerfs.New(ctx, session)
	}
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		if _, err := probe(ctx, m, dir, files, Helper{os.Args[0], helperArg}); err != nil && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
}

// TestKilledWhileMounting kills a process that mounts roots on files that it
// serves itself: it ends at once, and its successor goes on. Without a helper,
// one of twenty would wait for its own answer.
func TestKilledWhileMounting(t *testing.T) {
	for _, mode := range []Mode{File, Loop, FUSE} {
		t.Run(string(mode), func(t *testing.T) {
			dir := t.TempDir()
			t.Cleanup(func() { unmountBelow(t, dir) })
			for range 40 {
				cmd := exec.Command(os.Args[0], mounterArg, dir, string(mode))
				out, err := cmd.StdoutPipe()
				require.NoError(t, err)
				cmd.Stderr = os.Stderr
				require.NoError(t, cmd.Start())
				ready := make([]byte, 6)
				_, err = out.Read(ready)
				require.NoError(t, err)
				time.Sleep(time.Duration(rand.IntN(50_000)) * time.Microsecond)
				require.NoError(t, cmd.Process.Kill())
				ended := make(chan error, 1)
				go func() { ended <- cmd.Wait() }()
				select {
				case <-ended:
				case <-time.After(time.Minute):
					require.Fail(t, "the process hangs")
				}
			}
			k, err := keeper.Open(t.Context(), dir, os.Args[0], keeperArg)
			require.NoError(t, err)
			files, err := layerfs.Resume(t.Context(), fuseconn.NewSession(k), nil)
			require.NoError(t, err)
			can, err := probe(t.Context(), mode, dir, files, Helper{os.Args[0], helperArg})
			require.NoError(t, err)
			require.Equal(t, Ability{Mode: mode}, can)
			unmountBelow(t, dir)
			require.NoError(t, files.Close(), "nothing uses it: neither roots nor processes that hang")
			require.Empty(t, k.Names())
			require.NoError(t, k.Close()) // the keeper has nothing to hold any more
		})
	}
}

func unmountBelow(t *testing.T, dir string) {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	require.NoError(t, err)
	for i := range infos {
		require.NoError(t, Unmount(infos[len(infos)-1-i].Mountpoint))
	}
}
