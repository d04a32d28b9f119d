package command

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
)

// TestMain is what the daemon starts its own program as.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && (os.Args[1] == keeperCommand || os.Args[1] == helperCommand) {
		if err := New().Execute(); err != nil {
			panic(err)
		}
		return
	}
	if len(os.Args) == 2 && os.Args[1] == niceCommand {
		if err := beNice(7); err != nil {
			panic(err)
		}
		return
	}
	os.Exit(m.Run())
}

const niceCommand = "be-nice"

// TestNice has a process be nice, and who started it stay as it is.
func TestNice(t *testing.T) {
	before, err := unix.Getpriority(unix.PRIO_PROCESS, os.Getpid())
	require.NoError(t, err)
	out, err := exec.Command(os.Args[0], niceCommand).CombinedOutput()
	require.NoError(t, err, string(out))
	after, err := unix.Getpriority(unix.PRIO_PROCESS, os.Getpid())
	require.NoError(t, err)
	require.Equal(t, before, after)
}

func writeFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
	return path
}

func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := New()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func TestDefaultConfigRoundTrip(t *testing.T) {
	out, err := run(t, "config", "default")
	require.NoError(t, err)
	for _, key := range []string{"root", "address", "log_level", "log_format", "referrers", "sources", "config_path", "give_up", "mode", "prefetch", "max_size", "delay", "rate", "workers"} {
		require.Contains(t, out, key+" = ")
	}
	got, err := loadConfig(writeFile(t, out))
	require.NoError(t, err)
	require.Equal(t, defaultConfig(), got)
	require.NoError(t, got.validate())
}

func TestLoadConfig(t *testing.T) {
	got, err := loadConfig(writeFile(t, "root = \"/r\"\n[discover]\nreferrers = false\n"))
	require.NoError(t, err)
	want := defaultConfig()
	want.Root, want.Discover.Referrers = "/r", false
	require.Equal(t, want, got, "what the file does not say stays")

	for content, message := range map[string]string{
		"rot = \"/r\"":              "rot",
		"[discover]\nreferers = 1":  "referers",
		"[registry]\nmirrors = []":  "mirrors",
		"root = 1":                  "config.Root",
		"root = ":                   "config.toml",
		"[registry]\nconfig_path=1": "config_path",
		"[cache]\nmax_size='0'":     "20GiB",
		"[cache]\nmax_size='0%'":    "100%",
		"[cache]\nmax_size='101%'":  "100%",
		"[cache]\nmax_size='much'":  "much",
		"[fill]\ndelay='soon'":      "soon",
		"[fill]\nrate='quick'":      "quick",
		"[registry]\ngive_up='1'":   "missing unit",
	} {
		path := writeFile(t, content)
		_, err := loadConfig(path)
		require.ErrorContains(t, err, message, content)
		require.ErrorContains(t, err, path)
	}
	_, err = loadConfig("/nowhere.toml")
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestFlagsOverride(t *testing.T) {
	path := writeFile(t, "root = \"/file\"\naddress = \"/file.sock\"\nlog_level = \"warn\"\n")
	c, err := flags{config: path}.load()
	require.NoError(t, err)
	require.Equal(t, []string{"/file", "/file.sock", "warn"}, []string{c.Root, c.Address, c.LogLevel})
	c, err = flags{config: path, root: "/flag", address: "/flag.sock", logLevel: "debug"}.load()
	require.NoError(t, err)
	require.Equal(t, []string{"/flag", "/flag.sock", "debug"}, []string{c.Root, c.Address, c.LogLevel})
	_, err = flags{config: path, root: "relative"}.load()
	require.ErrorContains(t, err, `root "relative"`)
	_, err = flags{config: "/nowhere.toml"}.load()
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestValidate(t *testing.T) {
	long := "/" + strings.Repeat("s", 106)
	for name, c := range map[string]struct {
		edit    func(*config)
		message string
	}{
		"default":          {func(*config) {}, ""},
		"longest socket":   {func(c *config) { c.Address = long }, ""},
		"too long socket":  {func(c *config) { c.Address = long + "s" }, "107"},
		"relative root":    {func(c *config) { c.Root = "var/lib" }, "root"},
		"empty root":       {func(c *config) { c.Root = "" }, "root"},
		"unknown mode":     {func(c *config) { c.Mount.Mode = "erofs" }, "mount mode \"erofs\""},
		"relative address": {func(c *config) { c.Address = "clip.sock" }, "address"},
		"relative CRI":     {func(c *config) { c.CRI.Containerd = "containerd.sock" }, "cri.containerd"},
		"no CRI":           {func(c *config) { c.CRI.Containerd = "" }, ""},
		"metrics":          {func(c *config) { c.Metrics.Address = "127.0.0.1:9254" }, ""},
		"metrics socket":   {func(c *config) { c.Metrics.Address = "unix:///run/m" }, ""},
		"public metrics":   {func(c *config) { c.Metrics.Address = "0.0.0.0:9254" }, "metrics.address"},
		"all addresses":    {func(c *config) { c.Metrics.Address = ":9254" }, "metrics.address"},
		"a host's name":    {func(c *config) { c.Metrics.Address = "localhost:9254" }, "metrics.address"},
		"public profiles":  {func(c *config) { c.Debug.Address = "127.0.0.1:9255" }, "debug.address"},
		"log format":       {func(c *config) { c.LogFormat = "xml" }, "log_format"},
		"sources":          {func(c *config) { c.Discover.Sources = []string{"s3://b/{{.Path}}/{{.Manifest}}.clip", "file:///a"} }, ""},
		"bad source":       {func(c *config) { c.Discover.Sources = []string{"ftp://host/a"} }, "ftp"},
		"bad template":     {func(c *config) { c.Discover.Sources = []string{"s3://b/{{.Size}}.clip"} }, "Size"},
		"fill off":         {func(c *config) { c.Fill.Mode = "off" }, ""},
		"fill mode":        {func(c *config) { c.Fill.Mode = "maybe" }, "maybe"},
		"fill delay":       {func(c *config) { c.Fill.Delay = -1 }, "negative"},
		"fill workers":     {func(c *config) { c.Fill.Workers = 65 }, "65"},
		"never give up":    {func(c *config) { c.Registry.GiveUp = 0 }, "give_up"},
		"hang":             {func(c *config) { c.Registry.GiveUp = duration(time.Hour) }, "give_up"},
	} {
		conf := defaultConfig()
		c.edit(&conf)
		err := conf.validate()
		if c.message == "" {
			require.NoError(t, err, name)
			continue
		}
		require.ErrorContains(t, err, c.message, name)
	}
}

// testConfig has everything in a directory of the test.
func testConfig(t *testing.T) config {
	t.Helper()
	dir := t.TempDir()
	c := defaultConfig()
	c.Root, c.Address, c.LogLevel, c.Registry.ConfigPath = filepath.Join(dir, "root"), filepath.Join(dir, "run", "s"), "error", nil
	return c
}

// start serves in the background until stop is called.
func start(t *testing.T, c config) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	ended := make(chan error, 1)
	go func() { ended <- serve(ctx, c) }()
	require.Eventually(t, func() bool {
		conn, err := net.Dial("unix", c.Address)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}, time.Minute, 20*time.Millisecond)
	return func() error { cancel(); return <-ended }
}

func TestServe(t *testing.T) {
	c := testConfig(t)
	stop := start(t, c)
	st, err := os.Stat(c.Address)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o660), st.Mode().Perm()&^0o007)
	require.Zero(t, st.Mode().Perm()&0o007, "others may not write to it")

	other := c
	other.Address += "2"
	err = serve(t.Context(), other)
	require.ErrorIs(t, err, unix.EWOULDBLOCK)
	require.ErrorContains(t, err, "another daemon works in "+c.Root)

	other = c
	other.Root += "2"
	require.ErrorContains(t, serve(t.Context(), other), c.Address+" is in use")
	require.NoError(t, stop())

	require.NoError(t, start(t, c)(), "the root is free again, and a socket that was left does no harm")
}

func TestServeRefuses(t *testing.T) {
	c := testConfig(t)
	c.LogLevel = "loud"
	require.ErrorContains(t, serve(t.Context(), c), "loud")
	c = testConfig(t)
	require.NoError(t, os.WriteFile(c.Root, nil, 0o600))
	require.Error(t, serve(t.Context(), c))
}

func TestUnknownArguments(t *testing.T) {
	_, err := run(t, "surprise")
	require.ErrorContains(t, err, "surprise")
	_, err = run(t, "--surprise")
	require.ErrorContains(t, err, "surprise")
}

func TestWatchConfig(t *testing.T) {
	text := "[watch]\nnamespaces = ['default', 'k8s.io']\n[[watch.rules]]\nnames = ['a/*']\naction = 'both'\nlabels = {x = 'y'}\nplatforms = ['all']\nstorage_ref = 'r.example.com/{{.Path}}:{{.Tag}}'\nto = 's3://b/{{.Manifest}}.clip?region=r'\n"
	c, err := loadConfig(writeFile(t, text))
	require.NoError(t, err)
	require.NoError(t, c.validate())
	require.Equal(t, []watchRule{{
		Names: []string{"a/*"}, Labels: map[string]string{"x": "y"}, Platforms: []string{"all"},
		Action: "both", StorageRef: "r.example.com/{{.Path}}:{{.Tag}}", To: "s3://b/{{.Manifest}}.clip?region=r",
	}}, c.Watch.Rules)
	o := c.watchOptions()
	require.Equal(t, "/var/lib/containerd-clip-grpc/archives", o.Directory)
	require.Equal(t, []string{"default", "k8s.io"}, o.Namespaces)

	// What the daemon tells the process that watches is what it was told.
	var b bytes.Buffer
	require.NoError(t, writeConfig(&b, c))
	again, err := loadConfig(writeFile(t, b.String()))
	require.NoError(t, err)
	require.Equal(t, c, again)

	for broken, message := range map[string]string{
		strings.Replace(text, "both", "all", 1):                         `watch: rule 1: action "all"`,
		strings.Replace(text, "s3://", "ftp://", 1):                     `watch: rule 1: to: location "ftp://b`,
		strings.Replace(text, "'default', 'k8s.io'", "", 1):             "watch: no namespace",
		strings.Replace(text, "[watch]\n", "[watch]\nnice = -1\n", 1):   "nice",
		strings.Replace(text, "[watch]\n", "[watch]\nworkers = 0\n", 1): "workers",
	} {
		c, err := loadConfig(writeFile(t, broken))
		require.NoError(t, err)
		require.ErrorContains(t, c.validate(), message)
	}
	_, err = run(t, "watch", "--config", writeFile(t, "[watch]\nnamespaces = ['default']\n"))
	require.ErrorContains(t, err, "[[watch.rules]]")
}

// TestRulesAreDocumented has the rules in operating.md be rules, with every key that there is. The comment in the printed
// configuration names them, too.
func TestRulesAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../../docs/operating.md")
	require.NoError(t, err)
	_, text, ok := strings.Cut(string(doc), "    [watch]\n")
	require.True(t, ok)
	text, _, ok = strings.Cut(text, "\n\n`")
	require.True(t, ok)
	c, err := loadConfig(writeFile(t, "[watch]\n"+text))
	require.NoError(t, err)
	require.NoError(t, c.validate())
	require.Greater(t, len(c.Watch.Rules), 1)
	var printed bytes.Buffer
	require.NoError(t, writeConfig(&printed, defaultConfig()))
	_, comment, ok := strings.Cut(printed.String(), "[[watch.rules]]")
	require.True(t, ok)
	for key := range reflect.TypeFor[watchRule]().Fields() {
		name := key.Tag.Get("toml")
		require.Regexp(t, `(?m)^ *`+name+` = `, text)
		require.Regexp(t, `\b`+name+`\b`, strings.Split(comment, "\n")[0])
	}
}

func TestCacheAndFillKeys(t *testing.T) {
	c, err := loadConfig(writeFile(t, "[cache]\nmax_size = '20GiB'\n[fill]\ndelay = '2m'\nrate = '1MiB'\nworkers = 2\n"))
	require.NoError(t, err)
	size, err := c.Cache.MaxSize.MarshalText()
	require.NoError(t, err)
	require.Equal(t, "21474836480", string(size))
	require.Equal(t, fill.Options{Workers: 2, Delay: 2 * time.Minute, Rate: 1 << 20}, c.Fill.options())
	c.Fill.Mode = "off"
	require.Equal(t, fill.Options{ListsOnly: true, Workers: 2, Delay: 2 * time.Minute, Rate: 1 << 20}, c.Fill.options())
}
