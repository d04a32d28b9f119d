package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/containerd/errdefs"
)

// query is the range [off, end) of a blob at a candidate.
type query struct {
	*candidate
	off, end int64
	until    time.Time // when the read gives up
	force    bool      // ask endpoints that failed a moment ago, too
	drain    bool      // read through what lies before off if there is no other way
}

// near is how much of a blob is read through rather than asking somebody else
// who knows ranges.
const near = 1 << 20

// errWhole is returned instead of draining.
var errWhole = fmt.Errorf("it sends the whole blob instead of a range: %w", errdefs.ErrUnavailable)

// errGaveUp ends waits when a read gives up.
var errGaveUp = fmt.Errorf("nothing arrived for too long: %w", errdefs.ErrUnavailable)

// errSilent is the cause of a request's end after too long a silence.
var errSilent = errors.New("no answer in time")

// open returns the bytes from q.off on, up to q.end if the host is willing.
func (c *Client) open(ctx context.Context, q query) (*body, error) {
	if u := c.redirect(q.place); u != nil {
		a, err := c.follow(ctx, q, u)
		if err == nil {
			var b *body
			if b, err = c.body(q, a); err == nil {
				return b, nil
			}
		}
		var status *statusError
		refused := errors.As(err, &status) && status.code/100 == 4 && status.code != http.StatusTooManyRequests
		if ctx.Err() != nil || errors.Is(err, errWhole) || (status != nil && !refused) {
			return nil, err // busy or broken: asking anew leads to the same
		}
		// It was good for some time only, or its storage is gone.
		c.dropRedirect(q.place, u, refused)
	}
	a, err := c.askHost(ctx, q)
	if err != nil {
		return nil, err
	}
	b, err := c.body(q, a)
	if err != nil {
		return nil, err
	}
	if final := a.resp.Request.URL; final.Host != q.url.Host {
		c.keepRedirect(q.place, final)
	}
	return b, nil
}

// askHost asks the host itself, once more if it refuses what it was shown: tokens
// end before their time, and of several passwords one may be right.
func (c *Client) askHost(ctx context.Context, q query) (*answer, error) {
	var answers []*http.Response
	for {
		a, err := c.follow(ctx, q, q.url)
		if err != nil {
			return nil, err
		}
		code := a.resp.StatusCode
		switch {
		case a.ep.host != q.url.Host:
			return a, nil
		case code == http.StatusUnauthorized:
		case code == http.StatusForbidden && (len(answers) == 0 || shownPassword(a.resp.Request) && len(answers) < maxPasswords) && q.auth.drop(ctx, a.resp.Request):
		default:
			return a, nil
		}
		a.finish()
		answers = append(answers, a.resp)
		if code != http.StatusUnauthorized {
			continue
		}
		if err := q.auth.AddResponses(ctx, answers); err != nil {
			return nil, err
		}
	}
}

// follow sends a request and follows its redirects. Credentials go to the host
// they are for alone.
func (c *Client) follow(ctx context.Context, q query, u *url.URL) (*answer, error) {
	for range maxRedirects + 1 {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return nil, redacted(err)
		}
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", q.off, q.end-1))
		req.Header.Set("Accept-Encoding", "identity")
		req.Header.Set("User-Agent", "containerd-clip")
		if err := c.authorize(ctx, q, req); err != nil {
			if errdefs.IsUnavailable(err) {
				c.endpoint(u).failed(ctx, err) // it is as good as dead without its token server
			}
			return nil, err
		}
		a, err := c.send(q, req)
		if err != nil {
			return nil, err
		}
		if !isRedirect(a.resp.StatusCode) {
			return a, nil
		}
		a.finish()
		a.ep.answered()
		if u, err = redirectTarget(u, a.resp.Header.Get("Location")); err != nil {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		}
	}
	return nil, fmt.Errorf("%s: more than %d redirects: %w", q.url.Host, maxRedirects, errdefs.ErrUnavailable)
}

func (c *Client) authorize(ctx context.Context, q query, req *http.Request) error {
	ctx, cancel := context.WithDeadlineCause(ctx, q.until, errGaveUp)
	defer cancel()
	return q.auth.Authorize(ctx, req)
}

// answer is the answer to one request, and what the request holds until close.
type answer struct {
	resp    *http.Response
	ep      *endpoint
	silence *time.Timer // ends the request when it fires
	ctx     context.Context
	cancel  context.CancelCauseFunc
}

// send sends one request to one endpoint and waits for the answer's headers.
func (c *Client) send(q query, req *http.Request) (*answer, error) {
	ep := c.endpoint(req.URL)
	patience, err := ep.admit(c.opts.SilenceTimeout, q.force)
	if err != nil {
		return nil, err
	}
	waiting, cancelWait := context.WithDeadlineCause(req.Context(), q.until, errGaveUp)
	defer cancelWait()
	if err := ep.slots.Acquire(waiting, 1); err != nil {
		return nil, fmt.Errorf("waiting for one of the %d connections to %s: %w", maxPerEndpoint, ep.host, context.Cause(waiting))
	}
	patience = max(0, min(patience, time.Until(q.until)))
	ctx, cancel := context.WithCancelCause(req.Context())
	a := &answer{ep: ep, ctx: ctx, cancel: cancel}
	a.silence = time.AfterFunc(patience, func() { cancel(errSilent) })
	if a.resp, err = q.transport.RoundTrip(req.WithContext(ctx)); err != nil {
		err = a.failure(err)
		a.close()
		return nil, err
	}
	a.silence.Stop()
	return a, nil
}

// failure is what a failed request means: to the endpoint, and as an error.
func (a *answer) failure(err error) error {
	cause := context.Cause(a.ctx)
	switch {
	case errors.Is(cause, context.DeadlineExceeded):
		return fmt.Errorf("%s: %w: %w", a.ep.host, cause, errdefs.ErrUnavailable)
	case cause != nil && !errors.Is(cause, errSilent):
		return fmt.Errorf("%s: %w", a.ep.host, cause) // nobody waits for it any more
	}
	if cause != nil {
		err = cause
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("connection closed") // io.EOF means the end of what is read
	}
	err = fmt.Errorf("%s: %w: %w", a.ep.host, redacted(err), errdefs.ErrUnavailable)
	a.ep.failed(a.ctx, err)
	return err
}

// finish ends a request whose answer's body does not matter. If that is short,
// the connection can be used again.
func (a *answer) finish() {
	a.silence.Reset(time.Second)
	_, _ = io.CopyN(io.Discard, a.resp.Body, 4<<10) // if it fails, the connection goes
	a.close()
}

// close ends the request. What was not read of the body is not: the connection
// goes, which is cheaper.
func (a *answer) close() {
	a.silence.Stop()
	if a.resp != nil {
		a.resp.Body.Close()
	}
	a.cancel(nil)
	a.ep.slots.Release(1)
}

// statusError is an answer without the bytes that were asked for.
type statusError struct {
	host string
	code int
	kind error
}

func (e *statusError) Error() string {
	return fmt.Sprintf("%s answered %d %s", e.host, e.code, http.StatusText(e.code))
}
func (e *statusError) Unwrap() error { return e.kind }

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

// body turns an answer into the bytes that were asked for, or as many as come.
func (c *Client) body(q query, a *answer) (*body, error) {
	b, err := c.checked(q, a)
	var status *statusError
	if errors.As(err, &status) {
		a.finish()
	} else if err != nil {
		a.close()
	}
	return b, err
}

func (c *Client) checked(q query, a *answer) (*body, error) {
	switch code := a.resp.StatusCode; code {
	case http.StatusPartialContent:
		n, err := checkRange(a.resp.Header.Get("Content-Range"), q.off, q.end)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", a.ep.host, err)
		}
		return &body{answer: a, n: n, patience: c.opts.SilenceTimeout}, nil
	case http.StatusOK:
		if length := a.resp.ContentLength; length >= 0 && length < q.end {
			return nil, fmt.Errorf("%s: blob ends at %d, before %d: %w", a.ep.host, length, q.end, errdefs.ErrOutOfRange)
		}
		if q.off > 0 {
			c.noRanges(q.place)
		}
		if q.off > near && !q.drain {
			return nil, fmt.Errorf("%s: %w", a.ep.host, errWhole)
		}
		return &body{answer: a, skip: q.off, n: q.end - q.off, whole: q.drain, patience: c.opts.SilenceTimeout}, nil
	default:
		if code == http.StatusTooManyRequests || code == http.StatusServiceUnavailable {
			a.ep.later(parseRetryAfter(a.resp.Header.Get("Retry-After"), time.Now()))
		}
		err := &statusError{a.ep.host, code, statusKind(code)}
		if code >= http.StatusInternalServerError {
			a.ep.failed(a.ctx, err)
		} else {
			a.ep.answered()
		}
		return nil, err
	}
}

// checkRange returns how many bytes from off on an answer holds, which may be
// fewer than asked for.
func checkRange(header string, off, end int64) (int64, error) {
	first, last, total, err := parseContentRange(header)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if first != off || last >= end {
		return 0, fmt.Errorf("answered with range [%d, %d) instead of [%d, %d): %w", first, last+1, off, end, errdefs.ErrDataLoss)
	}
	if total >= 0 && total < end {
		return 0, fmt.Errorf("blob ends at %d, before %d: %w", total, end, errdefs.ErrOutOfRange)
	}
	return last + 1 - off, nil
}

// body yields the n bytes of an answer, and gives up when they stop coming.
type body struct {
	*answer
	skip     int64 // bytes that come before those that were asked for
	n        int64 // bytes left, without these
	whole    bool  // all of the blob is coming, since nobody sends a range of it
	patience time.Duration
}

// Read implements io.Reader. All errors but the final io.EOF are failures. It
// returns nothing when something was skipped.
func (b *body) Read(p []byte) (int, error) {
	if b.n == 0 {
		return 0, io.EOF
	}
	next := &b.n
	if b.skip > 0 {
		next = &b.skip
	}
	b.silence.Reset(b.patience)
	n, err := b.resp.Body.Read(p[:min(int64(len(p)), *next)])
	b.silence.Stop()
	*next -= int64(n)
	if b.n == 0 {
		b.ep.answered()
		return n, nil
	}
	if next == &b.skip {
		n = 0
	}
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("answer ended %d bytes early", b.skip+b.n)
		}
		err = b.failure(err)
	}
	return n, err
}
