package remote

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// parseContentRange reads "bytes first-last/total" (RFC 9110, 14.4), where
// total may be "*", which is returned as -1. What it returns holds
// 0 <= first <= last, and last < total if total is known.
func parseContentRange(s string) (first, last, total int64, err error) {
	wrong := fmt.Errorf("malformed content range %s", short(s))
	rest, ok := strings.CutPrefix(s, "bytes ")
	if !ok {
		return 0, 0, 0, wrong
	}
	a, rest, ok1 := strings.Cut(rest, "-")
	b, c, ok2 := strings.Cut(rest, "/")
	if !ok1 || !ok2 {
		return 0, 0, 0, wrong
	}
	first, ok1 = parseNumber(a)
	last, ok2 = parseNumber(b)
	total, ok = -1, c == "*"
	if !ok {
		total, ok = parseNumber(c)
	}
	if !ok || !ok1 || !ok2 || first > last || (total >= 0 && last >= total) {
		return 0, 0, 0, wrong
	}
	return first, last, total, nil
}

// parseNumber reads digits and nothing else; strconv also takes signs.
func parseNumber(s string) (int64, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// parseRetryAfter reads seconds or a date (RFC 9110, 10.2.3) and returns how
// long that is from now, at most maxRetryAfter; 0 if it says nothing.
func parseRetryAfter(s string, now time.Time) time.Duration {
	if strings.Trim(s, "0123456789") == "" {
		n, ok := parseNumber(s)
		if !ok && s != "" {
			return maxRetryAfter // more seconds than a number can hold
		}
		return time.Duration(min(n, int64(maxRetryAfter/time.Second))) * time.Second
	}
	at, err := http.ParseTime(s)
	if err != nil {
		return 0
	}
	return max(0, min(at.Sub(now), maxRetryAfter))
}

// redirectTarget resolves an answer's Location. Its error does not tell what
// was there, which may be a key to somebody's bucket.
func redirectTarget(from *url.URL, location string) (*url.URL, error) {
	u, err := from.Parse(location)
	if err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http") {
		return nil, fmt.Errorf("%s redirects to what is no web address", from.Host)
	}
	u.User, u.Fragment = nil, ""
	return u, nil
}

// short quotes what a host sent for an error message.
func short(s string) string {
	const most = 64
	if len(s) > most {
		return strconv.Quote(s[:most]) + "..."
	}
	return strconv.Quote(s)
}
