// Package discover finds the archive of an image.
package discover

import (
	"context"
	"encoding/json"
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
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
)

// Options configures New.
type Options struct {
	// Dir holds archives as files named *.clip. Downloads pass through it, in
	// files without a name, and its directory .indexed is the finder's own.
	Dir string
	// Receive returns what is given the uncompressed stream of a layer that is
	// read to be indexed: it is worth keeping. Nil keeps nothing.
	Receive func() Stream
	// Referrers asks the image's registry for archives.
	Referrers bool
	// Fetcher returns a fetcher for the repository of an image reference.
	Fetcher func(ctx context.Context, ref string) (remotes.Fetcher, error)
}

// Finder finds archives. It remembers for a while what it found, and that it
// found nothing, since an image is asked for once per layer.
type Finder struct {
	opts Options

	mu    sync.Mutex // guards the fields below
	local map[string]localFile
	known map[digest.Digest]*result
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
	cancel  context.CancelFunc // ends the search
	done    chan struct{}
	archive *archive.Archive // valid after done
	err     error            // valid after done
	users   int              // guarded by Finder.mu: callers that use it, and the map
	streams []Stream         // guarded by Finder.mu: those that were read on the way
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

// New returns a finder. The caller closes it.
func New(opts Options) *Finder {
	return &Finder{opts: opts, local: map[string]localFile{}, known: map[digest.Digest]*result{}}
}

// Find returns the archive of the image manifest, of which ref is the
// reference that it is pulled by. The caller calls release when it has done
// with the archive, and does not close it. The error is errdefs.ErrNotFound if
// there is none.
func (f *Finder) Find(ctx context.Context, ref string, manifest digest.Digest) (a *archive.Archive, release func(), err error) {
	if err := manifest.Validate(); err != nil {
		return nil, nil, fmt.Errorf("manifest digest %q: %w", manifest, errdefs.ErrInvalidArgument)
	}
	f.mu.Lock()
	r := f.known[manifest]
	if r == nil {
		// The search serves all who ask meanwhile: it outlives the first.
		searching, cancel := context.WithCancel(context.WithoutCancel(ctx))
		r = &result{cancel: cancel, done: make(chan struct{}), users: 1}
		f.known[manifest] = r
		go f.run(searching, r, ref, manifest)
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
func (f *Finder) run(ctx context.Context, r *result, ref string, manifest digest.Digest) {
	defer r.cancel()
	r.archive, r.err = f.search(ctx, r, ref, manifest)
	close(r.done)
	keep := keepFound
	if r.err != nil && !errors.Is(r.err, errAdopting) {
		keep = keepMissing
	}
	time.AfterFunc(keep, func() { f.forget(manifest, r) })
}

// Forget drops what is known of the manifest's archive: it is not needed again
// soon, or must be searched anew.
func (f *Finder) Forget(manifest digest.Digest) {
	f.mu.Lock()
	r := f.known[manifest]
	f.mu.Unlock()
	if r != nil {
		f.forget(manifest, r)
	}
}

func (f *Finder) forget(manifest digest.Digest, r *result) {
	f.mu.Lock()
	known := f.known[manifest] == r
	if known {
		delete(f.known, manifest)
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
	for _, s := range r.streams { // nobody else has r any more
		s.Close()
	}
	if r.archive != nil {
		r.archive.Close() // it was only read from
	}
}

func (f *Finder) search(ctx context.Context, r *result, ref string, manifest digest.Digest) (*archive.Archive, error) {
	local, err := f.findLocal(ctx, ref, manifest)
	if err != nil {
		return nil, err
	}
	if local.ours != "" {
		return archive.OpenFile(local.ours)
	}
	if local.upstream != "" {
		if a, err := archive.OpenFile(f.indexedPath(manifest)); err == nil {
			return a, nil // made earlier; if it is damaged it is made again
		}
	}
	err = fmt.Errorf("archive of %s: %w", manifest, errdefs.ErrNotFound)
	if f.opts.Referrers && ref != "" {
		var a *archive.Archive
		if a, err = f.findReferrer(ctx, ref, manifest); err == nil {
			return a, nil
		}
	}
	if local.upstream != "" {
		return f.adopt(ctx, r, ref, manifest, local.upstream)
	}
	if local.unusable != nil {
		err = fmt.Errorf("%w; %w", local.unusable, err)
	}
	return nil, err
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

// findReferrer asks the registry which archives refer to the manifest and
// takes the newest that is usable.
func (f *Finder) findReferrer(ctx context.Context, ref string, manifest digest.Digest) (*archive.Archive, error) {
	ctx, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	fetcher, err := f.opts.Fetcher(ctx, ref)
	if err != nil {
		return nil, err
	}
	lister, ok := fetcher.(remotes.ReferrersFetcher)
	if !ok {
		return nil, fmt.Errorf("referrers of %s: %w", ref, errdefs.ErrNotImplemented)
	}
	found, err := lister.FetchReferrers(ctx, manifest, remotes.WithReferrerArtifactTypes(archive.ArtifactType))
	if err != nil {
		return nil, fmt.Errorf("asking for archives that refer to %s: %w", manifest, err)
	}
	failed := fmt.Errorf("the registry has no archive that refers to %s: %w", manifest, errdefs.ErrNotFound)
	ignore := func(id digest.Digest, err error) {
		failed = fmt.Errorf("archive %s: %w", id, err)
		log.G(ctx).WithError(err).WithField("digest", id).Warn("ignoring an archive that refers to the image")
	}
	var referrers []referrer
	for _, desc := range found[:min(len(found), maxReferrers)] {
		a, err := readReferrer(ctx, fetcher, desc, manifest)
		if err != nil {
			ignore(desc.Digest, err)
			continue
		}
		referrers = append(referrers, a)
	}
	// The order in a registry means nothing.
	slices.SortStableFunc(referrers, func(a, b referrer) int { return b.created.Compare(a.created) })
	for _, a := range referrers {
		opened, err := f.fetchArchive(ctx, fetcher, a.blob, manifest)
		if err == nil {
			return opened, nil
		}
		ignore(a.id, err)
	}
	return nil, failed
}

// referrer is an artifact that holds an archive.
type referrer struct {
	id      digest.Digest
	created time.Time // zero if it does not say; archives with a prefetch list do
	blob    ocispec.Descriptor
}

// readReferrer fetches the manifest of the artifact desc, which should refer to
// the image manifest.
func readReferrer(ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor, manifest digest.Digest) (a referrer, err error) {
	raw, err := fetchSmall(ctx, fetcher, desc)
	if err != nil {
		return a, err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return a, fmt.Errorf("manifest: %w", err)
	}
	if m.Subject == nil || m.Subject.Digest != manifest {
		return a, fmt.Errorf("it does not refer to %s: %w", manifest, errdefs.ErrInvalidArgument)
	}
	a.id = desc.Digest
	if created, err := time.Parse(time.RFC3339, m.Annotations[ocispec.AnnotationCreated]); err == nil {
		a.created = created
	}
	for _, l := range m.Layers {
		if l.MediaType == archive.MediaType {
			a.blob = l
			return a, nil
		}
	}
	return a, fmt.Errorf("it has no layer of type %s: %w", archive.MediaType, errdefs.ErrNotFound)
}

func fetchSmall(ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor) ([]byte, error) {
	if desc.Size > maxManifest {
		return nil, fmt.Errorf("manifest of %d bytes: %w", desc.Size, errdefs.ErrInvalidArgument)
	}
	rc, err := fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	raw, err := io.ReadAll(io.LimitReader(rc, maxManifest+1))
	if err != nil {
		return nil, err
	}
	if desc.Digest.Validate() != nil || desc.Digest.Algorithm().FromBytes(raw) != desc.Digest {
		return nil, fmt.Errorf("content does not match digest %q: %w", desc.Digest, errdefs.ErrDataLoss)
	}
	return raw, nil
}

// fetchArchive downloads a compressed archive: the part of it that is read here
// if that can be had alone.
func (f *Finder) fetchArchive(ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor, manifest digest.Digest) (*archive.Archive, error) {
	if desc.Size > maxCompressed {
		return nil, fmt.Errorf("archive of %d bytes, more than %d: %w", desc.Size, maxCompressed, errdefs.ErrInvalidArgument)
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	if tail, ok := archive.TailOf(desc.Annotations, desc.Size); ok && tail.Out <= maxArchive {
		a, err := f.fetchPart(ctx, fetcher, desc, tail, archive.OpenTail, manifest)
		if err == nil || ctx.Err() != nil {
			return a, err
		}
		log.G(ctx).WithError(err).WithField("digest", desc.Digest).Info("a part of an archive cannot be fetched; fetching all of it")
	}
	return f.fetchPart(ctx, fetcher, desc, archive.Tail{Digest: desc.Digest}, archive.Open, manifest)
}

// fetchPart downloads a part of an archive into a file without a name, which is
// gone as soon as nobody has it open.
func (f *Finder) fetchPart(
	ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor, part archive.Tail,
	open func(io.ReaderAt, int64) (*archive.Archive, error), manifest digest.Digest,
) (_ *archive.Archive, err error) {
	rc, err := fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	if part.In > 0 {
		s, ok := rc.(io.Seeker)
		if !ok {
			return nil, errdefs.ErrNotImplemented
		}
		if _, err := s.Seek(part.In, io.SeekStart); err != nil {
			return nil, err
		}
	}
	tmp, err := os.CreateTemp(f.opts.Dir, ".download-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			tmp.Close()
		}
	}()
	if err := os.Remove(tmp.Name()); err != nil {
		return nil, err
	}
	size, err := decompress(tmp, io.LimitReader(rc, desc.Size-part.In), part)
	if err != nil {
		return nil, err
	}
	a, err := open(tmp, size)
	if err != nil {
		return nil, err
	}
	if got := a.Info().Descriptor.Digest; got != manifest {
		return nil, fmt.Errorf("archive is of image %s: %w", got, errdefs.ErrInvalidArgument)
	}
	return a, nil
}

// decompress writes the part of an archive that rc delivers to the place in f
// where it belongs, checks it, and returns the size of the archive.
func decompress(f *os.File, rc io.Reader, part archive.Tail) (int64, error) {
	verifier := part.Digest.Verifier()
	compressed := io.TeeReader(rc, verifier)
	dec, err := zstd.NewReader(compressed, zstd.WithDecoderMaxWindow(64<<20), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return 0, err
	}
	defer dec.Close()
	n, err := io.Copy(io.NewOffsetWriter(f, part.Out), io.LimitReader(dec, maxArchive-part.Out+1))
	if err != nil {
		return 0, err
	}
	size := part.Out + n
	if size > maxArchive {
		return 0, fmt.Errorf("archive expands to more than %d bytes: %w", int64(maxArchive), errdefs.ErrInvalidArgument)
	}
	if _, err := io.Copy(io.Discard, compressed); err != nil {
		return 0, err
	}
	if !verifier.Verified() {
		return 0, fmt.Errorf("content does not match digest %s: %w", part.Digest, errdefs.ErrDataLoss)
	}
	return size, nil
}

// Close ends all searches and forgets everything.
func (f *Finder) Close() {
	f.mu.Lock()
	known := maps.Clone(f.known)
	f.mu.Unlock()
	for manifest, r := range known {
		r.cancel()
		<-r.done
		f.forget(manifest, r)
	}
}
