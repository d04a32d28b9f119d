package remote

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	cliconfig "github.com/docker/cli/cli/config"
)

// authorizer has the credentials for one host, and the tokens that they were
// exchanged for: one per scope, which is to say per repository. It implements
// docker.Authorizer. Beyond containerd's own it renews what the host refuses,
// remembers no failure, and goes on without credentials that are no good.
type authorizer struct {
	scheme, host string
	logins       func(host, repository string) ([]Login, error) // the best first
	patience     time.Duration                                  // with a token server

	mu         sync.Mutex // guards the fields below
	client     *http.Client
	challenges map[string]challenge // by scope
	general    *challenge           // holds for scopes that were not asked for yet
	grants     map[string]*grant    // by scope
	refused    map[string][]string  // by scope: passwords that the host does not take, as it was shown them
}

// Login is what a registry gives tokens for. Without a user the secret is an
// identity token.
type Login struct{ User, Secret string }

// challenge is what a host wants to see.
type challenge struct {
	basic  bool
	params map[string]string
}

// grant is the value of an Authorization header, or the way to it.
type grant struct {
	done  chan struct{}
	value string    // valid after done
	until time.Time // valid after done; zero for ever
	err   error     // valid after done
}

// Bounds on token servers.
const (
	maxToken     = 1 << 20          // bytes of an answer
	shortestLife = 60 * time.Second // of a token that does not say, as the token specification has it
)

func newAuthorizer(scheme, host string, logins func(host, repository string) ([]Login, error), patience time.Duration) *authorizer {
	return &authorizer{
		scheme: scheme, host: host, logins: logins, patience: patience,
		challenges: map[string]challenge{}, grants: map[string]*grant{}, refused: map[string][]string{},
	}
}

// use sets what tokens are fetched through.
func (a *authorizer) use(transport http.RoundTripper) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.client = &http.Client{
		Transport: limited{transport},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if req.URL.Scheme != via[0].URL.Scheme || req.URL.Host != via[0].URL.Host || len(via) > maxRedirects {
				return fmt.Errorf("token server %s redirects elsewhere; credentials are not sent there", via[0].URL.Host)
			}
			return nil
		},
	}
}

// limited bounds the bodies of answers.
type limited struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (l limited) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := l.RoundTripper.RoundTrip(req)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxToken), resp.Body}
	}
	return resp, err
}

// repositoryOf returns the repository that a request is about, or "".
func repositoryOf(ctx context.Context) string {
	for _, scope := range docker.GetTokenScopes(ctx, nil) {
		if parts := strings.Split(scope, ":"); len(parts) == 3 && parts[0] == "repository" {
			return parts[1]
		}
	}
	return ""
}

func scopeOf(ctx context.Context) string { return strings.Join(docker.GetTokenScopes(ctx, nil), " ") }

// Authorize implements docker.Authorizer: it adds what the host has asked for
// earlier, if the request is to this host.
func (a *authorizer) Authorize(ctx context.Context, req *http.Request) error {
	if req.URL.Scheme != a.scheme || req.URL.Host != a.host {
		return nil
	}
	g := a.grantFor(ctx)
	if g == nil {
		return nil
	}
	select {
	case <-g.done:
	case <-ctx.Done():
		return fmt.Errorf("credentials for %s: %w", a.host, context.Cause(ctx))
	}
	if g.err != nil {
		return g.err
	}
	req.Header.Set("Authorization", g.value)
	return nil
}

// grantFor returns the grant for the scope of ctx, on its way perhaps, or nil
// if the host never asked for one.
func (a *authorizer) grantFor(ctx context.Context) *grant {
	scope := scopeOf(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	if g := a.grants[scope]; g != nil && g.usable() {
		return g
	}
	ch, ok := a.challenges[scope]
	if !ok && a.general != nil {
		ch, ok = *a.general, true
	}
	if !ok {
		return nil
	}
	g := &grant{done: make(chan struct{})}
	put(a.grants, scope, g)
	// It serves everybody who needs it: it outlives the read that is first.
	go a.obtain(context.WithoutCancel(ctx), a.client, scope, ch, g)
	return g
}

func (g *grant) usable() bool {
	select {
	case <-g.done:
		return g.until.IsZero() || time.Now().Before(g.until)
	default:
		return true
	}
}

func (a *authorizer) obtain(ctx context.Context, client *http.Client, scope string, ch challenge, g *grant) {
	ctx, cancel := context.WithTimeout(ctx, a.patience)
	defer cancel()
	g.value, g.until, g.err = a.exchange(ctx, client, ch)
	if g.err != nil {
		g.err = newCredentialsError(a.host, g.err)
		a.mu.Lock()
		if a.grants[scope] == g {
			delete(a.grants, scope)
		}
		a.mu.Unlock()
	}
	close(g.done)
}

// exchange answers a challenge.
func (a *authorizer) exchange(ctx context.Context, client *http.Client, ch challenge) (value string, until time.Time, err error) {
	logins, err := a.logins(a.host, repositoryOf(ctx))
	if err != nil {
		return "", until, err
	}
	if ch.basic {
		value, err = a.password(scopeOf(ctx), logins)
		return value, until, err
	}
	var first error
	// A login that has ended need not keep anybody from what is public.
	for _, l := range append(slices.Clip(logins), Login{}) {
		opts, err := tokenOptions(ctx, a.host, l, ch)
		if err != nil {
			return "", until, err
		}
		token, life, err := fetchToken(ctx, client, opts)
		if err == nil {
			// Renewed a little early: clocks differ, and requests take time.
			return "Bearer " + token, time.Now().Add(life - min(life/10, 10*time.Second)), nil
		}
		if first == nil {
			first = err
		}
		if !refused(err) {
			break
		}
	}
	return "", until, first
}

const basicPrefix = "Basic "

// maxPasswords is how many are tried for one request.
const maxPasswords = 16

// password returns the first login that the host has not refused, as it is shown to
// it. If none is left, the next one who asks begins anew.
func (a *authorizer) password(scope string, logins []Login) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	refused := a.refused[scope]
	for _, l := range logins {
		value := basicPrefix + base64.StdEncoding.EncodeToString([]byte(l.User+":"+l.Secret))
		if l.User != "" && l.Secret != "" && !slices.Contains(refused, value) {
			return value, nil
		}
	}
	delete(a.refused, scope)
	if len(refused) > 0 {
		return "", fmt.Errorf("it refuses them: %w", errdefs.ErrPermissionDenied)
	}
	return "", fmt.Errorf("it asks for a password and docker's config has none: %w", errdefs.ErrPermissionDenied)
}

// shownPassword says whether a request came with a password. There may be another.
func shownPassword(req *http.Request) bool {
	return strings.HasPrefix(req.Header.Get("Authorization"), basicPrefix)
}

func tokenOptions(ctx context.Context, host string, l Login, ch challenge) (auth.TokenOptions, error) {
	opts, err := auth.GenerateTokenOptions(ctx, host, l.User, l.Secret, auth.Challenge{Scheme: auth.BearerAuth, Parameters: ch.params})
	if opts.Scopes == nil {
		opts.Scopes = docker.GetTokenScopes(ctx, nil)
	}
	return opts, err
}

// fetchToken does as docker does: GET with a password, POST with an identity
// token, which has no user.
func fetchToken(ctx context.Context, client *http.Client, opts auth.TokenOptions) (string, time.Duration, error) {
	if opts.Username == "" && opts.Secret != "" {
		answer, err := auth.FetchTokenWithOAuth(ctx, client, nil, "containerd-clip", opts)
		if err != nil {
			return "", 0, err
		}
		return answer.AccessToken, life(answer.ExpiresInSeconds), nil
	}
	answer, err := auth.FetchToken(ctx, client, nil, opts)
	if err != nil {
		return "", 0, err
	}
	return answer.Token, life(answer.ExpiresInSeconds), nil
}

func life(seconds int) time.Duration {
	const day = 24 * 3600
	return max(time.Duration(min(seconds, day))*time.Second, shortestLife)
}

// AddResponses implements docker.Authorizer: it learns from the last answer,
// which is a 401, what the host wants. It fails if asking again is of no use.
func (a *authorizer) AddResponses(ctx context.Context, answers []*http.Response) error {
	last := answers[len(answers)-1]
	if len(answers) > 1 && answers[len(answers)-2].StatusCode == last.StatusCode && (!shownPassword(last.Request) || len(answers) > maxPasswords) {
		return fmt.Errorf("%s refused the credentials: %w", a.host, errdefs.ErrPermissionDenied)
	}
	ch, err := readChallenge(last)
	if err != nil {
		return fmt.Errorf("%s: %w", a.host, err)
	}
	a.drop(ctx, last.Request)
	scope := scopeOf(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.challenges) >= maxRemembered {
		clear(a.challenges)
		clear(a.grants)
	}
	a.challenges[scope] = ch
	if ch.basic || ch.params["scope"] == scope {
		// The next repository's challenge will be like it: its token can be
		// fetched before it is asked for.
		general := challenge{basic: ch.basic, params: map[string]string{"realm": ch.params["realm"], "service": ch.params["service"]}}
		a.general = &general
	}
	return nil
}

// drop forgets what the host refused in a request, and says whether there was
// anything to refuse.
func (a *authorizer) drop(ctx context.Context, req *http.Request) bool {
	value := req.Header.Get("Authorization")
	if value == "" || req.URL.Host != a.host {
		return false
	}
	scope := scopeOf(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	if shownPassword(req) && !slices.Contains(a.refused[scope], value) {
		put(a.refused, scope, append(a.refused[scope], value))
	}
	if g := a.grants[scope]; g != nil {
		select {
		case <-g.done:
			if g.value == value {
				delete(a.grants, scope)
			}
		default: // somebody else was quicker
		}
	}
	return true
}

// readChallenge returns what a 401 asks for.
func readChallenge(resp *http.Response) (challenge, error) {
	for _, c := range auth.ParseAuthHeader(resp.Header) {
		switch c.Scheme {
		case auth.BasicAuth:
			return challenge{basic: true}, nil
		case auth.BearerAuth:
			realm, err := url.Parse(c.Parameters["realm"])
			if err != nil || realm.Host == "" {
				return challenge{}, errors.New("its token server is no web address")
			}
			if realm.Scheme != "https" && resp.Request.URL.Scheme == "https" {
				return challenge{}, fmt.Errorf("credentials are not sent to its token server %s, which is not https: %w", realm.Host, errdefs.ErrPermissionDenied)
			}
			return challenge{params: c.Parameters}, nil
		}
	}
	return challenge{}, fmt.Errorf("it asks for credentials of a kind that is not known: %w", errdefs.ErrNotImplemented)
}

// credentialsError says that credentials could not be had.
type credentialsError struct {
	host  string
	cause error // without secrets
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
	return &credentialsError{host, redacted(err), kind}
}

// refused says that a token server did not accept the credentials.
func refused(err error) bool {
	status, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err)
	return ok && (status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden || status.StatusCode == http.StatusBadRequest)
}

// dockerHub is the key under which docker's config keeps docker.io's credentials.
const dockerHub = "https://index.docker.io/v1/"

// DockerLogin returns what docker's config file and its helpers have for a
// registry host; it is empty if there is nothing. The file is read anew each
// time: a helper's answer or a new login takes effect without a restart.
func DockerLogin(host string) (Login, error) {
	config, err := cliconfig.Load(cliconfig.Dir())
	if err != nil {
		return Login{}, err
	}
	if host == "docker.io" || host == "registry-1.docker.io" {
		host = dockerHub
	}
	auth, err := config.GetAuthConfig(host)
	if err != nil {
		return Login{}, err
	}
	if auth.IdentityToken != "" {
		return Login{Secret: auth.IdentityToken}, nil
	}
	return Login{User: auth.Username, Secret: auth.Password}, nil
}

// loginsFor returns what there is for a host: what Options.Logins says, and
// then docker's config.
func (c *Client) loginsFor(host, repository string) (logins []Login, err error) {
	if c.opts.Logins != nil {
		logins = c.opts.Logins(host, repository)
	}
	l, err := DockerLogin(host)
	if err != nil && len(logins) == 0 {
		return nil, err
	}
	if l.Secret != "" {
		logins = append(logins, l)
	}
	return logins, nil
}
