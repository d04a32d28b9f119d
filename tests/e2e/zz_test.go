package e2e
import ("testing";"github.com/stretchr/testify/require";"github.com/beam-cloud/containerd-clip/tests/internal/harness";"github.com/beam-cloud/containerd-clip/tests/internal/rootdiff"
 "github.com/beam-cloud/containerd-clip/tests/internal/images")
func TestZZ(t *testing.T) {
	w := &world{T: t, ctx: t.Context(), lab: harness.ForTest(t)}
	var err error
	w.registry, err = w.lab.StartRegistry(w.ctx)
	require.NoError(t, err)
	w.builder, err = w.lab.StartContainerd(w.ctx, "builder", nil)
	require.NoError(t, err)
	layout, err := images.Small(w.lab.Path("small"))
	require.NoError(t, err)
	file := w.lab.Path("small.tar")
	require.NoError(t, layout.WriteTar(file))
	w.layout = layout
	w.ctr(w.builder, "image", "import", "--no-unpack", "--all-platforms", file)
	for _, name := range []string{images.SmallName, images.SiblingName, images.BaseName, images.PlatformName} {
		w.publish(name)
	}
	t.Log(w.ctr(w.builder, "image", "ls"))
	t.Log(w.layers(images.SmallName), w.size(images.SmallName), w.referrers(w.ref(images.SmallName), "amd64"))
	stock := w.stock()
	ref := w.ref(images.SmallName)
	w.pull(stock, eager, ref)
	d := w.view(stock, eager, ref)
	a, err := rootdiff.Read(d)
	require.NoError(t, err)
	for k, e := range a { if len(k) < 20 && len(k) > 0 && k[0] != 'm' { t.Logf("%q %o %d:%d %d %v nlink %d %q %q %q", k, e.Mode, e.UID, e.GID, e.Size, e.Mtime, e.Nlink, e.Peers, e.Target, e.Xattrs) } }
	w.worker = stock
	require.Equal(t, "hello from clip\n", w.run(stock, eager, ref, "sh", "/app/run.sh"))
	w.attach(images.SmallName, "/work/main/go.mod")
	t.Log(w.referrers(w.ref(images.SmallName), "amd64"))
	_ = require.Equal
}
