package e2e

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// Every secret in this test contains it.
const secret = "S3CRET"

// TestSecretsInNoLog has credentials wherever they can be (docker's config, hosts.toml, addresses, tokens, signed
// redirects, labels) and a registry that fails in every way in which they could be named: they are in no log, not even
// at level debug, and in no label.
func TestSecretsInNoLog(t *testing.T) {
	t.Parallel()
	w := newFaultWorld(t)
	storage, err := w.lab.StartMirror(w.registry)
	require.NoError(t, err)
	sibling := w.world.ref(images.SiblingName)
	w.index(images.SiblingName)
	w.writeSecrets()
	var printed strings.Builder
	for name, c := range map[string]struct {
		gate  gate
		fail  func()
		reads bool
	}{
		"all is well":                {reads: true},
		"storage refuses":            {gate: gate{storage: 403}},
		"storage is broken":          {gate: gate{storage: 500}},
		"storage is gone":            {fail: func() { require.NoError(t, storage.SwitchOff()) }},
		"redirect to nonsense":       {gate: gate{location: "http://" + secret + " %zz/?key=" + secret}},
		"redirect to no address":     {gate: gate{location: "ftp://u:" + secret + "@example.invalid/?key=" + secret}},
		"redirect to nowhere":        {gate: gate{location: "http://u:" + secret + "@nowhere.invalid/?key=" + secret}},
		"registry refuses tokens":    {gate: gate{refuse: 401}},
		"registry forbids":           {gate: gate{refuse: 403}},
		"token server is broken":     {gate: gate{token: 500}},
		"token server refuses":       {gate: gate{token: 401}},
		"token server says nonsense": {gate: gate{token: -1}},
	} {
		t.Run(name, func(t *testing.T) {
			w, root := w.cold(t)
			if !c.reads { // which takes as long as reads go on
				w.giveUpSoon()
			}
			g := c.gate
			g.storageHost, g.asked = storage.Host(), new(atomic.Int64)
			w.registry.Misbehave(g.guard)
			storage.Misbehave(onBlobs(-1, func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
				if g.storage != 0 {
					answer(g.storage)(rw, r, next)
					return
				}
				next.ServeHTTP(rw, r)
			}))
			if c.fail != nil {
				c.fail()
				defer func() { require.NoError(t, storage.SwitchOn()) }()
			}
			sum, err := w.sum(root)
			if c.reads {
				require.NoError(t, err)
				require.Equal(t, w.want, sum)
			} else {
				require.Error(t, err)
			}
			if c.reads {
				_, err = w.worker.RunContainerWith(w.ctx, []string{"--snapshotter-label", "containerd.io/snapshot/x=" + secret + "-label"},
					lazy, w.ref, "labelled", "sh", "/app/run.sh")
				require.NoError(t, err)
			}
			asked := g.asked.Load()
			require.Positive(t, asked, "the gate was met")
			w.ctr(w.worker, "image", "pull", "--snapshotter", lazy, sibling)
			require.Greater(t, g.asked.Load(), asked, "its archive was looked for there")
			w.removeImage(w.worker, sibling)
			w.registry.Misbehave(nil)
			status, err := w.worker.Clipctl(w.ctx, "status")
			require.NoError(t, err)
			printed.WriteString(status.Output())
		})
	}
	requireNoSecret(t, "clipctl status", printed.String())
	requireNoSecret(t, "the daemon", w.daemon.Log())
	require.Contains(t, w.daemon.Log(), "level=debug", "it was asked for")
	for _, key := range w.snapshots(w.ctx, w.worker, lazy) {
		requireNoSecret(t, "labels of "+key, w.ctr(w.worker, "snapshots", "--snapshotter", lazy, "info", key))
	}
}

// giveUpSoon has the daemon give up reads early, until the world is made cold again.
func (w *faultWorld) giveUpSoon() {
	w.Helper()
	config, err := os.ReadFile(w.daemon.Config)
	require.NoError(w, err)
	soon := regexp.MustCompile("give_up = .*").ReplaceAllString(string(config), "give_up = '2s'")
	require.NotEqual(w, string(config), soon)
	w.setConfig(soon)
	require.NoError(w, w.daemon.Stop())
	require.NoError(w, w.lab.RestartDaemon(w.ctx, w.daemon))
	w.foundAgain(w.worker)
	w.setConfig(string(config))
}

func requireNoSecret(t *testing.T, whose, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		require.NotContains(t, line, secret, "in what %s said", whose)
		require.NotContains(t, line, base64.StdEncoding.EncodeToString([]byte("someone:" + secret))[:16], "in what %s said", whose)
	}
}

// writeSecrets writes what administrators write.
func (w *faultWorld) writeSecrets() {
	w.Helper()
	auth := base64.StdEncoding.EncodeToString([]byte("someone:" + secret + "-password"))
	docker := w.lab.Path("home", ".docker")
	require.NoError(w, os.MkdirAll(docker, 0o700))
	require.NoError(w, os.WriteFile(filepath.Join(docker, "config.json"),
		fmt.Appendf(nil, `{"auths": {%q: {"auth": %q}}}`, w.registry.Host(), auth), 0o600))
	dir := filepath.Join(w.lab.Path("certs.d"), w.registry.Host())
	require.NoError(w, os.MkdirAll(dir, 0o700))
	text := fmt.Sprintf("server = \"http://%[1]s\"\n[host.\"http://u:%[2]s-address@127.0.0.1:1\"]\ncapabilities = [\"pull\"]\n"+
		"[host.\"http://u:%[2]s-address@127.0.0.1:1\".header]\nX-Key = \"%[2]s-header\"\n"+
		"[host.\"http://%[1]s\"]\ncapabilities = [\"pull\", \"resolve\"]\n[host.\"http://%[1]s\".header]\nX-Key = \"%[2]s-header\"\n", w.registry.Host(), secret)
	require.NoError(w, os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o600))
}

// gate is a registry that wants a token of the daemon for everything and redirects it to a storage with signed addresses.
type gate struct {
	storageHost, location  string // of redirects; none is the storage's, signed
	storage, refuse, token int    // codes to answer; 0 is as it should be

	asked *atomic.Int64
}

func (g *gate) guard(rw http.ResponseWriter, r *http.Request, next http.Handler) {
	if r.Header.Get("X-Key") == "" && r.URL.Path != "/token" {
		next.ServeHTTP(rw, r) // it is not the daemon
		return
	}
	g.asked.Add(1)
	rw.Header().Set("Set-Cookie", "session="+secret+"-cookie")
	switch {
	case r.URL.Path == "/token" && g.token < 0:
		fmt.Fprintf(rw, `{"token": %q "broken"`, secret)
	case r.URL.Path == "/token" && g.token > 0:
		rw.WriteHeader(g.token)
		fmt.Fprintf(rw, `{"errors": [{"code": "DENIED", "message": "someone:%s-password is wrong"}]}`, secret)
	case r.URL.Path == "/token":
		fmt.Fprintf(rw, `{"token": "%[1]s-token", "access_token": "%[1]s-token", "expires_in": 300}`, secret)
	case r.Header.Get("Authorization") != "Bearer "+secret+"-token":
		answer(401, "WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, r.Host))(rw, r, next)
	case g.refuse != 0:
		answer(g.refuse, "WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, r.Host))(rw, r, next)
	case r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/"):
		location := g.location
		if location == "" {
			location = fmt.Sprintf("http://%s%s?X-Amz-Signature=%s", g.storageHost, r.URL.Path, secret)
		}
		rw.Header().Set("Location", location)
		rw.WriteHeader(http.StatusTemporaryRedirect)
	default:
		next.ServeHTTP(rw, r)
	}
}
