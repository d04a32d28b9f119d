package command

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/cri"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
)

// stateDir is the daemon's directory.
func (d *doctor) stateDir(st *control.Status) string {
	if st != nil {
		return st.Daemon.Root
	}
	return d.options.root
}

// archives looks into the archives that the daemon finds on this machine, and
// those that it made of CLIP's.
func (d *doctor) archives(st *control.Status) {
	dir := filepath.Join(d.stateDir(st), "archives")
	if _, err := os.ReadDir(dir); errors.Is(err, os.ErrNotExist) {
		return
	} else if err != nil {
		d.add(unknown, "archives", err.Error(), "run clipctl doctor as root")
		return
	}
	kept, keptSize, bad := d.lookInto(dir, "make it again where the image is built (clipctl index IMAGE -o FILE), or remove the file")
	made, madeSize, badMade := d.lookInto(filepath.Join(dir, ".indexed"), "remove the file: the daemon makes it again")
	if bad+badMade == 0 && kept+made > 0 {
		d.good("archives", "%d in %s, %s; %d made from those that CLIP wrote, %s", kept, dir, size(keptSize), made, size(madeSize))
	}
}

// lookInto opens the archives in a directory. It returns how many are usable
// and their size, and how many are not, which are findings.
func (d *doctor) lookInto(dir, remedy string) (n int, bytes int64, bad int) {
	paths, _ := filepath.Glob(filepath.Join(dir, "*.clip")) // the pattern is right
	for _, path := range paths {
		if err := discover.Usable(path); err != nil {
			bad++
			d.add(warning, "archives", fmt.Sprintf("%s is no usable archive: %v", path, err), remedy)
			continue
		}
		n++
		if st, err := os.Stat(path); err == nil {
			bytes += st.Size()
		}
	}
	return n, bytes, bad
}

// imageEndpoint is where a kubelet's configuration names its image service.
var imageEndpoint = regexp.MustCompile(`(?m)^imageServiceEndpoint:\s*["']?(?:unix://)?([^"'\s]+)`)

// logins checks that the daemon is told what the kubelet pulls with, and reads
// what it was told, for the images that are looked at.
func (d *doctor) logins() {
	path := cri.KeychainPath(d.globals.clipAddress)
	keys, err := cri.OpenKeychain(path)
	if errors.Is(err, os.ErrPermission) {
		d.add(unknown, "logins", err.Error(), "run clipctl doctor as root")
		return
	}
	if err != nil {
		d.add(warning, "logins", err.Error(), "remove the file and restart the daemon; images that are pulled from then on are known again")
		return
	}
	d.keys = keys
	known := len(keys.Repositories())
	config, err := os.ReadFile(d.options.kubelet)
	if err != nil {
		if known > 0 {
			d.good("logins", "of %d repositories that the kubelet pulled from", known)
		}
		return
	}
	if m := imageEndpoint.FindSubmatch(config); m == nil || !sameFile(string(m[1]), d.globals.clipAddress) {
		d.add(warning, "logins", fmt.Sprintf("%s does not name the daemon as image service: what pods pull with (imagePullSecrets) is not known to it", d.options.kubelet),
			"set imageServiceEndpoint: unix://"+d.globals.clipAddress+" there and restart the kubelet; see docs/kubernetes.md. Registries that ask nobody, and docker's config, need no such thing")
		return
	}
	d.good("logins", "the kubelet pulls through the daemon, which knows those of %d repositories", known)
}
