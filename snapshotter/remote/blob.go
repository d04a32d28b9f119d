package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Retrying: rounds over all sources, with a doubling and jittered pause between.
const (
	rounds     = 5
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second
)

// Open returns the bytes [off, off+n) of the blob d. Each source is an image
// reference whose repository should hold the blob; they are asked in order,
// again after a pause if none answers, until ctx ends. The caller closes the
// reader, which yields exactly n bytes or an error.
func (c *Client) Open(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	if len(sources) == 0 {
		return nil, fmt.Errorf("blob %s: no repository is known to hold it: %w", d, errdefs.ErrNotFound)
	}
	pause := firstPause
	for round := 1; ; round++ {
		var failed []error
		for _, source := range sources {
			rc, err := c.openSource(ctx, source, d, off, n)
			if err == nil {
				return rc, nil
			}
			failed = append(failed, err)
		}
		err := fmt.Errorf("blob %s [%d, %d): %w", d, off, off+n, joined(failed))
		if round == rounds || permanent(failed) {
			return nil, err
		}
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		}
		pause = min(2*pause, maxPause)
	}
}

// permanent says that asking again is of no use: every answer was a refusal.
func permanent(errs []error) bool {
	for _, err := range errs {
		if errdefs.IsUnavailable(err) || errdefs.IsResourceExhausted(err) || errdefs.IsDataLoss(err) {
			return false
		}
	}
	return true
}

// openSource asks the hosts of one source, once more if what they refuse are
// credentials kept from an earlier read: tokens end before their time.
func (c *Client) openSource(ctx context.Context, source string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	spec, err := reference.Parse(source)
	if err != nil {
		return nil, fmt.Errorf("source %q: %w", source, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	registry := spec.Hostname()
	q := query{registry: registry, repo: strings.TrimPrefix(spec.Locator, registry+"/"), digest: d, off: off, n: n}
	ctx, err = docker.ContextWithRepositoryScope(ctx, spec, false)
	if err != nil {
		return nil, err
	}
	hosts, kept, err := c.hostsOf(registry)
	if err != nil {
		return nil, err
	}
	rc, stale, err := q.ask(ctx, hosts)
	if !stale {
		return rc, err
	}
	c.forget(registry, hosts)
	if err == nil || !kept {
		return rc, err
	}
	if hosts, _, err = c.hostsOf(registry); err != nil {
		return nil, err
	}
	if rc, stale, err = q.ask(ctx, hosts); stale {
		c.forget(registry, hosts)
	}
	return rc, err
}

// query is one range of a blob in a repository.
type query struct {
	registry, repo string
	digest         digest.Digest
	off, n         int64
}

// ask asks hosts in order and says whether one did not accept the credentials.
func (q query) ask(ctx context.Context, hosts []docker.RegistryHost) (_ io.ReadCloser, stale bool, _ error) {
	var failed []error
	for _, host := range hosts {
		if !host.Capabilities.Has(docker.HostCapabilityPull) {
			continue
		}
		rc, err := q.get(ctx, host)
		if err == nil {
			return rc, stale, nil
		}
		var c *credentialsError
		stale = stale || errors.As(err, &c) || errdefs.IsPermissionDenied(err)
		failed = append(failed, err)
	}
	if len(failed) == 0 {
		return nil, false, fmt.Errorf("no host of %s may be pulled from: %w", q.registry, errdefs.ErrNotFound)
	}
	return nil, stale, joined(failed)
}

// credentialsError says that credentials could not be had. An authorizer
// remembers it: it must not be used again.
type credentialsError struct {
	host  string
	cause error
	kind  error // of errdefs
}

func (e *credentialsError) Error() string {
	return fmt.Sprintf("credentials for %s: %v", e.host, e.cause)
}
func (e *credentialsError) Unwrap() []error { return []error{e.cause, e.kind} }

func newCredentialsError(host string, err error) error {
	kind := error(errdefs.ErrPermissionDenied)
	status, answered := errors.AsType[remoteerrors.ErrUnexpectedStatus](err)
	_, unreachable := errors.AsType[*url.Error](err)
	switch {
	case answered && status.StatusCode == http.StatusTooManyRequests:
		kind = errdefs.ErrResourceExhausted
	case answered && status.StatusCode >= http.StatusInternalServerError, unreachable:
		kind = errdefs.ErrUnavailable
	}
	return &credentialsError{host, err, kind}
}

// joined is errors.Join on one line.
func joined(errs []error) error {
	err := errs[0]
	for _, next := range errs[1:] {
		err = fmt.Errorf("%w; %w", err, next)
	}
	return err
}

// get sends one ranged request to host, once more after a 401 it can answer.
func (q query) get(ctx context.Context, host docker.RegistryHost) (io.ReadCloser, error) {
	u := url.URL{Scheme: host.Scheme, Host: host.Host, Path: path.Join(host.Path, q.repo, "blobs", q.digest.String())}
	if isMirror(host, q.registry) {
		u.RawQuery = url.Values{"ns": {q.registry}}.Encode()
	}
	var answers []*http.Response
	for range 2 {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return nil, err
		}
		for key, values := range host.Header {
			req.Header[key] = append([]string(nil), values...)
		}
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", q.off, q.off+q.n-1))
		req.Header.Set("Accept-Encoding", "identity")
		if host.Authorizer != nil {
			if err := host.Authorizer.Authorize(ctx, req); err != nil {
				return nil, newCredentialsError(host.Host, err)
			}
		}
		resp, err := host.Client.Do(req)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
		}
		if resp.StatusCode != http.StatusUnauthorized || host.Authorizer == nil {
			return body(resp, q.off, q.n)
		}
		resp.Body.Close()
		answers = append(answers, resp)
		if err := host.Authorizer.AddResponses(ctx, answers); err != nil {
			return nil, fmt.Errorf("%s refused the credentials: %w (%w)", host.Host, err, errdefs.ErrPermissionDenied)
		}
	}
	return nil, fmt.Errorf("%s refused the credentials: %w", host.Host, errdefs.ErrPermissionDenied)
}

// body turns an answer into the bytes that were asked for.
func body(resp *http.Response, off, n int64) (io.ReadCloser, error) {
	switch resp.StatusCode {
	case http.StatusPartialContent:
		var first, last int64
		rng := resp.Header.Get("Content-Range") // its total may be "*", see RFC 9110
		if _, err := fmt.Sscanf(rng, "bytes %d-%d/", &first, &last); err != nil || first != off || last != off+n-1 {
			resp.Body.Close()
			return nil, fmt.Errorf("%s answered with range %q instead of [%d, %d): %w", resp.Request.URL.Host, rng, off, off+n, errdefs.ErrDataLoss)
		}
	case http.StatusOK: // the host ignores ranges and sends the whole blob
		if _, err := io.CopyN(io.Discard, resp.Body, off); err != nil {
			resp.Body.Close()
			return nil, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
		}
	default:
		resp.Body.Close()
		return nil, fmt.Errorf("%s answered %q: %w", resp.Request.URL.Host, resp.Status, statusKind(resp.StatusCode))
	}
	return &exactly{resp.Body, n}, nil
}

func statusKind(code int) error {
	switch code {
	case http.StatusNotFound, http.StatusGone:
		return errdefs.ErrNotFound
	case http.StatusUnauthorized, http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case http.StatusRequestedRangeNotSatisfiable:
		return errdefs.ErrOutOfRange
	case http.StatusTooManyRequests:
		return errdefs.ErrResourceExhausted
	}
	return errdefs.ErrUnavailable
}

// exactly yields n bytes, then io.EOF, and calls an earlier end an error.
type exactly struct {
	io.ReadCloser
	n int64
}

func (e *exactly) Read(p []byte) (int, error) {
	if e.n == 0 {
		return 0, io.EOF
	}
	n, err := e.ReadCloser.Read(p[:min(int64(len(p)), e.n)])
	e.n -= int64(n)
	switch {
	case err != nil && e.n == 0:
		err = io.EOF
	case errors.Is(err, io.EOF):
		err = fmt.Errorf("answer ended %d bytes early: %w", e.n, errdefs.ErrUnavailable)
	}
	return n, err
}
