package remote

import (
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestParseContentRange(t *testing.T) {
	for s, want := range map[string][3]int64{
		"bytes 0-0/1":     {0, 0, 1},
		"bytes 10-14/36":  {10, 14, 36},
		"bytes 10-14/*":   {10, 14, -1},
		"bytes 0-9/99999": {0, 9, 99999},
	} {
		first, last, total, err := parseContentRange(s)
		require.NoError(t, err, s)
		require.Equal(t, want, [3]int64{first, last, total}, s)
	}
	for _, s := range []string{"", "bytes", "bytes */36", "bytes 5-4/36", "bytes 0-36/36", "bytes -1-4/36", "bytes +1-4/36", "bytes 1-4", "bytes 1-4/",
		"bytes 1-4/x", "items 1-4/36", "bytes 1-4/36 ", "bytes 0-99999999999999999999/*"} {
		_, _, _, err := parseContentRange(s)
		require.Error(t, err, s)
	}
}

func FuzzParseContentRange(f *testing.F) {
	for _, s := range []string{"bytes 10-14/36", "bytes 0-0/*", "bytes */36", "bytes 9223372036854775807-9223372036854775807/*"} {
		f.Add(s, int64(10), int64(15))
	}
	f.Fuzz(func(t *testing.T, s string, off, end int64) {
		first, last, total, err := parseContentRange(s)
		if err == nil && (first < 0 || last < first || (total != -1 && total <= last)) {
			t.Fatalf("%q: %d-%d/%d", s, first, last, total)
		}
		if off < 0 || end <= off {
			return
		}
		if n, err := checkRange(s, off, end); err == nil && (n < 1 || n > end-off) {
			t.Fatalf("%q: %d bytes of [%d, %d)", s, n, off, end)
		}
	})
}

func TestParseRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for s, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"7":                             7 * time.Second,
		"-7":                            0,
		"soon":                          0,
		"3600":                          maxRetryAfter,
		"99999999999999999999999":       maxRetryAfter,
		"Fri, 02 Jan 2026 03:04:15 GMT": 10 * time.Second,
		"Fri, 02 Jan 2026 03:04:00 GMT": 0,
		"Fri, 02 Jan 2099 03:04:00 GMT": maxRetryAfter,
	} {
		require.Equal(t, want, parseRetryAfter(s, now), s)
	}
}

func FuzzParseRetryAfter(f *testing.F) {
	f.Add("7")
	f.Add("Fri, 02 Jan 2026 03:04:15 GMT")
	f.Fuzz(func(t *testing.T, s string) {
		if d := parseRetryAfter(s, time.Unix(0, 0)); d < 0 || d > maxRetryAfter {
			t.Fatalf("%q: %s", s, d)
		}
	})
}

func FuzzReadChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://auth.example.com/token",service="x",scope="repository:a:pull"`, true)
	f.Add(`Bearer realm="http://auth.example.com/token"`, true)
	f.Add(`Basic realm="x"`, false)
	f.Fuzz(func(t *testing.T, s string, secure bool) {
		resp := &http.Response{Header: http.Header{"Www-Authenticate": {s}}, Request: &http.Request{URL: &url.URL{Scheme: "http", Host: "h"}}}
		if secure {
			resp.Request.URL.Scheme = "https"
		}
		ch, err := readChallenge(resp)
		if err != nil || ch.basic {
			return
		}
		realm, err := url.Parse(ch.params["realm"])
		if err != nil || realm.Host == "" || (secure && realm.Scheme != "https") {
			t.Fatalf("%q: token server %q", s, ch.params["realm"])
		}
	})
}

func FuzzRedirectTarget(f *testing.F) {
	f.Add("https://storage.example.com/x?sig=y")
	f.Add("//host")
	f.Add("../blob")
	f.Fuzz(func(t *testing.T, location string) {
		u, err := redirectTarget(&url.URL{Scheme: "https", Host: "h", Path: "/v2/"}, location)
		if err == nil && (u.Host == "" || u.User != nil || (u.Scheme != "http" && u.Scheme != "https")) {
			t.Fatalf("%q: %q", location, u)
		}
	})
}
