package command

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/pelletier/go-toml/v2"

	"github.com/beam-cloud/containerd-clip/snapshotter/control"
)

// containerdConfig is what matters of "containerd config dump".
type containerdConfig struct {
	Imports      []string `toml:"imports"`
	ProxyPlugins map[string]struct {
		Address string `toml:"address"`
	} `toml:"proxy_plugins"`
	Plugins struct {
		Transfer struct {
			Unpack []unpackConfig `toml:"unpack_config"`
		} `toml:"io.containerd.transfer.v1.local"`
		Images struct {
			Snapshotter string `toml:"snapshotter"`
			Local       bool   `toml:"use_local_image_pull"`
			NoLabels    bool   `toml:"disable_snapshot_annotations"`
		} `toml:"io.containerd.cri.v1.images"`
	} `toml:"plugins"`
}

// unpackConfig is what matters of an entry of unpack_config.
type unpackConfig struct {
	Snapshotter string `toml:"snapshotter"`
}

const (
	addExample        = "run clipctl setup, or put config.toml.example into a file that containerd's main configuration imports, and restart containerd"
	restartContainerd = "systemctl restart containerd"
)

// containerd checks how containerd is configured: what it says of itself, and
// what its configuration files say.
func (d *doctor) containerd(ctx context.Context, st *control.Status) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	ctx, client, err := d.globals.connect(ctx)
	if err != nil {
		d.add(failure, "containerd", err.Error(), "start containerd, or name its socket with --address")
		return
	}
	defer client.Close()
	version, err := client.Version(ctx)
	if err != nil {
		d.add(failure, "containerd", fmt.Sprintf("nobody answers at %s: %v", d.globals.address, err), restartContainerd)
		return
	}
	d.version(version.Version)
	config, file, err := dumpConfig(ctx, client)
	if err != nil {
		d.add(unknown, "configuration", fmt.Sprintf("containerd's cannot be read: %v", err), "run clipctl doctor as root, on the machine that containerd runs on")
	}
	registered, err := registration(ctx, client)
	if err != nil {
		d.add(failure, "plugin", fmt.Sprintf("containerd does not list its plugins: %v", err), restartContainerd)
		return
	}
	if len(registered) == 0 {
		d.missingPlugin(config, file)
		return
	}
	d.plugin(registered[0], config, st)
	if config != nil {
		d.transfer(config)
		d.kubernetes(config)
	}
}

// version says whether containerd is new enough.
func (d *doctor) version(v string) {
	major, _, _ := strings.Cut(strings.TrimPrefix(v, "v"), ".")
	if n, _ := strconv.Atoi(major); n < 2 { // 0 if it is none
		d.add(failure, "containerd", "version "+v, "use containerd 2.0 or newer: older ones do not offer layers to snapshotters in their transfer service")
		return
	}
	d.good("containerd", "version %s at %s", v, d.globals.address)
}

// dumpConfig returns the configuration that the running containerd would read
// now, and its main file.
func dumpConfig(ctx context.Context, client *containerd.Client) (*containerdConfig, string, error) {
	server, err := client.IntrospectionService().Server(ctx)
	if err != nil {
		return nil, "", err
	}
	proc := fmt.Sprintf("/proc/%d", server.Pid)
	name, err := os.ReadFile(proc + "/comm")
	if err != nil {
		return nil, "", err
	}
	if !strings.HasPrefix(string(name), "containerd") {
		return nil, "", fmt.Errorf("process %d is %s and not containerd, which runs elsewhere", server.Pid, bytes.TrimSpace(name))
	}
	cmdline, err := os.ReadFile(proc + "/cmdline")
	if err != nil {
		return nil, "", err
	}
	file := configFlag(strings.Split(string(cmdline), "\x00"))
	if _, err := os.Stat(file); err != nil {
		return nil, file, err
	}
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, proc+"/exe", "--config", file, "config", "dump")
	cmd.Stderr = &stderr
	text, err := cmd.Output()
	if err != nil {
		return nil, file, fmt.Errorf("containerd config dump: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	var config containerdConfig
	if err := toml.Unmarshal(text, &config); err != nil {
		return nil, file, fmt.Errorf("containerd config dump: %w", err)
	}
	return &config, file, nil
}

// configFlag returns the configuration file that containerd was started with.
func configFlag(args []string) string {
	for i, arg := range args {
		switch name, value, ok := strings.Cut(strings.TrimLeft(arg, "-"), "="); {
		case arg == "" || arg[0] != '-' || name != "c" && name != "config":
		case ok:
			return value
		case i+1 < len(args):
			return args[i+1]
		}
	}
	return "/etc/containerd/config.toml"
}

// missingPlugin says why containerd does not know the snapshotter.
func (d *doctor) missingPlugin(config *containerdConfig, file string) {
	found := "containerd has no snapshotter " + snapshotterName
	if config == nil {
		d.add(failure, "plugin", found, addExample)
		return
	}
	if _, ok := config.ProxyPlugins[snapshotterName]; ok {
		d.add(failure, "plugin", found+", though its configuration does", restartContainerd)
		return
	}
	d.add(failure, "plugin", found, addExample)
	for _, dropIn := range dropIns(file) {
		if !slices.Contains(config.Imports, dropIn) {
			d.add(failure, "imports", fmt.Sprintf("%s names the snapshotter, and %s does not import it", dropIn, file),
				fmt.Sprintf("add to the top of %s: imports = [%q], and restart containerd", file, filepath.Join(filepath.Dir(dropIn), "*.toml")))
		}
	}
}

// dropIns returns the files in conf.d beside containerd's configuration that
// register the snapshotter.
func dropIns(file string) (found []string) {
	files, _ := filepath.Glob(filepath.Join(filepath.Dir(file), "conf.d", "*.toml")) // the pattern is right
	for _, f := range files {
		var config containerdConfig
		text, err := os.ReadFile(f)
		if err != nil || toml.Unmarshal(text, &config) != nil {
			continue
		}
		if _, ok := config.ProxyPlugins[snapshotterName]; ok {
			found = append(found, f)
		}
	}
	return found
}

// plugin checks what containerd knows of the snapshotter.
func (d *doctor) plugin(p *introspectionapi.Plugin, config *containerdConfig, st *control.Status) {
	before := len(d.findings)
	wrong := func(status, found, remedy string) { d.add(status, "plugin", found, remedy) }
	if p.InitErr != nil {
		wrong(failure, "containerd could not set it up: "+p.InitErr.Message, restartContainerd)
	}
	if config != nil {
		if address := config.ProxyPlugins[snapshotterName].Address; !sameFile(address, d.globals.clipAddress) {
			wrong(failure, fmt.Sprintf("containerd asks %q, and the daemon is at %s", address, d.globals.clipAddress),
				"set address in [proxy_plugins.clip], or the daemon's address, or name the daemon's socket with --clip-address")
		}
	}
	if p.Exports["enable_remote_snapshot_annotations"] != "true" {
		wrong(failure, `exports.enable_remote_snapshot_annotations is not "true": containerd does not say which image it pulls, and none is lazy`,
			`add enable_remote_snapshot_annotations = "true", a string, to [proxy_plugins.clip.exports], and restart containerd`)
	}
	if export := p.Exports["root"]; st != nil && export != st.Daemon.Root {
		wrong(warning, fmt.Sprintf("exports.root is %q, and the daemon's is %s: Kubernetes measures the wrong disk", export, st.Daemon.Root),
			fmt.Sprintf("set root = %q in [proxy_plugins.clip.exports], and restart containerd", st.Daemon.Root))
	}
	if slices.Contains(p.Capabilities, "rebase") {
		wrong(failure, "its capabilities have rebase, which it cannot do: pulls fail", "remove rebase from capabilities in [proxy_plugins.clip], and restart containerd")
	}
	remap := slices.Contains(p.Capabilities, "remap-ids")
	switch {
	case st == nil || st.Daemon.NotLazy != "":
	case remap && st.Daemon.Remap != "":
		wrong(failure, "its capabilities have remap-ids, which this machine cannot do: containers with user namespaces do not start",
			"remove remap-ids from capabilities in [proxy_plugins.clip], and restart containerd")
	case !remap && st.Daemon.Remap == "":
		wrong(warning, "its capabilities lack remap-ids: containerd copies images for containers with user namespaces",
			`add capabilities = ["remap-ids"] to [proxy_plugins.clip], and restart containerd`)
	}
	if len(d.findings) == before {
		d.good("plugin", "containerd has the snapshotter %s, with the right exports", snapshotterName)
	}
}

func sameFile(a, b string) bool {
	a, b = strings.TrimPrefix(a, "unix://"), strings.TrimPrefix(b, "unix://")
	if a == b {
		return true
	}
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// transfer checks that pulls unpack for the snapshotter.
func (d *doctor) transfer(config *containerdConfig) {
	var names []string
	for _, u := range config.Plugins.Transfer.Unpack {
		names = append(names, u.Snapshotter)
	}
	switch {
	case !slices.Contains(names, snapshotterName):
		d.add(failure, "unpack_config", fmt.Sprintf("pulls unpack for %s alone: those with --snapshotter %s fail with \"no unpack platforms defined\"",
			strings.Join(names, ", "), snapshotterName), addExample)
	case names[0] != "overlayfs":
		d.add(warning, "unpack_config", fmt.Sprintf("%s comes first: what pulls without --snapshotter use", names[0]), "put the entry of overlayfs first, unless you meant it")
	default:
		d.good("unpack_config", "pulls unpack for %s", strings.Join(names, ", "))
	}
}

// kubernetes checks how containerd's CRI plugin uses the snapshotter.
func (d *doctor) kubernetes(config *containerdConfig) {
	cri := config.Plugins.Images
	switch {
	case cri.Snapshotter == "" || cri.Snapshotter != snapshotterName:
	case cri.Local && cri.NoLabels:
		d.add(failure, "kubernetes", "use_local_image_pull and disable_snapshot_annotations are true: no image of a pod is lazy",
			"remove use_local_image_pull from [plugins.'io.containerd.cri.v1.images'], and restart containerd")
	default:
		d.good("kubernetes", "pods use the snapshotter %s", snapshotterName)
	}
}
