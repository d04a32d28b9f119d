package tests

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// sources calls f with every Go file of the product, tests apart.
func sources(t *testing.T, f func(path, text string)) {
	t.Helper()
	for _, top := range []string{"archive", "plugin", "snapshotter", "cmd"} {
		require.NoError(t, filepath.WalkDir(filepath.Join("..", top), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile(path)
			f(path, string(text))
			return err
		}))
	}
}

// document is a file of docs/.
func document(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", name))
	require.NoError(t, err)
	return string(text)
}

// found returns what the group of a pattern matched, each once, sorted.
func found(pattern *regexp.Regexp, text string) []string {
	set := map[string]bool{}
	for _, m := range pattern.FindAllStringSubmatch(text, -1) {
		set[m[1]] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// TestMetricsAreDocumented has every metric of the code in operating.md and the
// reverse.
func TestMetricsAreDocumented(t *testing.T) {
	var code []string
	sources(t, func(_, text string) {
		code = append(code, found(regexp.MustCompile(`"(clip_[a-z_]+)"`), text)...)
	})
	slices.Sort(code)
	require.Equal(t, slices.Compact(slices.Clone(code)), code, "a metric is made in one place")
	require.Greater(t, len(code), 15)
	require.Equal(t, code, found(regexp.MustCompile(`(?m)^\| `+"`"+`(clip_[a-z_]+)`), document(t, "docs/operating.md")))
	for _, mentioned := range found(regexp.MustCompile(`\b(clip_[a-z_]+)`), document(t, "docs/operating.md")) {
		require.Contains(t, code, mentioned)
	}
}
