package command

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/transfer"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/snapshotter/control"
)

func TestExitCodes(t *testing.T) {
	t.Setenv("CONTAINERD_ADDRESS", filepath.Join(t.TempDir(), "none"))
	t.Setenv("CLIP_ADDRESS", filepath.Join(t.TempDir(), "none"))
	for _, c := range []struct {
		args []string
		code int
	}{
		{nil, exitDone},
		{[]string{"inspect", "--help"}, exitDone},
		{[]string{"surprise"}, exitUsage},
		{[]string{"inspect"}, exitUsage},
		{[]string{"status", "--surprise"}, exitUsage},
		{[]string{"index", "x", "--platform", "a", "--all-platforms"}, exitUsage},
		{[]string{"content", "surprise"}, exitUsage},
		{[]string{"inspect", "/nowhere"}, exitError},
		{[]string{"status"}, exitError},
		{[]string{"doctor", "--root", t.TempDir()}, exitWrong},
	} {
		var stdout, stderr bytes.Buffer
		require.Equal(t, c.code, Main(t.Context(), c.args, &stdout, &stderr), "%v: %s", c.args, stderr.String())
		require.Equal(t, c.code == exitDone, stderr.Len() == 0, "%v: %s", c.args, stderr.String())
	}
}

func TestConfigFlag(t *testing.T) {
	for want, args := range map[string][]string{
		"/etc/containerd/config.toml": {"containerd", ""},
		"/a":                          {"/usr/bin/containerd", "--config", "/a", "-l", "debug", ""},
		"/b":                          {"containerd", "-l", "debug", "--config=/b"},
		"/c":                          {"containerd", "-c", "/c"},
	} {
		require.Equal(t, want, configFlag(args))
	}
}

// TestCheck checks a right archive and some that say what is not so.
func TestCheck(t *testing.T) {
	dir, img := layout(t)
	right := filepath.Join(t.TempDir(), "a.clip")
	_, err := run(t, "index", "oci:"+dir, "-o", right, "--storage-ref", "example.com/app:1")
	require.NoError(t, err)
	out, err := run(t, "check", right, "oci:"+dir)
	require.NoError(t, err)
	require.Contains(t, out, "ok    layer 1/1 "+img.Layers[0].Digest.String()+": 1 files, 1 spans")

	for want, edit := range map[string]func(*archive.Image){
		"its file f is another":     func(i *archive.Image) { i.Layers[0].Index.Entries[0].Mode = 0o777 },
		"it has 0 files instead of": func(i *archive.Image) { i.Layers[0].Index.Entries = nil },
		"span 0":                    func(i *archive.Image) { i.Layers[0].Index.Spans[0].InEnd-- },
	} {
		a, err := archive.OpenFile(right)
		require.NoError(t, err)
		image, err := a.Image()
		require.NoError(t, err)
		edit(image)
		wrong := filepath.Join(t.TempDir(), "b.clip")
		_, err = archive.WriteFile(wrong, image)
		require.NoError(t, err, want)
		require.NoError(t, a.Close())
		out, err := run(t, "check", wrong, "oci:"+dir)
		require.ErrorIs(t, err, errFindings, want)
		require.Contains(t, out, want)
	}
	_, err = run(t, "check", right, "oci:"+t.TempDir())
	require.Error(t, err)
	require.NotErrorIs(t, err, errFindings)
}

func TestCacheCommands(t *testing.T) {
	var pruned control.Prune
	serveDaemon(t, fakeDaemon{&pruned})
	out, err := run(t, "cache", "ls")
	require.NoError(t, err)
	require.Contains(t, out, "sha256:0123456789abcdef  250 B of 1.0 kB (25%)")
	out, err = run(t, "cache", "usage")
	require.NoError(t, err)
	require.Equal(t, "1.0 kB of at most 2.0 kB in 1 layers; 0 B of it in layers that containers use\n", out)
	out, err = run(t, "cache", "prune", "--all")
	require.NoError(t, err)
	require.Equal(t, "gave up 4.0 MB of 3 layers\n", out)
	require.True(t, pruned.All)
	_, err = run(t, "cache", "prune")
	require.NoError(t, err)
	require.False(t, pruned.All)
}

// TestPullProgress shows each blob once when it is there.
func TestPullProgress(t *testing.T) {
	var b strings.Builder
	p := newPullProgress(&b)
	desc := &ocispec.Descriptor{Size: 2000}
	for _, e := range []transfer.Progress{
		{Event: "Resolving from x"}, {Name: "app", Event: "saved"},
		{Name: "layer", Event: "waiting", Desc: desc}, {Name: "layer", Event: "downloading", Desc: desc, Progress: 10},
		{Name: "layer", Event: "complete", Desc: desc}, {Name: "layer", Event: "complete", Desc: desc},
		{Name: "layer", Event: "extracted", Desc: desc}, {Name: "config", Event: "already exists", Desc: desc},
	} {
		p.on(e)
	}
	p.close()
	require.Equal(t, "layer 2.0 kB complete\nlayer 2.0 kB extracted\nconfig 2.0 kB already exists\n", b.String())
}

// terminal returns a terminal and what was written to it so far.
func terminal(t *testing.T) (tty *os.File, written func() string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	require.NoError(t, err)
	t.Cleanup(func() { master.Close() })
	require.NoError(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { tty.Close() })
	require.NoError(t, unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 120}))
	var mu sync.Mutex
	var b bytes.Buffer
	go func() {
		_, _ = io.Copy(writerFunc(func(p []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return b.Write(p)
		}), master)
	}()
	return tty, func() string { mu.Lock(); defer mu.Unlock(); return b.String() }
}

// TestPullBars has many blobs come at once while bars are drawn.
func TestPullBars(t *testing.T) {
	tty, written := terminal(t)
	p := newPullProgress(tty)
	require.NotNil(t, p.bars)
	var wg sync.WaitGroup
	began := time.Now()
	for i := range 8 {
		wg.Go(func() {
			name := fmt.Sprintf("layer-%d", i)
			// Until it is drawn, which a busy machine does when it has time.
			drawn := func() bool { return strings.Contains(written(), "downloading") }
			for n := int64(0); n < 100 || !drawn() && time.Since(began) < time.Minute; n++ {
				p.on(transfer.Progress{Event: "downloading", Name: name, Progress: n % 100, Desc: &ocispec.Descriptor{Size: 100}})
				time.Sleep(5 * time.Millisecond)
			}
			p.on(transfer.Progress{Event: "complete", Name: name, Desc: &ocispec.Descriptor{Size: 100}})
		})
	}
	wg.Wait()
	p.close()
	for _, what := range []string{"layer-0", "layer-7", "100.0 b / 100.0 b", "downloading", "complete"} {
		require.Eventually(t, func() bool { return strings.Contains(written(), what) }, time.Minute, 10*time.Millisecond, what)
	}
}

func TestCompletion(t *testing.T) {
	t.Setenv("CONTAINERD_ADDRESS", filepath.Join(t.TempDir(), "none"))
	for line, want := range map[string]string{
		"status --w":    "--watch\tshow it again every second until interrupted\n:4\n",
		"cache pr":      "prune\tGive up what was fetched of layers that no container uses\n:4\n",
		"inspect ":      ":0\n", // files
		"check ":        ":0\n",
		"check f ":      ":4\n", // images, of which there are none
		"check f i ":    ":4\n",
		"doctor a b ":   ":4\n",
		"content ensu":  "ensure\tFetch what containerd's store lacks of an image\n:4\n",
		"record IMAGE ": ":0\n", // CMD
	} {
		out, err := run(t, append([]string{"__complete"}, strings.Split(line, " ")...)...)
		require.NoError(t, err, line)
		require.Equal(t, want, out, line)
	}
	out, err := run(t, "completion", "bash")
	require.NoError(t, err)
	require.Contains(t, out, "__start_clipctl")
}
