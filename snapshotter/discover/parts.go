package discover

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/beam-cloud/containerd-clip/archive"
)

// rangeFetcher is a fetcher that can fetch parts of blobs.
type rangeFetcher interface {
	// FetchRange returns the bytes [off, off+n) of the blob d.
	FetchRange(ctx context.Context, d digest.Digest, off, n int64) (io.ReadCloser, error)
}

// fetchParts fetches of an archive what is read here: first what can be put to use
// alone, and as soon as that begins to come, the spans.
func (f *Finder) fetchParts(ctx context.Context, fetcher rangeFetcher, a Artifact, parts archive.Parts, early Early) (_ *archive.Archive, err error) {
	if err := checkBlob(a.Blob); err != nil {
		return nil, err
	}
	spans, ctx := errgroup.WithContext(ctx)
	rest, err := fetcher.FetchRange(ctx, a.Blob.Digest, parts.Rest.In, a.Blob.Size-parts.Rest.In)
	if err != nil {
		return nil, err
	}
	tmp, err := f.nameless()
	if err != nil {
		rest.Close()
		return nil, err
	}
	late := &lateFile{File: tmp, end: parts.Rest.Out, done: make(chan struct{})}
	spans.Go(func() error { return late.come(fetchSpans(ctx, fetcher, a.Blob.Digest, parts, tmp)) })
	size, err := decompress(rest, a.Blob.Size-parts.Rest.In, parts.Rest.Digest, tmp, parts.Rest.Out)
	var opened *archive.Archive
	if err != nil {
		tmp.Close()
	} else if opened, err = openOf(late, size, a.Subject, archive.OpenTail); err == nil {
		if parts.Windows != (archive.Part{}) {
			opened.WindowsIn(a.Blob.Digest, parts)
		}
		if early != nil {
			late.closed = early(opened)
		}
	}
	if err != nil {
		spans.Go(func() error { return err }) // which ends the other
	}
	if err = spans.Wait(); err != nil && opened != nil {
		opened.Close() // it was only read from
		return nil, err
	}
	return opened, err
}

// fetchSpans writes the part of an archive with the spans to dst.
func fetchSpans(ctx context.Context, fetcher rangeFetcher, blob digest.Digest, parts archive.Parts, dst *os.File) error {
	n := parts.Rest.In - parts.Spans.In
	if n == 0 {
		return nil
	}
	rc, err := fetcher.FetchRange(ctx, blob, parts.Spans.In, n)
	if err != nil {
		return err
	}
	end, err := decompress(rc, n, parts.Spans.Digest, dst, parts.Spans.Out)
	if err == nil && end != parts.Rest.Out {
		err = fmt.Errorf("the part with the spans ends at %d instead of %d: %w", end, parts.Rest.Out, errdefs.ErrInvalidArgument)
	}
	return err
}

// lateFile is a file whose beginning is still to come: who reads there waits.
type lateFile struct {
	*os.File
	end    int64 // of what is to come
	done   chan struct{}
	err    error  // valid after done
	closed func() // nil: nobody needs to know
}

// come says that the beginning has come, or why it does not.
func (l *lateFile) come(err error) error {
	l.err = err
	close(l.done)
	return err
}

// ReadAt implements io.ReaderAt.
func (l *lateFile) ReadAt(p []byte, off int64) (int, error) {
	if off < l.end {
		if <-l.done; l.err != nil {
			return 0, l.err
		}
	}
	return l.File.ReadAt(p, off)
}

// Close implements io.Closer.
func (l *lateFile) Close() error {
	if l.closed != nil {
		l.closed()
	}
	return l.File.Close()
}
