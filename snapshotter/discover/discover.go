// Package discover finds the archive of an image, and makes one of what CLIP wrote.
//
// An archive is a file at hand, an artifact that the image names or that refers
// to it in its registry, or an object in a bucket. CLIP's own archives have no
// layer indexes: where there is nothing else, the layers are streamed once for
// them. Whether an archive fits what containerd asks for is the caller's to see.
package discover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/layer"
)

// Options configures New.
type Options struct {
	// Dir holds archives as files named *.clip. Downloads pass through it, in
	// files without a name, and its directory .indexed is the finder's own.
	Dir string
	// Receive returns what is given the uncompressed stream of a layer that is
	// read to be indexed: it is worth keeping. Nil keeps nothing.
	Receive func() Stream
	// Known returns the index of a layer that is on the node already, by its
	// diff ID, or errdefs.ErrNotFound. Nil knows none.
	Known func(diffID digest.Digest) (*layer.Index, error)
	// Referrers asks the image's registry for archives.
	Referrers bool
	// Fetcher returns a fetcher for the repository of an image reference.
	Fetcher func(ctx context.Context, ref string) (remotes.Fetcher, error)
	// Sources are other places that may have archives, in the order in which
	// they are asked.
	Sources []Source
}

// Early is told of an archive of which all but the spans is there, so that the
// rest can be put to use while they are fetched. If they do not come, nobody gets
// the archive. What Early returns is called when the archive is closed.
type Early func(a *archive.Archive) (closed func())

// Source is a place that may have archives, such as a bucket.
type Source interface {
	// Open returns the .clip file of an image manifest that is pulled by ref,
	// which may be empty. The error is errdefs.ErrNotFound if there is none.
	Open(ctx context.Context, ref string, manifest digest.Digest) (io.ReadCloser, error)
	// String names the place.
	String() string
}

// Finder finds archives. It remembers for a while what it found, and that it
// found nothing, since an image is asked for once per layer.
type Finder struct {
	opts Options

	mu       sync.Mutex // guards the fields below
	local    map[string]localFile
	known    map[Image]*result
	streamed map[digest.Digest]*streamed
}

// Image is what an archive is searched for.
type Image struct {
	Ref      string        // reference it is pulled by; empty if that is not known
	Manifest digest.Digest // of the platform
	Link     digest.Digest // artifact that the manifest names as its archive's; empty if it names none
}

// ImageOf returns the image that is pulled by ref, whose manifest m has the
// digest id.
func ImageOf(ref string, id digest.Digest, m ocispec.Manifest) Image {
	image := Image{Ref: ref, Manifest: id}
	if len(m.Layers) > 0 {
		image.Link = digest.Digest(m.Layers[0].Annotations[archive.AnnotationLink])
	}
	return image
}

// localFile is what is known of a file in Options.Dir.
type localFile struct {
	path     string
	size     int64
	modTime  time.Time
	image    digest.Digest // manifest that the archive is of; empty if it does not say
	upstream string        // storage reference of one that CLIP wrote: it has no layer indexes
	unusable error         // why it cannot be used though it is an archive
}

func (l localFile) isUpstream() bool { return l.upstream != "" && l.unusable == nil }

// isOf says whether the archive is of the image manifest that ref names.
func (l localFile) isOf(ref string, manifest digest.Digest) bool {
	return l.image == manifest || l.image == "" && l.upstream != "" && archive.SameRef(l.upstream, ref)
}

// result is the outcome of a search for a manifest's archive.
type result struct {
	early   Early              // nil if there is nobody to tell
	cancel  context.CancelFunc // ends the search
	done    chan struct{}
	archive *archive.Archive // valid after done
	err     error            // valid after done
	users   int              // guarded by Finder.mu: callers that use it, and the map
	streams []Stream         // guarded by Finder.mu: those that were read on the way
	layers  []digest.Digest  // guarded by Finder.mu: what they are in Finder.streamed
}

// How long outcomes are remembered. A pull asks for its layers within seconds;
// an archive that is pushed later must be found by the next pull.
const (
	keepFound   = time.Minute
	keepMissing = 3 * time.Second
	// searchTimeout bounds a search in the registry: a pull waits for it.
	searchTimeout = 60 * time.Second
)

// Bounds on what a registry may send.
const (
	maxReferrers  = 64
	maxManifest   = 4 << 20
	maxCompressed = 512 << 20
	maxArchive    = 2 << 30
)

// New returns a finder. The caller closes it. What is left of Offer in
// Options.Dir is removed.
func New(opts Options) *Finder {
	removeOffered(opts.Dir)
	return &Finder{opts: opts, local: map[string]localFile{}, known: map[Image]*result{}, streamed: map[digest.Digest]*streamed{}}
}

// Find returns the archive of an image. One that the image links to is of
// another manifest with the same layers, the one that was converted; any other
// is of the image's own. The caller calls release when it has done with the
// archive, and does not close it. The error is errdefs.ErrNotFound if there is
// none.
func (f *Finder) Find(ctx context.Context, image Image) (a *archive.Archive, release func(), err error) {
	return f.FindEarly(ctx, image, nil)
}

// FindEarly is Find, and tells early of what is fetched for it. What is known, or
// searched for somebody else, is not told of.
func (f *Finder) FindEarly(ctx context.Context, image Image, early Early) (a *archive.Archive, release func(), err error) {
	if err := image.Manifest.Validate(); err != nil {
		return nil, nil, fmt.Errorf("manifest digest %q: %w", image.Manifest, errdefs.ErrInvalidArgument)
	}
	ctx, span := tracing.StartSpan(ctx, "clip.find", tracing.WithAttribute("image", image.Ref))
	defer func() { span.SetStatus(err); span.End() }()
	f.mu.Lock()
	r := f.known[image]
	if r == nil {
		// The search serves all who ask meanwhile: it outlives the first.
		searching, cancel := context.WithCancel(context.WithoutCancel(ctx))
		r = &result{early: early, cancel: cancel, done: make(chan struct{}), users: 1}
		f.known[image] = r
		go f.run(searching, r, image)
	}
	r.users++
	f.mu.Unlock()
	release = func() { f.release(r) }
	select {
	case <-r.done:
		err = r.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		release()
		return nil, nil, err
	}
	return r.archive, release, nil
}

// run searches and sees to it that the outcome is forgotten in time.
func (f *Finder) run(ctx context.Context, r *result, image Image) {
	defer r.cancel()
	r.archive, r.err = f.search(ctx, r, image)
	close(r.done)
	keep := keepFound
	if r.err != nil && !errors.Is(r.err, errAdopting) {
		keep = keepMissing
	}
	time.AfterFunc(keep, func() { f.forget(image, r) })
}

// Forget drops what is known of the image's archive: it is not needed again
// soon, or must be searched anew.
func (f *Finder) Forget(image Image) {
	f.mu.Lock()
	r := f.known[image]
	f.mu.Unlock()
	if r != nil {
		f.forget(image, r)
	}
}

func (f *Finder) forget(image Image, r *result) {
	f.mu.Lock()
	known := f.known[image] == r
	if known {
		delete(f.known, image)
	}
	f.mu.Unlock()
	if known {
		f.release(r)
	}
}

// release gives up one use of r; the last one closes its archive.
func (f *Finder) release(r *result) {
	f.mu.Lock()
	r.users--
	last := r.users == 0
	f.mu.Unlock()
	if !last {
		return
	}
	<-r.done
	f.mu.Lock()
	for _, d := range r.layers {
		delete(f.streamed, d)
	}
	f.mu.Unlock()
	for _, s := range r.streams { // nobody else has r any more
		s.Close()
	}
	if r.archive != nil {
		r.archive.Close() // it was only read from
	}
}

// search looks for the archive of an image, or makes it of the one that CLIP wrote.
func (f *Finder) search(ctx context.Context, r *result, image Image) (*archive.Archive, error) {
	a, upstream, err := f.look(ctx, wanted{early: r.early}, image)
	if err != nil && upstream != "" {
		return f.adopt(ctx, r, image.Ref, image.Manifest, upstream)
	}
	return a, err
}

// Look is Find for who only wants to know: nothing is remembered, and no archive
// is made. If Find would make one, the error comes with the file that CLIP wrote.
// The caller closes the archive.
func (f *Finder) Look(ctx context.Context, image Image) (a *archive.Archive, upstream string, err error) {
	return f.lookFor(ctx, wanted{}, image)
}

// LookWhole is Look for who writes the archive again: it is all there, windows too.
func (f *Finder) LookWhole(ctx context.Context, image Image) (a *archive.Archive, upstream string, err error) {
	return f.lookFor(ctx, wanted{whole: true}, image)
}

func (f *Finder) lookFor(ctx context.Context, want wanted, image Image) (a *archive.Archive, upstream string, err error) {
	if err := image.Manifest.Validate(); err != nil {
		return nil, "", fmt.Errorf("manifest digest %q: %w", image.Manifest, errdefs.ErrInvalidArgument)
	}
	return f.look(ctx, want, image)
}

// wanted says what of an archive is fetched, and who is told of it.
type wanted struct {
	early Early // nil if there is nobody to tell
	whole bool  // all of it, not what is read here alone
}

// look looks for the archive of an image in all places, in the order that
// docs/operating.md lists.
func (f *Finder) look(ctx context.Context, want wanted, image Image) (a *archive.Archive, upstream string, err error) {
	var passed []error // why archives that there are cannot be used, and places have none
	if image.Link != "" && image.Ref != "" {
		a, err := f.findLinked(ctx, want, image)
		if err == nil {
			return a, "", nil
		}
		passed = append(passed, err)
		log.G(ctx).WithError(err).WithField("image", image.Ref).Warn("the archive that the image links to cannot be used; looking for another")
	}
	local, err := f.findLocal(ctx, image.Ref, image.Manifest)
	if err != nil {
		return nil, "", err
	}
	if local.ours != "" {
		a, err := archive.OpenFile(local.ours)
		return a, "", err
	}
	if local.upstream != "" {
		if a, err := archive.OpenFile(f.indexedPath(image.Manifest)); err == nil {
			return a, "", nil // made earlier; if it is damaged it is made again
		}
	}
	if local.upstream == "" && local.unusable != nil {
		passed = append(passed, local.unusable)
	}
	err = fmt.Errorf("archive of %s: %w", image.Manifest, errdefs.ErrNotFound)
	if f.opts.Referrers && image.Ref != "" {
		if a, err = f.findReferrer(ctx, want, image.Ref, image.Manifest); err == nil {
			return a, "", nil
		}
	}
	passed = append(passed, err)
	for _, source := range f.opts.Sources {
		a, failed := f.findIn(ctx, source, image)
		if failed == nil {
			return a, "", nil
		}
		if !errdefs.IsNotFound(failed) {
			log.G(ctx).WithError(failed).WithField("image", image.Ref).Warn("a source of archives is passed over")
		}
		passed = append(passed, failed)
	}
	return nil, local.upstream, reasons(passed)
}

// reasons is all of errs in one. What only a newer program can read comes first:
// the rest is of no interest then, and the end of a long reason may be cut off.
func reasons(errs []error) error {
	first := max(0, slices.IndexFunc(errs, func(err error) bool { return errors.Is(err, archive.ErrVersion) }))
	err := errs[first]
	for i, e := range errs {
		if i != first {
			err = fmt.Errorf("%w; %w", err, e)
		}
	}
	return err
}

// findIn looks for the image's archive in a source.
func (f *Finder) findIn(ctx context.Context, source Source, image Image) (*archive.Archive, error) {
	ctx, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	rc, err := source.Open(ctx, image.Ref, image.Manifest)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	tmp, err := f.nameless()
	if err != nil {
		return nil, err
	}
	size, err := copyBounded(tmp, 0, rc)
	if err != nil {
		tmp.Close()
		return nil, fmt.Errorf("%s: %w", source, err)
	}
	a, err := openOf(tmp, size, image.Manifest, archive.Open)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", source, err)
	}
	return a, nil
}

// found are the paths of what is in Options.Dir for an image.
type found struct {
	ours, upstream string
	unusable       error // why others there are of no use
}

// findLocal looks into Options.Dir for a file of ours and for one that CLIP
// wrote, which may name its image by reference only. A file that is no usable
// archive is reported once and passed over.
func (f *Finder) findLocal(ctx context.Context, ref string, manifest digest.Digest) (is found, err error) {
	files, err := f.inspectAll(ctx)
	if err != nil {
		return is, err
	}
	f.sweep(ctx, files)
	for _, file := range files {
		switch {
		case file.unusable != nil:
			// One that does not tell its image may be of this one.
			if file.image == manifest || file.image == "" && is.unusable == nil {
				is.unusable = file.unusable
			}
		case file.upstream == "" && file.image == manifest && is.ours == "":
			is.ours = file.path
		case file.upstream != "" && file.isOf(ref, manifest):
			is.upstream = file.path
		}
	}
	return is, nil
}

// inspectAll returns what is known of the files in Options.Dir.
func (f *Finder) inspectAll(ctx context.Context) ([]localFile, error) {
	paths, err := filepath.Glob(filepath.Join(f.opts.Dir, "*.clip"))
	if err != nil {
		return nil, err
	}
	files := make([]localFile, 0, len(paths))
	for _, path := range paths {
		files = append(files, f.inspect(ctx, path))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.DeleteFunc(f.local, func(path string, _ localFile) bool { return !slices.Contains(paths, path) })
	return files, nil
}

// inspect returns what is known of the file at path.
func (f *Finder) inspect(ctx context.Context, path string) localFile {
	st, err := os.Stat(path)
	if err != nil {
		return localFile{}
	}
	f.mu.Lock()
	file, ok := f.local[path]
	f.mu.Unlock()
	if ok && file.size == st.Size() && file.modTime.Equal(st.ModTime()) {
		return file
	}
	file, err = imageOf(path)
	file.path, file.size, file.modTime = path, st.Size(), st.ModTime()
	if err != nil {
		log.G(ctx).WithError(err).WithField("path", path).Warn("ignoring a file that is no usable archive")
	}
	f.mu.Lock()
	f.local[path] = file
	f.mu.Unlock()
	return file
}

// Usable returns an error if a Finder would ignore the file at path.
func Usable(path string) error {
	_, err := imageOf(path)
	return err
}

// imageOf returns what the archive at path says it is of. Only one that CLIP
// wrote may not know its manifest, or one from a newer program, which is told
// by unusable beside the error.
func imageOf(path string) (localFile, error) {
	a, err := archive.OpenFile(path)
	if err == nil {
		defer a.Close()
		return localFile{image: a.Info().Descriptor.Digest}, nil
	}
	newer := errors.Is(err, archive.ErrVersion)
	if !newer && !errors.Is(err, archive.ErrNoSections) {
		return localFile{}, err
	}
	u, upstream := archive.OpenUpstreamFile(path)
	switch {
	case newer && upstream != nil:
		return localFile{unusable: err}, err
	case errors.Is(upstream, archive.ErrVersion):
		return localFile{unusable: upstream}, upstream
	case upstream != nil:
		return localFile{}, upstream
	}
	defer u.Close()
	img, ok := u.Image()
	if !ok {
		return localFile{}, fmt.Errorf("archive %s holds data instead of an image; clipctl mount shows it: %w", path, errdefs.ErrInvalidArgument)
	}
	if newer {
		return localFile{image: img.Manifest, unusable: err}, err
	}
	return localFile{image: img.Manifest, upstream: img.Ref}, nil
}

// Close ends all searches and forgets everything.
func (f *Finder) Close() {
	f.mu.Lock()
	known := maps.Clone(f.known)
	f.mu.Unlock()
	for image, r := range known {
		r.cancel()
		<-r.done
		f.forget(image, r)
	}
}
