package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/plugin/watch"
)

// watchConfig says which images are indexed as they come into containerd.
type watchConfig struct {
	Containerd string      `toml:"containerd" comment:"containerd's socket"`
	Namespaces []string    `toml:"namespaces" comment:"containerd's namespaces that are watched"`
	Directory  string      `toml:"directory" comment:"where the actions index and both keep archives; empty is <root>/archives"`
	CacheDir   string      `toml:"cache_dir" comment:"where indexes of layers are kept"`
	Workers    int         `toml:"workers" comment:"layers that are indexed at the same time"`
	Nice       int         `toml:"nice" comment:"niceness of indexing, 0 to 19"`
	Rules      []watchRule `toml:"rules" comment:"[[watch.rules]] tables with names, labels, platforms, action, storage_ref and to: docs/operating.md; without one nothing is watched"`
}

// watchRule is a watch.Rule in the configuration file.
type watchRule struct {
	Names      []string          `toml:"names"`
	Labels     map[string]string `toml:"labels"`
	Platforms  []string          `toml:"platforms"`
	Action     string            `toml:"action"`
	StorageRef string            `toml:"storage_ref"`
	To         string            `toml:"to"`
}

func defaultWatchConfig() watchConfig {
	return watchConfig{
		Containerd: "/run/containerd/containerd.sock",
		Namespaces: []string{"default"},
		CacheDir:   "/var/cache/containerd-clip",
		Workers:    1,
		Nice:       10,
		Rules:      []watchRule{},
	}
}

// watchOptions are those that c describes, without a cache.
func (c config) watchOptions() watch.Options {
	o := watch.Options{
		Address: c.Watch.Containerd, Namespaces: c.Watch.Namespaces,
		Directory: c.Watch.Directory, Index: index.Options{Workers: c.Watch.Workers},
	}
	if o.Directory == "" {
		o.Directory = filepath.Join(c.Root, "archives")
	}
	for _, r := range c.Watch.Rules {
		o.Rules = append(o.Rules, watch.Rule(r))
	}
	return o
}

// validateWatch checks what would else be found out in another process.
func (c config) validateWatch() error {
	w := c.Watch
	if len(w.Rules) == 0 {
		return nil
	}
	if w.Workers < 1 || w.Nice < 0 || w.Nice > 19 {
		return fmt.Errorf("watch: workers must be 1 or more and nice 0 to 19; they are %d and %d", w.Workers, w.Nice)
	}
	if _, err := watch.New(c.watchOptions()); err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	return nil
}

func newWatchCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "watch",
		Short: "Only watch for images to index, without the snapshotter",
		Long: `Index images as they come into containerd, as the rules in the section watch of
the configuration say. The daemon starts this by itself when there are rules; a
machine that only builds images can run it alone.`,
		Example: `  containerd-clip-grpc watch --config /etc/containerd-clip-grpc/config.toml`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.load()
			if err != nil {
				return err
			}
			return runWatch(cmd.Context(), c)
		},
	}
}

func runWatch(ctx context.Context, c config) error {
	if len(c.Watch.Rules) == 0 {
		return errors.New("there are no [[watch.rules]] in the configuration: nothing to watch for")
	}
	if err := c.setLog(); err != nil {
		return err
	}
	if err := beNice(c.Watch.Nice); err != nil {
		log.G(ctx).WithError(err).Warn("cannot be nice")
	}
	cache, err := index.OpenCache(c.Watch.CacheDir, index.DefaultCacheSize)
	if err != nil {
		return err
	}
	o := c.watchOptions()
	o.Index.Cache = cache
	w, err := watch.New(o)
	if err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(w.Collectors()...)
	unobserved, err := c.observe(ctx, registry)
	if err != nil {
		return err
	}
	defer unobserved()
	return w.Run(ctx)
}

// beNice makes all threads of the process so nice: niceness is a thread's. One
// that is just being made has that of its maker and is not found, so it looks again.
func beNice(nice int) error {
	for range 10 {
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		all := true
		for _, thread := range threads {
			id, _ := strconv.Atoi(thread.Name())
			if has, err := unix.Getpriority(unix.PRIO_PROCESS, id); err != nil || has == 20-nice { // getpriority(2) returns what is left of 20
				continue // it ended, or it is
			}
			all = false
			if err := unix.Setpriority(unix.PRIO_PROCESS, id, nice); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
		if all {
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return fmt.Errorf("threads that begin do not become it: %w", errdefs.ErrUnavailable)
}

// restartWatch is how long after its end the watcher is started again.
const restartWatch = 5 * time.Second

// keepWatch runs the watcher as a process of its own until ctx ends, and again
// whenever it ends before: indexing must not be able to take the daemon's
// memory or processors, or to end it. The channel is closed when all is over.
func keepWatch(ctx context.Context, c config) (<-chan struct{}, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	var config bytes.Buffer
	if c.Metrics.Address != "" {
		c.Metrics.Address = unixScheme + c.watcherSocket()
	}
	c.Debug.Address = ""
	if err := writeConfig(&config, c); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // Pdeathsig is about the thread that starts the process
		defer runtime.UnlockOSThread()
		for ctx.Err() == nil {
			err := watchProcess(ctx, program, config.Bytes())
			if ctx.Err() != nil {
				return
			}
			log.G(ctx).WithError(err).Error("the process that watches for images ended; it is started again")
			select {
			case <-ctx.Done():
			case <-time.After(restartWatch):
			}
		}
	}()
	return done, nil
}

func watchProcess(ctx context.Context, program string, config []byte) error {
	cmd := exec.CommandContext(ctx, program, "watch", "--config", "/dev/stdin")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(config), os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGTERM}
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := expose(cmd.Process.Pid); err != nil {
		log.G(ctx).WithError(err).Warn("the kernel may end containers for want of memory before it ends indexing")
	}
	return cmd.Wait()
}

// expendable is how much sooner than a container the kernel ends indexing for
// want of memory: half of what there is counts for it.
const expendable = 500

// expose has the kernel end a process for want of memory before containers. It
// would be protected as the daemon is, which started it.
func expose(pid int) error {
	file := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if score, err := strconv.Atoi(strings.TrimSpace(string(text))); err != nil || score >= expendable {
		return err
	}
	return os.WriteFile(file, []byte(strconv.Itoa(expendable)), 0)
}
