package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/discover"
	"github.com/beam-cloud/containerd-clip/snapshotter/fuseconn"
	"github.com/beam-cloud/containerd-clip/snapshotter/layerfs"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
	"github.com/beam-cloud/containerd-clip/snapshotter/root"
)

const (
	restartDaemon = "look into its log (journalctl -u containerd-clip-grpc), then systemctl restart containerd-clip-grpc"
	sameRelease   = "install clipctl and daemon from one release, and restart the daemon"
)

// daemon checks that the daemon answers, and is not stuck. It returns what it
// says, or nil.
func (d *doctor) daemon(ctx context.Context) *control.Status {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	address := d.globals.clipAddress
	conn, err := d.globals.connectDaemon()
	if err != nil {
		d.add(failure, "daemon", err.Error(), "systemctl enable --now containerd-clip-grpc")
		return nil
	}
	defer conn.Close()
	st, err := control.GetStatus(ctx, conn)
	switch {
	case errdefs.IsNotImplemented(err):
		d.add(failure, "daemon", fmt.Sprintf("the daemon at %s is of another version: %v", address, err), sameRelease)
		return nil
	case errdefs.IsPermissionDenied(err), errors.Is(err, os.ErrPermission):
		d.add(failure, "daemon", err.Error(), "run clipctl doctor as root")
		return nil
	case errdefs.IsDataLoss(err):
		d.add(failure, "daemon", err.Error(), "restarting it does not help: stop it and put a copy of metadata.db back; or end all containers of the snapshotter, "+
			"move the daemon's root away, remove the images from containerd and pull them again")
		return nil
	case err != nil:
		d.add(failure, "daemon", fmt.Sprintf("nobody answers at %s: %v", address, err), restartDaemon)
		return nil
	}
	d.good("daemon", "process %d at %s, since %s", st.Daemon.PID, address, st.Daemon.Started.Local().Format(time.DateTime))
	d.reads(st.Daemon)
	if !st.Daemon.Outlived {
		d.add(warning, "restarts", "containers do not outlive the daemon", "use Linux 6.9 or newer; until then restart the daemon only when no lazy container runs")
	} else {
		d.good("restarts", "containers outlive the daemon")
	}
	return &st
}

// reads says whether reads get answers.
func (d *doctor) reads(is control.Daemon) {
	age := time.Duration(is.OldestSeconds * float64(time.Second)).Round(time.Second / 10)
	switch found := fmt.Sprintf("%d reads under way, the oldest for %s", is.InFlight, age); {
	case age > stuckAfter:
		d.add(failure, "reads", found, "no read takes that long: "+restartDaemon+"; containers go on")
	case age > slowAfter:
		d.add(warning, "reads", found, "see which host is slow: clipctl status, and clipctl doctor IMAGE")
	default:
		d.good("reads", "%s", found)
	}
}

const (
	slowAfter  = 10 * time.Second
	stuckAfter = fuseconn.AnswerTimeout
)

// kernel says what roots can be on this machine: what the daemon found out, or
// what the same trial says here.
func (d *doctor) kernel(ctx context.Context, st *control.Status) {
	if st != nil {
		d.mounts(st.Daemon)
		return
	}
	can, err := d.probe(ctx)
	if errors.Is(err, os.ErrPermission) && os.Geteuid() != 0 {
		d.add(unknown, "kernel", "trying it needs root", "run clipctl doctor as root")
		return
	}
	d.mounts(control.Daemon{Mode: string(can.Mode), NotLazy: message(err), Full: errors.Is(err, root.ErrFull), Nested: message(can.Nested), Remap: message(can.Remap)})
}

// mounts says how roots are mounted, and what they cannot do.
func (d *doctor) mounts(can control.Daemon) {
	if can.Full {
		d.add(failure, "kernel", "no lazy root can be mounted: "+can.NotLazy, "make room on the disk of the daemon's root; the daemon then goes on by itself")
		return
	}
	if can.NotLazy != "" {
		d.add(failure, "kernel", "this machine cannot mount lazy roots: "+can.NotLazy, "use Linux 6.12 or newer with EROFS, FUSE and overlayfs, and a state directory on a real file system")
		return
	}
	if can.Mode != string(root.File) {
		d.add(warning, "kernel", "roots are mounted in mode "+can.Mode, "mode file is the fastest and needs Linux 6.12 with EROFS; see docs/operating.md, How roots are mounted")
	} else {
		d.good("kernel", "roots are mounted in mode %s", can.Mode)
	}
	if can.Nested != "" {
		d.add(warning, "nesting", "containers in containers may fail on lazy roots: "+can.Nested, "use a newer kernel, or give the inner containers a volume for their state")
	}
	if can.Remap != "" {
		d.add(warning, "user namespaces", "containers with user namespaces cannot run from lazy images: "+can.Remap, "use Linux 5.19 or newer (mode fuse: 6.12), or take remap-ids out of the proxy plugin's capabilities")
	}
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// probe tries what the daemon tries when it starts.
func (d *doctor) probe(ctx context.Context) (root.Ability, error) {
	dir, err := os.MkdirTemp(existing(d.options.root), ".clipctl-doctor-")
	if err != nil {
		return root.Ability{}, err
	}
	defer os.RemoveAll(dir)
	files, err := layerfs.New(ctx, nil)
	if err != nil {
		return root.Ability{}, err
	}
	can, err := root.Choose(ctx, root.Auto, dir, files, nil)
	return can, errors.Join(err, files.Close())
}

// existing returns the nearest directory to path that there is.
func existing(path string) string {
	for ; path != "/" && path != "."; path = filepath.Dir(path) {
		if st, err := os.Stat(path); err == nil && st.IsDir() {
			break
		}
	}
	return path
}

// File systems that roots cannot be on, see statfs(2).
var unfit = map[int64]string{unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.TMPFS_MAGIC: "tmpfs"}

// leastFree is less than what an image of some size reads when it starts, in bytes.
const leastFree = 1 << 30

// disk checks that there is room for what is fetched.
func (d *doctor) disk(st *control.Status) {
	dir := d.stateDir(st)
	var fs unix.Statfs_t
	if err := unix.Statfs(existing(dir), &fs); err != nil {
		d.add(unknown, "disk", fmt.Sprintf("%s: %v", dir, err), "run clipctl doctor as root")
		return
	}
	d.room(st, dir, int64(fs.Type), int64(fs.Bavail)*fs.Bsize)
}

// room says whether the daemon's directory, on a file system of a kind of
// statfs(2) and with so many bytes free, does for what is fetched.
func (d *doctor) room(st *control.Status, dir string, kind, free int64) {
	found := fmt.Sprintf("%s free at %s", size(free), dir)
	switch {
	case unfit[kind] != "":
		d.add(failure, "disk", dir+" is on "+unfit[kind], "set root in /etc/containerd-clip-grpc/config.toml to a directory on a real file system, such as ext4 or xfs")
	case st != nil && st.Cache.InMemory:
		d.add(failure, "disk", found+"; what is fetched cannot be stored and is served from memory", "make room, or raise cache.max_size")
	case free < leastFree:
		d.add(warning, "disk", found, "make room: reads get slower when nothing can be stored; clipctl cache prune gives up what no container uses")
	case st != nil && st.Cache.Max-st.Cache.Used > free:
		d.add(warning, "disk", fmt.Sprintf("%s, and fetched layers may grow by %s", found, size(st.Cache.Max-st.Cache.Used)), "lower cache.max_size, or make room")
	default:
		d.good("disk", "%s", found)
	}
}

// registry checks that an image's registry answers as the daemon needs it, and
// that the image has an archive.
func (d *doctor) registry(ctx context.Context, st *control.Status, ref string) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	options := remote.Options{ConfigPath: d.options.hosts, GiveUp: 10 * time.Second}
	if d.keys != nil {
		options.Logins = d.keys.Logins
	}
	client := remote.New(options)
	fetcher, err := client.Fetcher(ctx, ref)
	if err != nil {
		d.add(failure, "registry", fmt.Sprintf("%s: %v", ref, err), "name the image as containerd does: registry.example.com/team/app:1")
		return
	}
	manifest, m, err := remoteManifest(ctx, client, fetcher, ref)
	if err != nil {
		d.add(failure, "registry", fmt.Sprintf("manifest of %s: %v", ref, err), registryRemedy(err))
		return
	}
	if len(m.Layers) > 0 {
		rc, err := client.Open(ctx, []string{ref}, m.Layers[0].Digest, 0, 1)
		if err == nil {
			_, err = io.Copy(io.Discard, rc)
			rc.Close()
		}
		if err != nil {
			d.add(failure, "registry", fmt.Sprintf("reading a range of a layer of %s: %v", ref, err), registryRemedy(err))
			return
		}
		d.good("registry", "%s: %s delivers manifest and ranges of layers", ref, rc.(*remote.Reader).Host())
	}
	d.archive(ctx, st, discover.ImageOf(ref, manifest, m), fetcher)
}

// remoteManifest returns the manifest of an image for this machine, from its registry.
func remoteManifest(ctx context.Context, client *remote.Client, fetcher remotes.Fetcher, ref string) (id digest.Digest, m ocispec.Manifest, err error) {
	desc, err := client.Resolve(ctx, ref)
	if err != nil {
		return "", m, err
	}
	if images.IsIndexType(desc.MediaType) {
		var index ocispec.Index
		if err := fetchJSON(ctx, fetcher, desc, &index); err != nil {
			return "", m, err
		}
		if desc, err = bestManifest(index.Manifests); err != nil {
			return "", m, fmt.Errorf("image %s: %w", ref, err)
		}
	}
	return desc.Digest, m, fetchJSON(ctx, fetcher, desc, &m)
}

// mostManifest bounds a manifest or index in bytes, as containerd does.
const mostManifest = 8 << 20

func fetchJSON(ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor, doc any) error {
	rc, err := fetcher.Fetch(ctx, desc)
	if err != nil {
		return err
	}
	defer rc.Close()
	raw, err := io.ReadAll(io.LimitReader(rc, mostManifest))
	if err != nil {
		return err
	}
	if digest.FromBytes(raw) != desc.Digest {
		return fmt.Errorf("what the registry has as %s is something else: %w", desc.Digest, errdefs.ErrDataLoss)
	}
	return json.Unmarshal(raw, doc)
}

// registryRemedy is what to do when a registry does not deliver.
func registryRemedy(err error) string {
	switch {
	case errdefs.IsPermissionDenied(err), errdefs.IsUnauthorized(err), errors.Is(err, docker.ErrInvalidAuthorization):
		return "docker login REGISTRY as the daemon's user (root), whose docker config file and helpers are used"
	case errdefs.IsNotFound(err):
		return "check the image's name, and that the credentials may read it: registries say \"not found\" for both"
	}
	return "check network, proxy and certificates, and the registry's hosts.toml below /etc/containerd/certs.d"
}

// archive looks for the image's archive as the daemon does: it is asked, or if it
// does not run, the registry is.
func (d *doctor) archive(ctx context.Context, st *control.Status, image discover.Image, fetcher remotes.Fetcher) {
	if st == nil {
		found, err := findReferrer(ctx, image, fetcher)
		if err == nil {
			d.archiveFound(image.Ref, found)
			return
		}
		d.add(unknown, "archive", fmt.Sprintf("%s has none in its registry: %v; the daemon, which may look elsewhere, does not answer", image.Ref, err), "start the daemon")
		return
	}
	conn, err := d.globals.connectDaemon()
	if err != nil {
		d.add(unknown, "archive", err.Error(), restartDaemon)
		return
	}
	defer conn.Close()
	found, err := control.FindArchive(ctx, conn, control.Image{Ref: image.Ref, Manifest: image.Manifest, Link: image.Link})
	switch {
	case errdefs.IsNotImplemented(err):
		d.add(unknown, "archive", "the daemon is of another version, and cannot be asked for archives", sameRelease)
	case err != nil:
		d.add(failure, "archive", fmt.Sprintf("%s has none: %v", image.Ref, err), "where the image is built: clipctl index "+image.Ref+" --push")
	default:
		d.archiveFound(image.Ref, found)
	}
}

// archiveFound says how much of an image its archive makes lazy.
func (d *doctor) archiveFound(ref string, a control.Archive) {
	switch {
	case a.Upstream != "":
		d.good("archive", "%s: CLIP wrote %s; the first pull streams each layer once to index it", ref, a.Upstream)
	case a.NotLazy != "":
		d.add(warning, "archive", fmt.Sprintf("%s: layer %d and those above it are not lazy: %s", ref, a.Lazy+1, a.NotLazy), "build that layer in another way, or move it to the top")
	default:
		d.good("archive", "%s has one for all of its %d layers", ref, a.Layers)
	}
}

// findReferrer looks for an archive that the image links to or that refers to it.
func findReferrer(ctx context.Context, image discover.Image, fetcher remotes.Fetcher) (found control.Archive, err error) {
	dir, err := os.MkdirTemp("", "clipctl-")
	if err != nil {
		return found, err
	}
	defer os.RemoveAll(dir)
	finder := discover.New(discover.Options{Dir: dir, Referrers: true, Fetcher: func(context.Context, string) (remotes.Fetcher, error) { return fetcher, nil }})
	defer finder.Close()
	a, _, err := finder.Look(ctx, image)
	if err != nil {
		return found, err
	}
	defer a.Close() // it was only read from
	return control.ArchiveOf(a), nil
}
