// Package command is the command line of the daemon.
package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/sys"
	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/beam-cloud/containerd-clip/snapshotter"
	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/cri"
	"github.com/beam-cloud/containerd-clip/snapshotter/keeper"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

// flags override what the configuration file says.
type flags struct {
	config, root, address, logLevel string
}

// New returns the daemon's root command, which serves.
func New() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "containerd-clip-grpc",
		Short: "containerd snapshotter that leaves image layers in the registry and fetches what is read",
		Example: `  containerd-clip-grpc
  containerd-clip-grpc --root /srv/clip --log-level debug`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		// It is not a command for shells.
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.load()
			if err != nil {
				return err
			}
			return serve(cmd.Context(), c)
		},
	}
	cmd.PersistentFlags().StringVar(&f.config, "config", "", "configuration file (default "+defaultConfigPath+" if it exists)")
	cmd.PersistentFlags().StringVar(&f.root, "root", "", "directory of all state")
	cmd.PersistentFlags().StringVar(&f.address, "address", "", "socket to listen on")
	cmd.PersistentFlags().StringVar(&f.logLevel, "log-level", "", "trace, debug, info, warn or error")
	cmd.AddCommand(newConfigCommand(), newWatchCommand(&f))
	cmd.AddCommand(innerCommands()...)
	return cmd
}

// How the daemon starts its keeper, and what mounts for it.
const (
	keeperCommand = "keeper"
	helperCommand = "mount-helper"
)

// innerCommands are those that the daemon alone uses.
func innerCommands() []*cobra.Command {
	return []*cobra.Command{{
		Use:    keeperCommand,
		Short:  "Hold connections to the kernel for the daemon, which starts this by itself",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE:   func(*cobra.Command, []string) error { return keeper.Main() },
	}, {
		Use:    helperCommand,
		Short:  "Mount a root for the daemon, which starts this by itself",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return root.HelperMain(cmd.Context(), cmd.InOrStdin(), os.Stdout)
		},
	}}
}

// load reads the configuration and applies the flags.
func (f flags) load() (config, error) {
	c := defaultConfig()
	path := f.config
	if path == "" {
		if _, err := os.Stat(defaultConfigPath); err == nil {
			path = defaultConfigPath
		}
	}
	if path != "" {
		var err error
		if c, err = loadConfig(path); err != nil {
			return c, err
		}
	}
	for _, o := range []struct {
		value string
		to    *string
	}{{f.root, &c.Root}, {f.address, &c.Address}, {f.logLevel, &c.LogLevel}} {
		if o.value != "" {
			*o.to = o.value
		}
	}
	return c, c.validate()
}

// serve runs the daemon until ctx ends.
func serve(ctx context.Context, c config) (err error) {
	if err := c.setLog(); err != nil {
		return err
	}
	untraced, err := startTracing(ctx)
	if err != nil {
		return err
	}
	defer untraced()
	unlock, err := lockRoot(c.Root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	program, err := os.Executable()
	if err != nil {
		return err
	}
	kept, err := keeper.Open(ctx, c.Root, program, keeperCommand)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, kept.Close()) }()
	options := c.options()
	keys := openKeychain(ctx, c.Address)
	options.Registry.Logins = keys.Logins
	locations, err := c.Discover.locations()
	if err != nil {
		return err
	}
	for _, l := range locations {
		defer l.Close() // it was only read from
		options.Sources = append(options.Sources, l)
	}
	options.Keeper, options.Helper = kept, root.Helper{program, helperCommand}
	// The registries of an image must not be able to make containers wait for
	// the daemon's end: requests are cut off, not drained.
	sn, err := snapshotter.New(context.WithoutCancel(ctx), options)
	if err != nil {
		return fmt.Errorf("opening the snapshotter in %s: %w", c.Root, err)
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	unobserved, err := c.observe(ctx, c.gatherers(sn.Collectors()))
	if err != nil {
		return err
	}
	defer unobserved()
	l, err := listen(c.Address)
	if err != nil {
		return err
	}
	server, release, err := c.newServer(sn, keys)
	if err != nil {
		return err
	}
	defer release()
	stopped := context.AfterFunc(ctx, server.Stop)
	defer stopped()
	if len(c.Watch.Rules) > 0 {
		watching, stop := context.WithCancel(ctx)
		ended, err := keepWatch(watching, c)
		defer stop()
		if err != nil {
			return err
		}
		defer func() { stop(); <-ended }()
	}
	log.G(ctx).WithField("address", c.Address).WithField("root", c.Root).Info("containerd-clip-grpc is ready")
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.G(ctx).WithError(err).Warn("cannot tell systemd that the daemon is ready")
	}
	if err := feedWatchdog(ctx, sn.InFlight); err != nil {
		log.G(ctx).WithError(err).Warn("systemd's watchdog will end the daemon: what it says cannot be read")
	}
	if err := server.Serve(l); err != nil && ctx.Err() == nil {
		return err
	}
	log.G(ctx).Info("containerd-clip-grpc ends")
	return nil
}

// newServer returns the server of all that the daemon serves. release is called
// when it has ended.
func (c config) newServer(sn *snapshotter.Snapshotter, keys *cri.Keychain) (server *grpc.Server, release func(), err error) {
	options := []grpc.ServerOption{
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
		grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
	}
	if tracing() {
		options = append(options, grpc.StatsHandler(otelgrpc.NewServerHandler()))
	}
	release = func() {}
	if c.CRI.Containerd != "" {
		proxy, err := cri.New(c.CRI.Containerd, keys)
		if err != nil {
			return nil, nil, err
		}
		release = func() { proxy.Close() } // nothing is under way any more
		options = append(options, grpc.UnknownServiceHandler(proxy.Handle))
	}
	server = grpc.NewServer(options...)
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	record.Register(server, sn)
	control.Register(server, sn)
	return server, release, nil
}

// openKeychain opens the keychain of the daemon at address.
func openKeychain(ctx context.Context, address string) *cri.Keychain {
	keys, err := cri.OpenKeychain(cri.KeychainPath(address))
	if err != nil {
		log.G(ctx).WithError(err).Warn("going on without the credentials of earlier pulls")
	}
	return keys
}

// setLog has the log look as c says.
func (c config) setLog() error {
	return errors.Join(log.SetLevel(c.LogLevel), log.SetFormat(log.OutputFormat(c.LogFormat)))
}

// options returns what the snapshotter is to be told.
func (c config) options() snapshotter.Options {
	return snapshotter.Options{
		Root:      c.Root,
		Mount:     root.Mode(c.Mount.Mode),
		Referrers: c.Discover.Referrers,
		Registry:  remote.Options{ConfigPath: c.Registry.ConfigPath, GiveUp: time.Duration(c.Registry.GiveUp)},
		CacheSize: c.Cache.MaxSize,
		Fill:      c.Fill.options(),
		Prefetch:  c.Fill.Prefetch,
	}
}

// lockRoot makes sure that only one daemon works in root.
func lockRoot(root string) (unlock func() error, err error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(root, "lock"), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another daemon works in %s (give each its own --root and --address): %w", root, err)
	}
	return f.Close, nil
}

// listen opens the socket at address for root alone: who may write to it
// decides what is mounted.
func listen(address string) (net.Listener, error) {
	if conn, err := net.Dial("unix", address); err == nil {
		conn.Close()
		return nil, fmt.Errorf("%s is in use by another process", address)
	}
	if err := os.MkdirAll(filepath.Dir(address), 0o700); err != nil {
		return nil, err
	}
	return sys.GetLocalListener(address, os.Geteuid(), os.Getegid())
}
