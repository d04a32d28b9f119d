package command

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/fill"
)

// view is what clipctl status shows.
type view struct {
	Daemon     *control.Daemon `json:"daemon"` // null, as is the cache, where only a watcher runs
	Cache      *control.Cache  `json:"cache"`
	Images     []imageView     `json:"images"`
	Containers []containerView `json:"containers"`
	Layers     []layerView     `json:"layers"`
	Indexed    []indexedView   `json:"indexed"`
}

// imageView is an image that the snapshotter has, or a part of one.
type imageView struct {
	Namespace string        `json:"namespace,omitempty"` // empty if containerd was not asked
	Name      string        `json:"name"`
	ChainID   digest.Digest `json:"chainID"`
	Layers    int           `json:"layers"`
	Lazy      int           `json:"lazy"`             // layers that are
	Reason    string        `json:"reason,omitempty"` // why the others are not
	Fetched   int64         `json:"fetched"`          // bytes of the lazy layers, uncompressed
	Total     int64         `json:"total"`
	Fill      fill.Phase    `json:"fill,omitempty"`
	Mount     string        `json:"mount,omitempty"` // mode in which its root is mounted
	Error     string        `json:"error,omitempty"`
}

// containerView is a container, or whatever else has a writable snapshot.
type containerView struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Image     string `json:"image,omitempty"`
	Lazy      bool   `json:"lazy"`
	Reason    string `json:"reason,omitempty"`
	Mount     string `json:"mount,omitempty"`
}

// layerView is one layer of the images, lazy or not.
type layerView struct {
	control.Layer
	Lazy   bool   `json:"lazy"`
	Reason string `json:"reason,omitempty"`
	Image  string `json:"image"` // that first brought it
}

// viewer puts a view together.
type viewer struct {
	st     control.Status
	byName map[string]control.Snapshot
	layers map[digest.Digest]control.Layer
}

func newView(st control.Status, known inContainerd) view {
	b := viewer{st: st, byName: map[string]control.Snapshot{}, layers: map[digest.Digest]control.Layer{}}
	for _, s := range st.Snapshots {
		b.byName[s.Name] = s
	}
	for _, l := range st.Layers {
		b.layers[l.DiffID] = l
	}
	v := view{Daemon: &st.Daemon, Cache: &st.Cache, Layers: b.layerViews(), Images: []imageView{}, Indexed: known.indexed}
	for _, image := range known.images {
		if s, ok := b.snapshotOf(image.namespace, image.chainID); ok {
			v.Images = append(v.Images, b.image(image.namespace, image.name, s))
		}
	}
	if !known.asked {
		v.Images = b.imagesByLabel()
	}
	v.Containers = b.containers(known)
	return v
}

// snapshotOf finds the snapshot that containerd calls chainID in a namespace:
// an ordinary one is the namespace's own, a lazy one is everybody's.
func (b viewer) snapshotOf(namespace string, chainID digest.Digest) (found control.Snapshot, ok bool) {
	for _, s := range b.st.Snapshots {
		switch {
		case s.ChainID != chainID:
		case strings.HasPrefix(s.Name, namespace+"/"):
			return s, true
		case s.Lazy:
			found, ok = s, true
		}
	}
	return found, ok
}

// imagesByLabel lists the images by the names that their topmost layers were
// pulled by.
func (b viewer) imagesByLabel() []imageView {
	below := map[string]bool{} // image and snapshot that another one of the image stands on
	for _, s := range b.st.Snapshots {
		below[s.Image+" "+s.Parent] = true
	}
	images := []imageView{}
	for _, s := range b.st.Snapshots {
		if s.Image != "" && !below[s.Image+" "+s.Name] {
			images = append(images, b.image("", s.Image, s))
		}
	}
	slices.SortFunc(images, func(x, y imageView) int { return cmp.Compare(x.Name, y.Name) })
	return images
}

// unasked is why an image is not lazy of which the daemon has nothing to say.
const unasked = "containerd unpacked it without saying what it is: its layers were imported, or exports.enable_remote_snapshot_annotations is missing"

// image describes the image whose topmost layer is top.
func (b viewer) image(namespace, name string, top control.Snapshot) imageView {
	v := imageView{Namespace: namespace, Name: name, ChainID: top.ChainID, Mount: top.Mount}
	for s, ok := top, true; ok; s, ok = b.byName[s.Parent] {
		v.Layers++
		if !s.Lazy {
			v.Reason = cmp.Or(s.NotLazy, v.Reason) // the lowest is what the others follow from
			continue
		}
		v.Lazy++
		l := b.layers[s.DiffID]
		v.Fetched += l.Fetched
		v.Total += l.Size
		v.Error = cmp.Or(v.Error, l.Error)
		if v.Fill == "" || v.Fill == fill.Done || l.Fill == string(fill.Fetching) {
			v.Fill = fill.Phase(l.Fill)
		}
	}
	if v.Lazy < v.Layers && v.Reason == "" {
		v.Reason = unasked
	}
	return v
}

// containers describes what is active. Keys are called as containerd's
// containers are, where those say so.
func (b viewer) containers(known inContainerd) []containerView {
	all := []containerView{}
	for _, s := range b.st.Snapshots {
		if s.Kind != "active" {
			continue
		}
		namespace, rest, _ := strings.Cut(s.Name, "/")
		_, key, _ := strings.Cut(rest, "/")
		c := containerView{Namespace: namespace, Name: key, Mount: s.Mount}
		for below, ok := b.byName[s.Parent]; ok; below, ok = b.byName[below.Parent] {
			c.Image = cmp.Or(c.Image, below.Image)
			c.Reason = cmp.Or(below.NotLazy, c.Reason)
			if below.Lazy {
				c.Lazy, c.Mount = true, cmp.Or(c.Mount, below.Mount)
				break
			}
		}
		if k, ok := known.containers[namespace+"/"+key]; ok {
			c.Name, c.Image = k.name, cmp.Or(k.image, c.Image)
		}
		all = append(all, c)
	}
	return all
}

// layerViews lists the layers of images, each once.
func (b viewer) layerViews() []layerView {
	views := []layerView{}
	seen := map[digest.Digest]bool{}
	for _, s := range b.st.Snapshots {
		if s.Kind != "committed" || s.DiffID == "" || s.Lazy && seen[s.DiffID] {
			continue
		}
		l := layerView{Layer: control.Layer{DiffID: s.DiffID, Size: s.Size, Fetched: s.Size, Disk: s.Size, Complete: true}, Reason: s.NotLazy, Image: s.Image}
		if s.Lazy {
			l.Layer, l.Lazy = b.layers[s.DiffID], true
			seen[s.DiffID] = true
		}
		views = append(views, l)
	}
	return views
}

// write shows the view to people.
func (v view) write(w io.Writer) error {
	v.writeDaemon(w)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	table := func(head string, n int, row func(i int) string) {
		if n == 0 {
			return
		}
		fmt.Fprintln(tw)
		fmt.Fprintln(tw, head)
		for i := range n {
			fmt.Fprintln(tw, row(i))
		}
		tw.Flush() // columns of a table are its own; w's errors are told by the last Flush
	}
	table("NAMESPACE\tIMAGE\tLAZY\tFETCHED\tFILL\tMOUNT\tWHY NOT, OR LAST ERROR", len(v.Images), func(i int) string { return v.Images[i].row() })
	table("NAMESPACE\tCONTAINER\tIMAGE\tLAZY\tMOUNT\tWHY NOT", len(v.Containers), func(i int) string { return v.Containers[i].row() })
	table("LAYER\tLAZY\tFETCHED\tFILL\tFROM\tIMAGE\tWHY NOT, OR LAST ERROR", len(v.Layers), func(i int) string { return v.Layers[i].row() })
	table("NAMESPACE\tIMAGE\tINDEXED\tARCHIVE OR REASON", len(v.Indexed), func(i int) string {
		x := v.Indexed[i]
		return x.Namespace + "\t" + x.Image + "\t" + x.Indexed + "\t" + x.What
	})
	return tw.Flush()
}

func (v view) writeDaemon(w io.Writer) {
	if v.Daemon == nil {
		fmt.Fprintln(w, "no daemon, and containerd does not have the snapshotter: images are only indexed here, not run lazily")
		return
	}
	how := "roots are mounted in mode " + v.Daemon.Mode
	if v.Daemon.NotLazy != "" {
		how = "no image is lazy: " + v.Daemon.NotLazy
	}
	fmt.Fprintf(w, "daemon %d since %s; %s\n", v.Daemon.PID, v.Daemon.Started.Local().Format(time.DateTime), how)
	full := ""
	if v.Cache.InMemory {
		full = ", which is full: reads are served from memory"
	}
	fmt.Fprintf(w, "%s of at most %s fetched%s; %d reads under way, the oldest for %.1fs\n",
		size(v.Cache.Used), size(v.Cache.Max), full, v.Daemon.InFlight, v.Daemon.OldestSeconds)
}

func (i imageView) row() string {
	lazy := fmt.Sprintf("%d of %d layers", i.Lazy, i.Layers)
	switch i.Lazy {
	case i.Layers:
		lazy = "yes"
	case 0:
		lazy = "no"
	}
	return fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s", orDash(i.Namespace), i.Name, lazy, share(i.Fetched, i.Total),
		orDash(string(i.Fill)), orDash(i.Mount), cmp.Or(i.Reason, i.Error))
}

func (c containerView) row() string {
	return fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", c.Namespace, c.Name, orDash(c.Image), yes(c.Lazy), orDash(c.Mount), c.Reason)
}

func (l layerView) row() string {
	return fmt.Sprintf("%.19s\t%s\t%s\t%s\t%s\t%s\t%s", l.DiffID, yes(l.Lazy), share(l.Fetched, l.Size), orDash(l.Fill), orDash(l.Host),
		orDash(l.Image), cmp.Or(l.Reason, l.Error))
}

func share(n, of int64) string {
	if of == 0 {
		return "-"
	}
	return fmt.Sprintf("%s of %s (%d%%)", size(n), size(of), n*100/of)
}

func yes(is bool) string {
	if is {
		return "yes"
	}
	return "no"
}

func orDash(s string) string { return cmp.Or(s, "-") }
