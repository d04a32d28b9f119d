package e2e

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

type finding struct{ Status, Check, Found, Remedy string }

// doctor runs clipctl doctor and returns what it found wrong, by check. Its exit code goes by that.
func (w *world) doctor(c *harness.Containerd, args ...string) map[string]finding {
	w.Helper()
	result, err := c.Clipctl(w.ctx, append([]string{"doctor", "--json", "--clip-address", w.daemon.Socket, "--root", w.daemon.Root}, args...)...)
	var all []finding
	require.NoError(w, json.Unmarshal([]byte(result.Stdout), &all), result.Output())
	wrong, failures := map[string]finding{}, 0
	for _, f := range all {
		if f.Status != "ok" {
			require.NotEmpty(w, f.Remedy, "%+v", f)
			wrong[f.Check] = f
		}
		if f.Status == "failure" {
			failures++
		}
	}
	if failures == 0 {
		require.NoError(w, err)
	} else {
		require.Error(w, err)
		require.Equal(w, 3, result.Code)
		requireClear(w.T, result.Stderr, "checks failed")
	}
	return wrong
}

// TestDoctor has a setup in which all is right, and breaks it part by part.
func TestDoctor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ref := w.ref(images.SmallName)
	w.index(images.SmallName)
	require.Empty(t, w.doctor(w.worker, ref))
	text, err := w.worker.Clipctl(w.ctx, "doctor")
	require.NoError(t, err)
	require.Regexp(t, `(?m)^ok +kernel +roots are mounted in mode`, text.Stdout)

	wrong := w.doctor(w.worker, w.ref(images.SiblingName), w.registry.Ref("small/none:1"))
	require.Len(t, wrong, 2)
	require.Contains(t, wrong["archive"].Remedy, "clipctl index "+w.ref(images.SiblingName)+" --push")
	require.Contains(t, wrong["registry"].Found, "none")
	// The daemon's archives count, and where else it looks.
	file := w.placeArchive(images.SiblingName, "sibling.clip")
	require.Empty(t, w.doctor(w.worker, w.ref(images.SiblingName)))
	require.NoError(t, os.Remove(file))
	require.NoError(t, w.registry.SwitchOff())
	require.Contains(t, w.doctor(w.worker, ref)["registry"].Remedy, "network")
	require.NoError(t, w.registry.SwitchOn())

	w.requireBadContainerd()
	require.NoError(t, w.daemon.Stop())
	wrong = w.doctor(w.worker)
	require.Len(t, wrong, 1, "the kernel is as good as before")
	require.Contains(t, wrong["daemon"].Remedy, "systemctl")
}

// requireBadContainerd has containerds that are configured wrongly.
func (w *world) requireBadContainerd() {
	w.Helper()
	bad, err := w.lab.StartCustomContainerd(w.ctx, "bad", "containerd", `
[proxy_plugins.clip]
type = "snapshot"
address = "`+w.daemon.Socket+`"
capabilities = ["rebase"]
[proxy_plugins.clip.exports]
root = "/nowhere"
`)
	require.NoError(w, err)
	result, err := bad.Clipctl(w.ctx, "doctor", "--clip-address", w.daemon.Socket+".other")
	require.Error(w, err)
	for _, what := range []string{"enable_remote_snapshot_annotations is not", "have rebase", "containerd asks", "no unpack platforms defined", "containerd-clip-grpc running?"} {
		require.Contains(w, result.Stdout, what)
	}
	wrong := w.doctor(bad)
	require.Contains(w, wrong, "unpack_config")
	require.NotContains(w, wrong, "imports")

	stock := w.stock()
	require.Contains(w, w.doctor(stock)["plugin"].Remedy, "config.toml.example")
	dropIn, main := w.lab.Path("stock", "conf.d", "50-clip.toml"), w.lab.Path("stock", "config.toml")
	example, err := os.ReadFile(w.lab.Path("worker", "conf.d", "50-clip.toml"))
	require.NoError(w, err)
	require.NoError(w, os.WriteFile(dropIn, example, 0o600))
	require.Equal(w, "systemctl restart containerd", w.doctor(stock)["plugin"].Remedy)
	config, err := os.ReadFile(main)
	require.NoError(w, err)
	before, after, ok := strings.Cut(string(config), "imports = [")
	require.True(w, ok)
	_, after, _ = strings.Cut(after, "\n")
	require.NoError(w, os.WriteFile(main, []byte(before+after), 0o600))
	wrong = w.doctor(stock)
	require.Contains(w, wrong["imports"].Found, dropIn)
	require.Contains(w, wrong["imports"].Remedy, "imports = [")
}
