package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Fetcher returns containerd's own fetcher for the repository of ref, which
// reads manifests and lists referrers. It shares connections and tokens with
// the client's reads.
func (c *Client) Fetcher(ctx context.Context, ref string) (remotes.Fetcher, error) {
	f, err := c.resolver().Fetcher(ctx, ref)
	if err != nil {
		return nil, err
	}
	return fetcher{f, c, ref}, nil
}

// Resolve returns what the reference ref names in its registry now.
func (c *Client) Resolve(ctx context.Context, ref string) (ocispec.Descriptor, error) {
	_, desc, err := c.resolver().Resolve(ctx, ref)
	// containerd gives this no kind, so that it looks like any failure.
	if status, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok && status.StatusCode == http.StatusForbidden {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	}
	return desc, redacted(err)
}

// resolver is containerd's, with the hosts first that do not fail.
func (c *Client) resolver() remotes.Resolver {
	hosts := func(registry string) ([]docker.RegistryHost, error) {
		all, err := c.hostsOf(registry)
		var good, open []docker.RegistryHost
		for _, host := range all {
			if c.endpoint(&url.URL{Scheme: host.Scheme, Host: host.Host}).isOpen() {
				open = append(open, host)
			} else {
				good = append(good, host)
			}
		}
		return append(good, open...), err
	}
	return docker.NewResolver(docker.ResolverOptions{Hosts: hosts})
}

// fetcher is containerd's, with errors that hold no secrets.
type fetcher struct {
	remotes.Fetcher
	client *Client
	ref    string
}

// FetchRange returns the bytes [off, off+n) of a blob as Client.Open does, unless
// nobody has a part of it alone.
func (f fetcher) FetchRange(ctx context.Context, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	return f.client.openRange(ctx, []string{f.ref}, d, off, n, true)
}

// Fetch implements remotes.Fetcher.
func (f fetcher) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	desc.URLs = nil // what a registry holds does not decide whom the node asks
	rc, err := f.Fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, redacted(err)
	}
	return fetched{rc}, nil
}

// FetchReferrers implements remotes.ReferrersFetcher, which containerd's
// fetcher does.
func (f fetcher) FetchReferrers(ctx context.Context, d digest.Digest, opts ...remotes.FetchReferrersOpt) ([]ocispec.Descriptor, error) {
	found, err := f.Fetcher.(remotes.ReferrersFetcher).FetchReferrers(ctx, d, opts...)
	return found, redacted(err)
}

// fetched is what Fetch returned; containerd sends requests while it is read.
type fetched struct{ io.ReadCloser }

// Read implements io.Reader.
func (f fetched) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = redacted(err)
	}
	return n, err
}

// redacted returns err with a text in which URLs have neither queries nor
// passwords: a redirect's query is a key to what it leads to.
func redacted(err error) error {
	if err == nil {
		return nil
	}
	text := quotedText.ReplaceAllStringFunc(err.Error(), func(s string) string {
		if !strings.Contains(s, "://") {
			return s
		}
		return `"` + bare(s[1:len(s)-1]) + `"`
	})
	text = plainURL.ReplaceAllStringFunc(text, bare)
	if text == err.Error() {
		return err
	}
	return &redactedError{text, err}
}

var (
	quotedText = regexp.MustCompile(`"(?:[^"\\]|\\.)*"`) // as strconv.Quote has it
	plainURL   = regexp.MustCompile(`[a-zA-Z]+://[^\s"]+`)
)

// bare returns what there is of a URL before its query, without its user.
func bare(raw string) string {
	raw, _, _ = strings.Cut(raw, "?")
	scheme, rest, _ := strings.Cut(raw, "://")
	host, path, slash := strings.Cut(rest, "/")
	host = host[strings.LastIndex(host, "@")+1:]
	if slash {
		host += "/"
	}
	return scheme + "://" + host + path
}

type redactedError struct {
	text string
	err  error
}

func (e *redactedError) Error() string { return e.text }

// Is and As look at what the error is, without a way to print it.
func (e *redactedError) Is(target error) bool { return errors.Is(e.err, target) }
func (e *redactedError) As(target any) bool   { return errors.As(e.err, target) }
