package e2e

import (
	"fmt"
	"image"
	"image/color"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// tracedPage is what a page of clipctl trace shows of each layer, by the beginning of its diff ID.
type tracedPage struct {
	requests map[string]int // pieces of the drawing over time that are requests
	reads    map[string]int
	mapped   map[string]int // pieces of the layer's map that were fetched and read
	total    int            // requests, as the figures say
}

var (
	tracedRow   = regexp.MustCompile(`aria-label="(reads and fetches|map) of layer [0-9]+: ([0-9a-f]{12})">(.*?)</svg>`)
	tracedPiece = regexp.MustCompile(`<rect class="(reader|readahead|prefetch|fill|failed|read|used)"`)
	tracedTotal = regexp.MustCompile(`<b>([0-9]+)</b>requests`)
)

func readTrace(t *testing.T, file string) tracedPage {
	t.Helper()
	html, err := os.ReadFile(file)
	require.NoError(t, err)
	p := tracedPage{requests: map[string]int{}, reads: map[string]int{}, mapped: map[string]int{}}
	rows := tracedRow.FindAllStringSubmatch(strings.ReplaceAll(string(html), "\n", ""), -1)
	require.NotEmpty(t, rows)
	for _, row := range rows {
		for _, piece := range tracedPiece.FindAllStringSubmatch(row[3], -1) {
			require.NotEqual(t, "failed", piece[1])
			switch piece[1] {
			case "read":
				p.reads[row[2]]++
			case "used":
				p.mapped[row[2]]++
			default:
				p.requests[row[2]]++
			}
		}
	}
	total := tracedTotal.FindStringSubmatch(string(html))
	require.NotNil(t, total)
	p.total, err = strconv.Atoi(total[1])
	require.NoError(t, err)
	return p
}

// TestTrace draws a start that is run for it, and an ordinary one that the daemon saw: each request that the registry
// got is there, and no other.
func TestTrace(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, "[fill]\nmode = 'off'\n")
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	command := []string{"md5sum", "/sizes/noise-3M+1", "/sizes/noise-1M"}
	file := w.lab.Path("trace.html")

	w.pull(w.worker, lazy, ref)
	w.registry.Reset()
	result, err := w.worker.Clipctl(w.ctx, append([]string{"trace", ref, "--html", file, "--"}, command...)...)
	require.NoError(t, err)
	w.requireTraced(file, result)
	w.requireShown(file)

	_, worker := w.workerWith("[fill]\nmode = 'off'\n")
	_, err = worker.Clipctl(w.ctx, "trace", ref, "--html", file, "--from-daemon")
	require.ErrorContains(t, err, "not found")
	w.pull(worker, lazy, ref)
	_, err = worker.Clipctl(w.ctx, "trace", ref, "--html", file, "--from-daemon")
	require.ErrorContains(t, err, "no start of")
	w.registry.Reset()
	w.run(worker, lazy, ref, command...)
	result, err = worker.Clipctl(w.ctx, "trace", ref, "--html", file, "--from-daemon")
	require.NoError(t, err)
	w.requireTraced(file, result)
}

// requireTraced compares a page with what the registry was asked.
func (w *world) requireTraced(file string, result harness.Result) {
	w.Helper()
	page, asked, sent := readTrace(w.T, file), map[string]int{}, w.registry.Requests()
	img, err := w.builder.Client().GetImage(w.ctx, w.ref(images.SmallName))
	require.NoError(w, err)
	diffIDs, err := img.RootFS(w.ctx)
	require.NoError(w, err)
	for i, layer := range w.layers(images.SmallName) {
		if n := len(sent.Gets(layer)); n > 0 {
			asked[diffIDs[i].Encoded()[:12]] = n
		}
	}
	require.NotEmpty(w, asked)
	require.Equal(w, asked, page.requests, "%s", sent)
	require.Equal(w, len(sent.Gets(w.layers(images.SmallName)...)), page.total)
	require.Contains(w, result.Stdout, fmt.Sprintf("%s\t%d requests, ", file, page.total))
	for layer := range asked {
		require.Positive(w, page.reads[layer])
		require.Positive(w, page.mapped[layer])
	}
}

// browser finds one that may read files in /tmp, as a snap may not. Ubuntu has no package of one.
func (w *world) browser() (path string, ok bool) {
	w.Helper()
	for _, name := range []string{"chromium", "google-chrome"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		if real, err := filepath.EvalSymlinks(path); err == nil && filepath.Base(real) != "snap" {
			return path, true
		}
	}
	release, err := os.ReadFile("/etc/os-release")
	if err != nil || !strings.Contains("\n"+string(release), "\nID=ubuntu") {
		need.Missing(w, "chromium: make deps installs it on Debian")
	}
	return "", false
}

// requireShown looks at a page in light and dark.
func (w *world) requireShown(file string) {
	w.Helper()
	browser, ok := w.browser()
	if !ok {
		w.Log("this is Ubuntu without google-chrome: nobody looks at the page")
		return
	}
	for _, scheme := range []struct {
		name         string
		setting      int // chromium's number of it
		ground, used color.NRGBA
	}{
		{"light", 1, color.NRGBA{0xff, 0xff, 0xff, 0xff}, color.NRGBA{0x15, 0x80, 0x3d, 0xff}},
		{"dark", 0, color.NRGBA{0x14, 0x18, 0x1d, 0xff}, color.NRGBA{0x4c, 0xc2, 0x6f, 0xff}},
	} {
		colors := w.screenshot(browser, file, scheme.name, scheme.setting)
		require.Greater(w, colors[scheme.ground], 100_000, "the page is %s", scheme.name)
		require.Greater(w, colors[scheme.used], 100, "and shows what was fetched and read")
		require.Greater(w, len(colors), 20, "and letters")
	}
}

// screenshot has a browser show a page, and returns how many pixels there are of each colour.
func (w *world) screenshot(browser, file, name string, scheme int) map[color.NRGBA]int {
	w.Helper()
	shot := w.lab.Path(name + ".png")
	cmd := exec.CommandContext(w.ctx, browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1400",
		"--user-data-dir="+filepath.Join(w.TempDir(), "profile"), fmt.Sprintf("--blink-settings=preferredColorScheme=%d", scheme), "--screenshot="+shot, "file://"+file)
	out, err := cmd.CombinedOutput()
	require.NoError(w, err, "%s", out)
	f, err := os.Open(shot)
	require.NoError(w, err, "%s", out)
	defer f.Close()
	picture, err := png.Decode(f)
	require.NoError(w, err)
	return colorsOf(picture)
}

func colorsOf(picture image.Image) map[color.NRGBA]int {
	colors, size := map[color.NRGBA]int{}, picture.Bounds()
	for y := size.Min.Y; y < size.Max.Y; y++ {
		for x := size.Min.X; x < size.Max.X; x++ {
			colors[color.NRGBAModel.Convert(picture.At(x, y)).(color.NRGBA)]++
		}
	}
	return colors
}
