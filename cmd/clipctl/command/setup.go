package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	containerdclip "github.com/beam-cloud/containerd-clip"
)

// What config.toml.example says, for those who have it elsewhere.
const (
	defaultClipRoot    = "/var/lib/containerd-clip-grpc"
	defaultClipAddress = "/run/containerd-clip-grpc/containerd-clip-grpc.sock"
	// setupMark ends lines that setup put into a file of somebody else.
	setupMark = " # clipctl setup"
)

// podsConfig makes clip the snapshotter of pods.
const podsConfig = `
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "clip"
`

type setupOptions struct {
	config, root, address   string
	addImport, pods, remove bool
}

func newSetupCommand(g *globals) *cobra.Command {
	var o setupOptions
	cmd := &cobra.Command{
		Use:   "setup",
		Short: "Tell containerd about the snapshotter, or take that back",
		Long: `Tell containerd about the snapshotter: writes conf.d/50-clip.toml beside containerd's configuration and makes
sure that this imports it. With --remove it takes back what it did. containerd reads either when it is restarted.`,
		Example: `  clipctl setup
  clipctl setup --add-import --pods
  clipctl setup --remove`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.address = g.clipAddress
			if o.remove {
				return o.runRemove(cmd.OutOrStdout())
			}
			return o.run(cmd.Context(), cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.config, "containerd-config", "/etc/containerd/config.toml", "containerd's configuration file")
	f.StringVar(&o.root, "clip-root", defaultClipRoot, "the snapshotter daemon's directory of state")
	f.BoolVar(&o.addImport, "add-import", false, "add the imports line to containerd's configuration if it has none")
	f.BoolVar(&o.pods, "pods", false, "make clip the snapshotter of Kubernetes' pods, too")
	f.BoolVar(&o.remove, "remove", false, "take back what setup did")
	return cmd
}

// dropIn is the file that is setup's own.
func (o setupOptions) dropIn() string {
	return filepath.Join(filepath.Dir(o.config), "conf.d", "50-clip.toml")
}

// run writes the registration. What containerd does not accept is taken back.
func (o setupOptions) run(ctx context.Context, stdout io.Writer) (err error) {
	before, err := snapshotFiles(o.dropIn(), o.config)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && !errors.Is(err, errNoImport) {
			err = errors.Join(err, before.restore())
		}
	}()
	text := strings.NewReplacer(defaultClipAddress, o.address, defaultClipRoot, o.root).Replace(containerdclip.ContainerdConfig)
	if o.pods {
		text += podsConfig
	}
	if err := os.MkdirAll(filepath.Dir(o.dropIn()), 0o755); err != nil {
		return err
	}
	if err := replaceFile(o.dropIn(), []byte(text)); err != nil {
		return err
	}
	if err := o.importDropIn(before[o.config]); err != nil {
		return err
	}
	if err := o.askContainerd(ctx); err != nil {
		return err
	}
	if before.same() {
		fmt.Fprintf(stdout, "%s is as it should be\n", o.dropIn())
		return nil
	}
	fmt.Fprintf(stdout, "wrote %s: restart containerd\n", o.dropIn())
	return nil
}

// errNoImport says that the administrator has to do something.
var errNoImport = fmt.Errorf("containerd does not read it: %w", errdefs.ErrFailedPrecondition)

// importDropIn makes sure that the configuration whose content is main, nil if
// there is none, imports the drop-in.
func (o setupOptions) importDropIn(main []byte) error {
	var c struct {
		Imports []string `toml:"imports"`
	}
	if err := toml.Unmarshal(main, &c); err != nil {
		return fmt.Errorf("%s: %w", o.config, err)
	}
	for _, pattern := range c.Imports {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(o.config), pattern)
		}
		if ok, err := filepath.Match(filepath.Clean(pattern), o.dropIn()); ok && err == nil {
			return nil
		}
	}
	all := filepath.Join(filepath.Dir(o.dropIn()), "*.toml")
	line := fmt.Sprintf("imports = [%q]", all)
	switch {
	case c.Imports != nil:
		return fmt.Errorf("add %q to the imports in %s, and restart containerd: %w", all, o.config, errNoImport)
	case !o.addImport:
		return fmt.Errorf("put the line\n  %s\nat the top of %s (or use --add-import), and restart containerd: %w", line, o.config, errNoImport)
	case main == nil:
		line = "version = 3" + setupMark + "\n" + line
	}
	return replaceFile(o.config, append([]byte(line+setupMark+"\n"), main...))
}

// askContainerd has containerd read the configuration, if it is installed here.
func (o setupOptions) askContainerd(ctx context.Context) error {
	program, err := exec.LookPath("containerd")
	if err != nil {
		return nil
	}
	cmd := exec.CommandContext(ctx, program, "--config", o.config, "config", "dump")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("containerd does not accept the configuration: %w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	if !bytes.Contains(out, []byte("[proxy_plugins.clip]")) {
		return fmt.Errorf("containerd's configuration is without the snapshotter: %w", errdefs.ErrDataLoss)
	}
	return nil
}

// runRemove takes back what run did.
func (o setupOptions) runRemove(stdout io.Writer) error {
	if err := os.Remove(o.dropIn()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	main, err := os.ReadFile(o.config)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var kept []byte
	for line := range bytes.Lines(main) {
		if !bytes.HasSuffix(bytes.TrimSpace(line), []byte(strings.TrimSpace(setupMark))) {
			kept = append(kept, line...)
		}
	}
	switch {
	case len(kept) == len(main):
	case len(kept) == 0:
		err = os.Remove(o.config) // it was made by setup
	default:
		err = replaceFile(o.config, kept)
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintln(stdout, "removed the snapshotter from containerd's configuration: restart containerd")
		return nil
	}
	return err
}

// files are the contents of files, nil for one that was not there.
type files map[string][]byte

func snapshotFiles(paths ...string) (files, error) {
	found := files{}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		found[path] = b
	}
	return found, nil
}

// same says whether the files are as they were.
func (f files) same() bool {
	for path, b := range f {
		now, err := os.ReadFile(path)
		if err == nil && !bytes.Equal(now, b) || err != nil && b != nil {
			return false
		}
	}
	return true
}

func (f files) restore() error {
	var errs []error
	for path, b := range f {
		if b != nil {
			errs = append(errs, replaceFile(path, b))
		} else if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// replaceFile replaces a file in one step. It keeps the mode of the old one.
func replaceFile(path string, b []byte) (err error) {
	mode := fs.FileMode(0o644)
	if st, err := os.Stat(path); err == nil {
		mode = st.Mode().Perm()
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".clipctl-")
	if err != nil {
		return err
	}
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return nil
}
