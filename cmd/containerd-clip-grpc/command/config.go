package command

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/log"
	"github.com/docker/go-units"
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/plugin/bucket"
	"github.com/beam-cloud/containerd-clip/snapshotter/cache"
	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// defaultConfigPath is read if it exists and --config is not given.
const defaultConfigPath = "/etc/containerd-clip-grpc/config.toml"

// config is the daemon's configuration file.
type config struct {
	// Root is the directory of all state.
	Root string `toml:"root" comment:"directory of all state; on a real disk, not on overlayfs or tmpfs"`
	// Address is the daemon's own socket.
	Address string `toml:"address" comment:"socket that containerd's proxy plugin connects to"`
	// LogLevel is one of trace, debug, info, warn, error.
	LogLevel string `toml:"log_level" comment:"trace, debug, info, warn or error"`
	// LogFormat is a log.OutputFormat.
	LogFormat string         `toml:"log_format" comment:"text or json"`
	Discover  discoverConfig `toml:"discover" comment:"where archives are looked for, besides <root>/archives/*.clip"`
	Registry  registryConfig `toml:"registry" comment:"how registries are reached"`
	Mount     mountConfig    `toml:"mount" comment:"how the roots of lazy images are mounted"`
	Cache     cacheConfig    `toml:"cache" comment:"what was fetched, on disk"`
	Fill      fillConfig     `toml:"fill" comment:"fetching in the background what nobody has read yet; readers come first"`
	CRI       criConfig      `toml:"cri" comment:"the image service of Kubernetes' runtime interface, which the daemon passes on to containerd"`
	Watch     watchConfig    `toml:"watch" comment:"images that are indexed as they come into containerd"`
	Metrics   metricsConfig  `toml:"metrics" comment:"figures for Prometheus"`
	Debug     debugConfig    `toml:"debug" comment:"profiles of the daemon itself"`
}

// metricsConfig says where metrics are served.
type metricsConfig struct {
	Address string `toml:"address" comment:"where /metrics is served: 127.0.0.1:9254, or unix:///run/...; nowhere if it is empty"`
}

// debugConfig says where pprof is served.
type debugConfig struct {
	Address string `toml:"address" comment:"socket on which /debug/pprof is served: unix:///run/...; nowhere if it is empty"`
}

// discoverConfig says where archives are looked for.
type discoverConfig struct {
	Referrers bool     `toml:"referrers" comment:"ask the image's registry for archives that refer to it"`
	Sources   []string `toml:"sources" comment:"buckets and directories with archives: s3://bucket/{{.Path}}/{{.Manifest}}.clip?region=..., gs://, azblob://, file:///; see docs/operating.md"`
}

// registryConfig says how registries are reached.
type registryConfig struct {
	ConfigPath []string `toml:"config_path" comment:"directories with containerd's <host>/hosts.toml files"`
	// GiveUp is how long a read tries to get an answer.
	GiveUp duration `toml:"give_up" comment:"how long a read goes on when nothing arrives before it is an input/output error; at most 60s"`
}

// criConfig says where the kubelet's calls go.
type criConfig struct {
	Containerd string `toml:"containerd" comment:"containerd's socket; empty serves no image service"`
}

// duration is written as Go writes durations: "1m30s".
type duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	*d = duration(parsed)
	return err
}

// MarshalText implements encoding.TextMarshaler.
func (d duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// mountConfig says how the roots of lazy images are mounted.
type mountConfig struct {
	// Mode is a root.Mode.
	Mode string `toml:"mode" comment:"file and loop: EROFS on files (Linux 6.12) or on loop devices (6.4); fuse: no EROFS; auto: the first of them that works"`
}

// cacheConfig says how much of what was fetched is kept.
type cacheConfig struct {
	MaxSize cache.Limit `toml:"max_size" comment:"most disk that fetched layers take: 50GiB, or a share of what is free at start (what they take already counts as free)"`
}

// fillConfig says what is fetched in the background.
type fillConfig struct {
	Mode     string   `toml:"mode" comment:"on completes the layers of lazy images; off does not"`
	Prefetch bool     `toml:"prefetch" comment:"fetch what the archive says that a start reads, right after the pull, or else what every start does, with the first container; and what programs load: libraries, Python modules; also with mode off"`
	Delay    duration `toml:"delay" comment:"how long after the pull completing begins at the earliest; it is put off by up to as much again, at random"`
	Rate     byteSize `toml:"rate" comment:"most compressed bytes per second, such as 50MiB; 0 is as fast as the network"`
	Workers  int      `toml:"workers" comment:"ranges that are fetched at the same time, 1 to 64"`
}

// byteSize is a number of bytes that is text in TOML: "50MiB".
type byteSize int64

func (b byteSize) MarshalText() ([]byte, error) { return strconv.AppendInt(nil, int64(b), 10), nil }

func (b *byteSize) UnmarshalText(text []byte) error {
	v, err := units.RAMInBytes(string(text))
	*b = byteSize(v)
	return err
}

// options returns what the snapshotter is to be told.
func (c fillConfig) options() fill.Options {
	return fill.Options{ListsOnly: c.Mode == fillOff, Workers: c.Workers, Delay: time.Duration(c.Delay), Rate: int64(c.Rate)}
}

// Values of fill.mode.
const (
	fillOn  = "on"
	fillOff = "off"
)

// defaultConfig returns the configuration that holds where a file says nothing.
func defaultConfig() config {
	return config{
		Root:     "/var/lib/containerd-clip-grpc",
		Address:  "/run/containerd-clip-grpc/containerd-clip-grpc.sock",
		LogLevel: "info", LogFormat: string(log.TextFormat),
		Discover: discoverConfig{Referrers: true, Sources: []string{}},
		Registry: registryConfig{ConfigPath: []string{"/etc/containerd/certs.d", "/etc/docker/certs.d"}, GiveUp: duration(55 * time.Second)},
		Mount:    mountConfig{Mode: string(root.Auto)},
		Cache:    cacheConfig{MaxSize: cache.Limit{Percent: cache.DefaultPercent}},
		Fill:     fillConfig{Mode: fillOn, Prefetch: true, Delay: duration(30 * time.Second), Workers: 4},
		CRI:      criConfig{Containerd: "/run/containerd/containerd.sock"},
		Watch:    defaultWatchConfig(),
	}
}

// loadConfig reads the file at path over the defaults. A key that the daemon
// does not know is an error.
func loadConfig(path string) (config, error) {
	c := defaultConfig()
	f, err := os.Open(path)
	if err != nil {
		return c, err
	}
	defer f.Close()
	err = toml.NewDecoder(f).DisallowUnknownFields().Decode(&c)
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		return c, fmt.Errorf("%s has keys that do not exist:\n%s", path, strict.String())
	}
	var wrong *toml.DecodeError
	if errors.As(err, &wrong) {
		return c, fmt.Errorf("%s is wrong:\n%s\n%w", path, wrong.String(), err)
	}
	if err != nil {
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// validate checks what cannot be checked key by key.
func (c config) validate() error {
	if !filepath.IsAbs(c.Root) {
		return fmt.Errorf("root %q must be an absolute path", c.Root)
	}
	if !filepath.IsAbs(c.Address) {
		return fmt.Errorf("address %q must be an absolute path", c.Address)
	}
	// The cache gives up after a minute, whatever is said here.
	if d := time.Duration(c.Registry.GiveUp); d <= 0 || d > time.Minute {
		return fmt.Errorf("registry.give_up %q must be between 0s and 60s", d)
	}
	// sockaddr_un.sun_path, see unix(7).
	if len(c.Address) > 107 {
		return fmt.Errorf("address %q is longer than the 107 bytes a socket path may have", c.Address)
	}
	if _, err := root.ParseMode(c.Mount.Mode); err != nil {
		return err
	}
	if c.CRI.Containerd != "" && !filepath.IsAbs(c.CRI.Containerd) {
		return fmt.Errorf("cri.containerd %q must be an absolute path or empty", c.CRI.Containerd)
	}
	if err := c.validateObserved(); err != nil {
		return err
	}
	if err := c.Fill.validate(); err != nil {
		return err
	}
	if _, err := c.Discover.locations(); err != nil {
		return fmt.Errorf("discover.sources: %w", err)
	}
	return c.validateWatch()
}

// locations are the sources.
func (c discoverConfig) locations() (found []*bucket.Location, err error) {
	for _, text := range c.Sources {
		l, err := bucket.Parse(text)
		if err != nil {
			return nil, err
		}
		found = append(found, l)
	}
	return found, nil
}

func (c fillConfig) validate() error {
	if c.Mode != fillOn && c.Mode != fillOff {
		return fmt.Errorf("fill.mode %q must be %q or %q", c.Mode, fillOn, fillOff)
	}
	if c.Delay < 0 || c.Rate < 0 {
		return errors.New("fill.delay and fill.rate must not be negative")
	}
	if c.Workers < 1 || c.Workers > 64 {
		return fmt.Errorf("fill.workers is %d and must be from 1 to 64", c.Workers)
	}
	return nil
}

func newConfigCommand() *cobra.Command {
	config := &cobra.Command{Use: "config", Short: "Show the configuration", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	config.AddCommand(&cobra.Command{
		Use:     "default",
		Short:   "Print the default configuration, every key with its meaning",
		Example: `  containerd-clip-grpc config default >/etc/containerd-clip-grpc/config.toml`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return writeConfig(cmd.OutOrStdout(), defaultConfig())
		},
	})
	return config
}

func writeConfig(w io.Writer, c config) error {
	text, err := toml.Marshal(c)
	if err != nil {
		return err
	}
	_, err = w.Write(text)
	return err
}
