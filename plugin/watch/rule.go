package watch

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"text/template"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/plugin/bucket"
	"github.com/beam-cloud/containerd-clip/plugin/export"
)

// Rule says what to do with some images.
type Rule struct {
	// Names are patterns, one of which the image's name must match. A * stands
	// for any characters. None is any name.
	Names []string
	// Labels are those that the image must have. An empty value is any value.
	Labels map[string]string
	// Platforms are what to index, as os/arch[/variant]: an image waits until all
	// of them are in the store that its index lists. "all" is all that are in the
	// store. None is this machine's.
	Platforms []string
	// Action is "index": keep the archive in the directory; "push": push it to
	// the image's registry; or "both".
	Action string
	// StorageRef is the remote reference to store, and whose registry is pushed
	// to, as a Go template of Name, Domain, Path, Tag and Digest of the image's
	// name. Empty is {{.Name}}.
	StorageRef string
	// To is a bucket or directory that gets the archive, too, or instead if
	// there is no Action: the text of a bucket.Location. Empty is none.
	To string
}

// rule is a Rule made ready.
type rule struct {
	names      []*regexp.Regexp
	labels     map[string]string
	selection  export.Selection
	keep, push bool
	storageRef *template.Template
	action     string
	to         *bucket.Location // nil if there is none
}

func (r Rule) compile() (rule, error) {
	c := rule{labels: r.Labels, action: r.Action}
	for _, pattern := range r.Names {
		quoted := strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, ".*")
		c.names = append(c.names, regexp.MustCompile("^"+quoted+"$"))
	}
	switch r.Action {
	case "index":
		c.keep = true
	case "push":
		c.push = true
	case "both":
		c.keep, c.push = true, true
	case "":
		c.action = "store"
		if r.To == "" {
			return c, errors.New(`there is neither an action (index, push or both) nor a bucket or directory "to"`)
		}
	default:
		return c, fmt.Errorf("action %q is none of index, push, both", r.Action)
	}
	var err error
	if r.To != "" {
		if c.to, err = bucket.Parse(r.To); err != nil {
			return c, fmt.Errorf("to: %w", err)
		}
	}
	if c.selection, err = selection(r.Platforms); err != nil {
		return c, err
	}
	text := r.StorageRef
	if text == "" {
		text = "{{.Name}}"
	}
	if c.storageRef, err = template.New("storage_ref").Option("missingkey=error").Parse(text); err != nil {
		return c, err
	}
	_, err = c.reference(example)
	return c, err
}

// example is a name with all that a name can have, to try a template with.
const example = "registry.example.com/team/app:1@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func selection(names []string) (export.Selection, error) {
	if len(names) == 0 {
		return export.ThisPlatform, nil
	}
	var all []ocispec.Platform
	for _, name := range names {
		if name == "all" {
			return export.AllPlatforms, nil
		}
		p, err := platforms.Parse(name)
		if err != nil {
			return export.Selection{}, fmt.Errorf("platform %q: %w", name, err)
		}
		all = append(all, p)
	}
	return export.Selection{Name: strings.Join(names, ","), Match: platforms.Any(all...), All: true, Whole: true}, nil
}

// mayMatch says whether a rule is for images of that name.
func (w *Watcher) mayMatch(name string) bool {
	for _, r := range w.rules {
		if r.matchesName(name) {
			return true
		}
	}
	return false
}

// match returns the rule for an image, if there is one.
func (w *Watcher) match(image images.Image) (rule, bool) {
	for _, r := range w.rules {
		if r.matchesName(image.Name) && r.matchesLabels(image.Labels) {
			return r, true
		}
	}
	return rule{}, false
}

func (r rule) matchesName(name string) bool {
	if isPassing(name) {
		return false
	}
	if len(r.names) == 0 {
		return true
	}
	for _, pattern := range r.names {
		if pattern.MatchString(name) {
			return true
		}
	}
	return false
}

func (r rule) matchesLabels(labels map[string]string) bool {
	for k, want := range r.labels {
		if got, ok := labels[k]; !ok || want != "" && got != want {
			return false
		}
	}
	return true
}

// passing matches names that are none of the image's own: CRI's by config
// digest; a word and a digest, which containerd's Import and BuildKit give what
// has no name, such as overlayfs@, clip@, import@ and moby-dangling@; ctr's for
// what has a tag alone; and what nerdctl makes and removes again to push.
var passing = regexp.MustCompile(`^(sha256:|[^./:@]+@|import-\d{4}-\d\d-\d\d:)|-tmp-(reduced-platform|esgz)$`)

func isPassing(name string) bool { return passing.MatchString(name) }

// place is where the layers of an image are, and where its archive goes.
type place struct {
	ref        string // storage reference
	repository string // of ref
	object     string // URL in a bucket or directory; empty if the rule has none
}

// place says where what belongs to an image is. An image for several platforms
// has an object for each; the one here stands for them.
func (r rule) place(image images.Image) (place, error) {
	at, err := r.reference(image.Name)
	if err != nil || r.to == nil {
		return at, err
	}
	name, err := r.to.Name(at.ref, image.Target.Digest)
	if err != nil {
		return place{}, err
	}
	at.object = r.to.URL(name)
	return at, nil
}

// reference expands the rule's storage reference for an image.
func (r rule) reference(name string) (place, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return place{}, fmt.Errorf("image name %q: %w", name, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	fields := struct{ Name, Domain, Path, Tag, Digest string }{Name: name, Domain: reference.Domain(named), Path: reference.Path(named)}
	if tagged, ok := named.(reference.Tagged); ok {
		fields.Tag = tagged.Tag()
	}
	if digested, ok := named.(reference.Digested); ok {
		fields.Digest = digested.Digest().String()
	}
	var b strings.Builder
	if err := r.storageRef.Execute(&b, fields); err != nil {
		return place{}, fmt.Errorf("storage_ref: %w", errors.Join(err, errdefs.ErrInvalidArgument))
	}
	if err := archive.CheckStorageRef(b.String()); err != nil {
		return place{}, fmt.Errorf("storage_ref of image %q: %w", name, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	stored, err := reference.ParseNormalizedNamed(b.String())
	if err != nil {
		return place{}, fmt.Errorf("storage_ref %q: %w", b.String(), errors.Join(err, errdefs.ErrInvalidArgument))
	}
	return place{ref: b.String(), repository: stored.Name()}, nil
}
