package command

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// DefaultConfigPath is read if it exists and --config is not given.
const DefaultConfigPath = "/etc/containerd-clip-grpc/config.toml"

// Config is the daemon's configuration file.
type Config struct {
	// Root is the directory of all state.
	Root string `toml:"root" comment:"directory of all state; on a real disk, not on overlayfs or tmpfs"`
	// Address is the daemon's own socket.
	Address string `toml:"address" comment:"socket that containerd's proxy plugin connects to"`
	// LogLevel is one of trace, debug, info, warn, error.
	LogLevel string         `toml:"log_level" comment:"trace, debug, info, warn or error"`
	Discover DiscoverConfig `toml:"discover" comment:"where archives are looked for, besides <root>/archives/*.clip"`
	Registry RegistryConfig `toml:"registry" comment:"how registries are reached"`
	Mount    MountConfig    `toml:"mount" comment:"how the roots of lazy images are mounted"`
}

// DiscoverConfig says where archives are looked for.
type DiscoverConfig struct {
	Referrers bool `toml:"referrers" comment:"ask the image's registry for archives that refer to it"`
}

// RegistryConfig says how registries are reached.
type RegistryConfig struct {
	ConfigPath []string `toml:"config_path" comment:"directories with containerd's <host>/hosts.toml files"`
	// GiveUp is how long a read tries to get an answer.
	GiveUp Duration `toml:"give_up" comment:"how long a read goes on when nothing arrives before it is an input/output error; at most 60s"`
}

// Duration is written as Go writes durations: "1m30s".
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	*d = Duration(parsed)
	return err
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// MountConfig says how the roots of lazy images are mounted.
type MountConfig struct {
	// Mode is a root.Mode.
	Mode string `toml:"mode" comment:"file and loop: EROFS on files (Linux 6.12) or on loop devices (6.4); fuse: no EROFS; auto: the first of them that works"`
}

// DefaultConfig returns the configuration that holds where a file says nothing.
func DefaultConfig() Config {
	return Config{
		Root:     "/var/lib/containerd-clip-grpc",
		Address:  "/run/containerd-clip-grpc/containerd-clip-grpc.sock",
		LogLevel: "info",
		Discover: DiscoverConfig{Referrers: true},
		Registry: RegistryConfig{ConfigPath: []string{"/etc/containerd/certs.d", "/etc/docker/certs.d"}, GiveUp: Duration(55 * time.Second)},
		Mount:    MountConfig{Mode: string(root.Auto)},
	}
}

// LoadConfig reads the file at path over the defaults. A key that the daemon
// does not know is an error.
func LoadConfig(path string) (Config, error) {
	c := DefaultConfig()
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

// Validate checks what cannot be checked key by key.
func (c Config) Validate() error {
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
	return nil
}

func newConfigCommand() *cobra.Command {
	config := &cobra.Command{Use: "config", Short: "Show the configuration"}
	config.AddCommand(&cobra.Command{
		Use:   "default",
		Short: "Print the default configuration, every key with its meaning",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return writeConfig(cmd.OutOrStdout(), DefaultConfig())
		},
	})
	return config
}

func writeConfig(w io.Writer, c Config) error {
	var b bytes.Buffer
	if err := toml.NewEncoder(&b).Encode(c); err != nil {
		return err
	}
	_, err := w.Write(b.Bytes())
	return err
}
