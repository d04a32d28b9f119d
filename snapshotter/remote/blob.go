package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Retrying: the pause between two rounds over the candidates doubles and is
// jittered. Who sends so many answers that are no answers is asked no more.
const (
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second
	maxWrong   = 3
)

// Open returns the bytes [off, off+n) of the blob d. Each source is an image
// reference whose repository should hold the blob. They are asked in order,
// and again after a pause, until the bytes have come, ctx ends or nothing has
// arrived for Options.GiveUp; right after a read that has given up the next one
// is quicker to do so. The caller closes the reader, which is a *Reader.
//
// The error is errdefs.ErrNotFound, ErrPermissionDenied or ErrOutOfRange if
// every candidate has refused, ErrUnavailable or ErrDataLoss otherwise, and
// has the cause of ctx in it if that has ended.
func (c *Client) Open(ctx context.Context, sources []string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	return c.openRange(ctx, sources, d, off, n, false)
}

// openRange is Open; partly refuses hosts that send the whole blob.
func (c *Client) openRange(ctx context.Context, sources []string, d digest.Digest, off, n int64, partly bool) (io.ReadCloser, error) {
	if len(sources) == 0 {
		return nil, fmt.Errorf("blob %s: no repository is known to hold it: %w", d, errdefs.ErrNotFound)
	}
	if off < 0 || n <= 0 || off+n < off {
		return nil, fmt.Errorf("blob %s: range of %d bytes at %d: %w", d, n, off, errdefs.ErrInvalidArgument)
	}
	r := &Reader{client: c, ctx: ctx, digest: d, off: off, end: off + n, partly: partly, pause: firstPause, until: time.Now().Add(c.opts.GiveUp)}
	if r.hasty = c.isHopeless(d); r.hasty {
		r.until = time.Now().Add(min(c.opts.GiveUp, c.opts.SilenceTimeout/5))
	}
	var failed []error
	for _, source := range sources {
		if err := r.addSource(source); err != nil {
			failed = append(failed, err)
		}
	}
	if len(r.candidates) == 0 {
		return nil, r.wrap(joined(failed))
	}
	if err := r.connect(); err != nil {
		return nil, err
	}
	return r, nil
}

// Reader reads a range of a blob. What breaks off is fetched anew from where
// it broke off, from the next candidate that has it. It is not safe for
// concurrent use.
type Reader struct {
	client   *Client
	ctx      context.Context // of Open; an io.Reader has no other place for it
	digest   digest.Digest
	off, end int64 // what is still to come
	partly   bool  // hosts that send the whole blob are of no use

	candidates []*candidate
	body       *body         // nil between two
	from       *candidate    // whom body is from
	until      time.Time     // when to give up
	hasty      bool          // another read of the blob has just given up
	got        int64         // bytes of body so far
	pause      time.Duration // before the next round
	fruitless  int           // bodies since the last that brought something
	broke      error         // how the last of them ended; nil if it was short
	err        error         // final
}

// candidate is one host of one source, during one read.
type candidate struct {
	place  place
	url    *url.URL
	scope  string // of tokens
	auth   *authorizer
	served bool  // bytes of the read are from it
	wrong  int   // its answers that were no answers, since it last brought something
	final  bool  // it has refused
	last   error // what it failed with last, when it was asked and ctx had not ended

	transport http.RoundTripper
}

// addSource adds the hosts of a source.
func (r *Reader) addSource(source string) error {
	spec, err := reference.Parse(source)
	if err != nil {
		return fmt.Errorf("source %q: %w", source, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	registry := spec.Hostname()
	repo := strings.TrimPrefix(spec.Locator, registry+"/")
	scope, err := docker.RepositoryScope(spec, false)
	if err != nil {
		return fmt.Errorf("source %q: %w", source, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	hosts, err := r.client.hostsOf(registry)
	if err != nil {
		return err
	}
	usable := false
	for _, host := range hosts {
		if !host.Capabilities.Has(docker.HostCapabilityPull) {
			continue
		}
		usable = true
		u := &url.URL{Scheme: host.Scheme, Host: host.Host, Path: path.Join("/", host.Path, repo, "blobs", r.digest.String())}
		if isMirror(host, registry) {
			u.RawQuery = url.Values{"ns": {registry}}.Encode()
		}
		c := &candidate{
			place: place{u.Scheme, u.Host, u.Path, r.digest},
			url:   u, scope: scope, auth: host.Authorizer.(*authorizer),
			transport: host.Client.Transport.(redirecting).hostTransport,
		}
		if !slices.ContainsFunc(r.candidates, func(o *candidate) bool { return o.place == c.place }) {
			r.candidates = append(r.candidates, c)
		}
	}
	if !usable {
		return fmt.Errorf("no host of %s may be pulled from: %w", registry, errdefs.ErrNotFound)
	}
	return nil
}

// Read implements io.Reader. It returns nothing, and no error, whenever something
// arrived that comes before what it reads: of hosts that do not know ranges.
func (r *Reader) Read(p []byte) (int, error) {
	for r.err == nil {
		if r.off == r.end {
			return 0, io.EOF
		}
		if r.body == nil {
			if err := r.connect(); err != nil {
				r.err = err
				break
			}
		}
		if n, skipped := r.readBody(p); n > 0 || skipped || len(p) == 0 {
			return n, nil
		}
	}
	return 0, r.err
}

// fruitful is how many bytes a body must have brought before it breaks off for
// that to be progress rather than a failure.
const fruitful = 4 << 10

func (r *Reader) readBody(p []byte) (n int, skipped bool) {
	before := r.body.skip
	n, err := r.body.Read(p)
	skipped = r.body.skip < before
	r.off += int64(n)
	r.got += int64(n)
	// To skip is progress only until it was in vain once.
	if n > 0 && r.got >= fruitful || skipped && r.fruitless == 0 {
		r.hasty = false
		r.until = time.Now().Add(r.client.opts.GiveUp)
	}
	r.from.served = r.from.served || n > 0
	if err != nil || r.body.n == 0 {
		r.drop()
		if r.got >= fruitful || r.off == r.end {
			r.fruitless, r.pause, r.from.wrong = 0, firstPause, 0
		} else {
			r.fruitless++
			r.broke = err
		}
	}
	return n, skipped
}

// Widen has the reader deliver the bytes [off, end) of the blob instead, if all of
// it is being sent because nobody sends a part: what comes before the range that was
// asked for, and after it, costs nothing more. It is for a reader that nothing was
// read from yet, and returns false if it changed nothing.
func (r *Reader) Widen(off, end int64) bool {
	if r.body == nil || !r.body.whole {
		return false
	}
	r.off, r.end = off, end
	r.body.skip, r.body.n = off, end-off
	return true
}

// Host returns who delivers, or has delivered last; "" if nobody has yet.
func (r *Reader) Host() string {
	if r.from == nil {
		return ""
	}
	return r.from.url.Host
}

// Close implements io.Closer.
func (r *Reader) Close() error {
	r.drop()
	return nil
}

func (r *Reader) drop() {
	if r.body != nil {
		r.body.close()
		r.body = nil
	}
}

// Blame says that what was read is not the blob. Whoever sent it is asked last
// for a while. A read that has failed itself is nobody's fault.
func (r *Reader) Blame() {
	if r.err != nil {
		return
	}
	for _, c := range r.candidates {
		if c.served {
			r.client.avoid(c.place)
		}
	}
}

// connect sets r.body.
func (r *Reader) connect() error {
	if r.fruitless >= len(r.candidates) {
		if err := r.sleep(r.nextPause(), r.broke); err != nil {
			return err
		}
	}
	for {
		wait := r.round()
		if r.body != nil {
			r.got = 0
			return nil
		}
		if wait < 0 {
			return r.wrap(r.failures())
		}
		if err := r.sleep(wait, r.failures()); err != nil {
			return err
		}
	}
}

// sleep waits before another try, if there is time for one. It returns an
// error that says what went wrong in the last one.
func (r *Reader) sleep(wait time.Duration, failed error) error {
	if failed == nil {
		failed = fmt.Errorf("answers are too short to be of use: %w", errdefs.ErrUnavailable)
	}
	until := r.until
	if deadline, ok := r.ctx.Deadline(); ok && deadline.Before(until) {
		until = deadline
	}
	if r.ctx.Err() == nil && time.Until(until) < wait {
		if !r.hasty && until == r.until {
			r.client.gaveUp(r.digest)
		}
		return r.wrap(fmt.Errorf("no time is left for another try: %w: %w", failed, errdefs.ErrUnavailable))
	}
	select {
	case <-time.After(wait):
		return nil
	case <-r.ctx.Done():
		return r.wrap(fmt.Errorf("%w: %w: %w", context.Cause(r.ctx), failed, errdefs.ErrUnavailable))
	}
}

func (r *Reader) nextPause() time.Duration {
	pause := jitter(r.pause)
	r.pause = min(2*r.pause, maxPause)
	return pause
}

// round asks the candidates that have not refused, best first, until one has
// the bytes. It returns how long to wait before the next round, -1 if that
// would be of no use.
func (r *Reader) round() time.Duration {
	last := map[*candidate]error{}
	var broken, whole []*candidate // asked if nobody better may answer
	hope := false
	try := func(c *candidate, force, drain bool) bool {
		err := r.try(c, force, drain)
		if err == nil {
			return true
		}
		last[c] = err
		var later *unavailable
		switch {
		case errors.Is(err, errWhole) && !r.partly:
			whole = append(whole, c)
		case errors.As(err, &later) && !later.refused && !force:
			broken = append(broken, c)
		case !c.final:
			hope = true
		}
		return false
	}
	ranked := r.ranked()
	for i, c := range ranked {
		if try(c, false, i == len(ranked)-1) {
			return 0
		}
	}
	for _, c := range whole {
		if try(c, true, true) {
			return 0
		}
	}
	for _, c := range broken {
		if !hope && try(c, true, true) {
			return 0
		}
	}
	return r.nextWait(last)
}

// nextWait is how long to wait after a round in which nobody answered.
func (r *Reader) nextWait(last map[*candidate]error) time.Duration {
	if !slices.ContainsFunc(r.candidates, func(c *candidate) bool { return !c.final }) {
		return -1
	}
	wait := r.nextPause()
	var soonest time.Duration = -1
	for c, err := range last {
		var later *unavailable
		if c.final {
			continue
		}
		if !errors.As(err, &later) || !later.refused {
			return wait
		}
		if d := time.Until(later.until); soonest < 0 || d < soonest {
			soonest = d
		}
	}
	return max(wait, soonest)
}

// ranked returns the candidates that have not refused, best first.
func (r *Reader) ranked() []*candidate {
	var all []*candidate
	rank := map[*candidate]int{}
	for _, c := range r.candidates {
		if !c.final {
			rank[c] = r.client.rank(c.place)
			all = append(all, c)
		}
	}
	slices.SortStableFunc(all, func(a, b *candidate) int { return rank[a] - rank[b] })
	return all
}

// try asks one candidate.
func (r *Reader) try(c *candidate, force, drain bool) error {
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	drain = !r.partly && (drain || r.client.rank(c.place) == 2)
	ctx := docker.WithScope(r.ctx, c.scope)
	b, err := r.client.open(ctx, query{candidate: c, off: r.off, end: r.end, until: r.until, force: force, drain: drain})
	if err == nil {
		r.body, r.from = b, c
		if c != r.candidates[0] {
			r.client.prefer(c.place)
		}
		return nil
	}
	if _, unasked := errors.AsType[*unavailable](err); c.last == nil || !unasked && r.ctx.Err() == nil {
		c.last = err
	}
	switch {
	case r.partly && errors.Is(err, errWhole):
		c.final = true
	case errdefs.IsDataLoss(err):
		if c.wrong++; c.wrong == maxWrong {
			c.final = true
		}
		r.client.avoid(c.place)
	case !errdefs.IsUnavailable(err) && !errdefs.IsResourceExhausted(err) && r.ctx.Err() == nil:
		c.final = true
	}
	return err
}

// failures puts the last error of each candidate into one.
func (r *Reader) failures() error {
	var all []error
	for _, c := range r.candidates {
		if c.last != nil {
			all = append(all, c.last)
		}
	}
	if len(all) == 0 {
		return errUnasked
	}
	return joined(all)
}

// errUnasked is the error of a read that had ended before it began.
var errUnasked = fmt.Errorf("nobody was asked: %w", errdefs.ErrUnavailable)

func (r *Reader) wrap(err error) error {
	return fmt.Errorf("blob %s [%d, %d): %w", r.digest, r.off, r.end, err)
}

// joined is errors.Join on one line.
func joined(errs []error) error {
	err := errs[0]
	for _, next := range errs[1:] {
		err = fmt.Errorf("%w; %w", err, next)
	}
	return err
}
