package discover

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/beam-cloud/containerd-clip/archive"
)

// Artifact is an archive in a registry.
type Artifact struct {
	Manifest ocispec.Descriptor // the artifact's own manifest
	Blob     ocispec.Descriptor // the zstd'ed archive
	Subject  digest.Digest      // manifest that the archive is of
	revision uint64             // see archive.AnnotationRevision; 0 if it does not say
	created  time.Time          // zero if it does not say; archives with a prefetch list do
}

// findLinked fetches the archive that the image names.
func (f *Finder) findLinked(ctx context.Context, want wanted, image Image) (*archive.Archive, error) {
	ctx, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	fetcher, err := f.opts.Fetcher(ctx, image.Ref)
	if err != nil {
		return nil, err
	}
	a, err := Linked(ctx, fetcher, image.Link)
	if err != nil {
		return nil, fmt.Errorf("archive %s: %w", image.Link, err)
	}
	opened, err := f.download(ctx, fetcher, a, want)
	if err != nil {
		return nil, fmt.Errorf("archive %s: %w", image.Link, err)
	}
	return opened, nil
}

// findReferrer takes the newest archive that refers to the manifest and is usable.
func (f *Finder) findReferrer(ctx context.Context, want wanted, ref string, manifest digest.Digest) (*archive.Archive, error) {
	ctx, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	fetcher, err := f.opts.Fetcher(ctx, ref)
	if err != nil {
		return nil, err
	}
	found, err := Referrers(ctx, fetcher, manifest)
	for _, a := range found {
		opened, failed := f.download(ctx, fetcher, a, want)
		if failed == nil {
			return opened, nil
		}
		if failed = ignore(ctx, a.Manifest.Digest, failed); !errors.Is(err, archive.ErrVersion) {
			err = failed // unless one that a newer program wrote is the reason already
		}
	}
	return nil, err
}

// download fetches an archive: the parts of it that are read here if those can be
// had alone.
func (f *Finder) download(ctx context.Context, fetcher remotes.Fetcher, a Artifact, want wanted) (*archive.Archive, error) {
	parts, ok := archive.PartsOf(a.Blob.Annotations, a.Blob.Size)
	if ranges, can := fetcher.(rangeFetcher); ok && can && !want.whole {
		opened, err := f.fetchParts(ctx, ranges, a, parts, want.early)
		if err == nil || ctx.Err() != nil {
			return opened, err
		}
		log.G(ctx).WithError(err).WithField("digest", a.Blob.Digest).Info("a part of an archive cannot be fetched; fetching all of it")
	}
	tmp, err := f.nameless()
	if err != nil {
		return nil, err
	}
	return Download(ctx, fetcher, a, tmp)
}

// nameless makes a file that is gone as soon as nobody has it open.
func (f *Finder) nameless() (*os.File, error) {
	tmp, err := os.CreateTemp(f.opts.Dir, ".download-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(tmp.Name()); err != nil {
		tmp.Close()
		return nil, err
	}
	return tmp, nil
}

// Linked reads the artifact that an image names.
func Linked(ctx context.Context, fetcher remotes.Fetcher, link digest.Digest) (Artifact, error) {
	// Its size is not known: the most that is read takes the size's place.
	return readArtifact(ctx, fetcher, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: link, Size: maxManifest})
}

// Referrers asks the registry which archives refer to the manifest, and returns
// them newest first. There is an error if there is none; what cannot be used is
// logged and left out.
func Referrers(ctx context.Context, fetcher remotes.Fetcher, manifest digest.Digest) ([]Artifact, error) {
	lister, ok := fetcher.(remotes.ReferrersFetcher)
	if !ok {
		return nil, fmt.Errorf("referrers of %s: %w", manifest, errdefs.ErrNotImplemented)
	}
	listed, err := lister.FetchReferrers(ctx, manifest, remotes.WithReferrerArtifactTypes(archive.ArtifactType))
	if err != nil {
		return nil, fmt.Errorf("asking for archives that refer to %s: %w", manifest, err)
	}
	err = fmt.Errorf("the registry has no archive that refers to %s: %w", manifest, errdefs.ErrNotFound)
	var found []Artifact
	for _, desc := range listed[:min(len(listed), maxReferrers)] {
		a, failed := readArtifact(ctx, fetcher, desc)
		if failed == nil && a.Subject != manifest {
			failed = fmt.Errorf("it does not refer to %s: %w", manifest, errdefs.ErrInvalidArgument)
		}
		if failed != nil {
			err = ignore(ctx, desc.Digest, failed)
			continue
		}
		found = append(found, a)
	}
	// The order in a registry means nothing, and all nodes should agree.
	slices.SortFunc(found, func(a, b Artifact) int {
		return cmp.Or(b.created.Compare(a.created), cmp.Compare(b.revision, a.revision), cmp.Compare(a.Manifest.Digest, b.Manifest.Digest))
	})
	return found, err
}

func ignore(ctx context.Context, id digest.Digest, err error) error {
	log.G(ctx).WithError(err).WithField("digest", id).Warn("ignoring an archive that refers to the image")
	return fmt.Errorf("archive %s: %w", id, err)
}

// readArtifact fetches the manifest of the artifact desc.
func readArtifact(ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor) (a Artifact, err error) {
	raw, err := fetchSmall(ctx, fetcher, desc)
	if err != nil {
		return a, err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return a, fmt.Errorf("manifest: %w", err)
	}
	a.Manifest = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: m.ArtifactType, Digest: desc.Digest, Size: int64(len(raw))}
	if m.Subject != nil {
		a.Subject = m.Subject.Digest
	}
	if created, err := time.Parse(time.RFC3339, m.Annotations[ocispec.AnnotationCreated]); err == nil {
		a.created = created
	}
	for _, l := range m.Layers {
		if l.MediaType == archive.MediaType {
			a.Blob = l
			if revision, err := strconv.ParseUint(l.Annotations[archive.AnnotationRevision], 10, 16); err == nil {
				a.revision = revision
			}
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

// Download writes an archive to the empty file dst and opens it. It takes dst
// over: Close of the archive, or an error, closes it.
func Download(ctx context.Context, fetcher remotes.Fetcher, a Artifact, dst *os.File) (*archive.Archive, error) {
	size, err := downloadBlob(ctx, fetcher, a.Blob, dst)
	if err != nil {
		dst.Close()
		return nil, err
	}
	return openOf(dst, size, a.Subject, archive.Open)
}

func downloadBlob(ctx context.Context, fetcher remotes.Fetcher, blob ocispec.Descriptor, dst *os.File) (int64, error) {
	if err := checkBlob(blob); err != nil {
		return 0, err
	}
	rc, err := fetcher.Fetch(ctx, blob)
	if err != nil {
		return 0, err
	}
	return decompress(rc, blob.Size, blob.Digest, dst, 0)
}

// checkBlob returns an error for a compressed archive that is not to be fetched.
func checkBlob(desc ocispec.Descriptor) error {
	if desc.Size > maxCompressed {
		return fmt.Errorf("archive of %d bytes, more than %d: %w", desc.Size, maxCompressed, errdefs.ErrInvalidArgument)
	}
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	return nil
}

// opener opens an archive in the first bytes of a file.
type opener func(io.ReaderAt, int64) (*archive.Archive, error)

// openOf opens the archive in f, which must be of manifest. It takes f over.
func openOf(f file, size int64, manifest digest.Digest, open opener) (*archive.Archive, error) {
	a, err := open(f, size)
	if err != nil {
		f.Close()
		return nil, err
	}
	if got := a.Info().Descriptor.Digest; got != manifest {
		a.Close()
		return nil, fmt.Errorf("archive is of image %s: %w", got, errdefs.ErrInvalidArgument)
	}
	return a, nil
}

type file interface {
	io.ReaderAt
	io.Closer
}

// decompress writes what the zstd stream rc of n bytes holds to dst, from at on,
// and returns where it ends. It closes rc.
func decompress(rc io.ReadCloser, n int64, want digest.Digest, dst io.WriterAt, at int64) (end int64, err error) {
	defer rc.Close()
	verifier := want.Verifier()
	compressed := io.TeeReader(io.LimitReader(rc, n), verifier)
	dec, err := zstd.NewReader(compressed, zstd.WithDecoderMaxWindow(64<<20), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return 0, err
	}
	defer dec.Close()
	if end, err = copyBounded(dst, at, dec); err != nil {
		return 0, err
	}
	if _, err := io.Copy(io.Discard, compressed); err != nil {
		return 0, err
	}
	if !verifier.Verified() {
		return 0, fmt.Errorf("content does not match digest %s: %w", want, errdefs.ErrDataLoss)
	}
	return end, nil
}

// copyBounded copies the end of an archive to where it belongs in dst, up to the
// largest archive that is read, and returns the archive's size.
func copyBounded(dst io.WriterAt, at int64, src io.Reader) (int64, error) {
	if at > maxArchive {
		return 0, errTooLarge
	}
	n, err := io.Copy(io.NewOffsetWriter(dst, at), io.LimitReader(src, maxArchive-at+1))
	if err == nil && at+n > maxArchive {
		err = errTooLarge
	}
	return at + n, err
}

var errTooLarge = fmt.Errorf("archive has more than %d bytes: %w", int64(maxArchive), errdefs.ErrInvalidArgument)
