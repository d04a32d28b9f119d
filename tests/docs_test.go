package tests

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	clipctl "github.com/beam-cloud/containerd-clip/cmd/clipctl/command"
	daemon "github.com/beam-cloud/containerd-clip/cmd/containerd-clip-grpc/command"
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

// programs are our commands by name.
func programs() map[string]*cobra.Command {
	all := map[string]*cobra.Command{"clipctl": clipctl.New(), "containerd-clip-grpc": daemon.New()}
	for _, cmd := range all {
		cmd.InitDefaultCompletionCmd()
	}
	return all
}

// each calls f with a command and all below it that people use.
func each(cmd *cobra.Command, f func(*cobra.Command)) {
	f(cmd)
	for _, sub := range cmd.Commands() {
		if !sub.Hidden && sub.Name() != "help" {
			each(sub, f)
		}
	}
}

// code returns what is code in a document, line by line: spans between
// backquotes, and indented or fenced lines. A file that is no Markdown is all code.
func code(name, text string) (lines []string) {
	if !strings.HasSuffix(name, ".md") {
		return strings.Split(text, "\n")
	}
	var prose []string
	for _, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(line, "    ") && !strings.HasPrefix(strings.TrimSpace(line), "* ") {
			lines = append(lines, line)
		} else {
			prose = append(prose, line)
		}
	}
	spans := regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(strings.Join(prose, "\n"), -1)
	for _, m := range spans {
		lines = append(lines, strings.ReplaceAll(m[1], "\n", " "))
	}
	return lines
}

// documents are all that people read, by name.
func documents(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	names, err := filepath.Glob("../docs/*.md")
	require.NoError(t, err)
	for _, name := range append(names, "../README.md", "../config.toml.example", "../containerd-clip-grpc.service") {
		all[name] = document(t, strings.TrimPrefix(name, "../"))
	}
	return all
}

// columns are what separates a command from what is said about it.
var columns = regexp.MustCompile(`\s{3,}`)

// wrongUse says what a command line names that does not exist; "" if nothing.
func wrongUse(cmd *cobra.Command, line string) string {
	words := strings.Fields(columns.Split(strings.TrimSpace(line), 2)[0])
	for i, word := range words {
		if strings.ContainsAny(word[:1], "|&;>#(") {
			words = words[:i]
			break
		}
	}
	for len(words) > 0 && regexp.MustCompile("^[a-z-]+$").MatchString(words[0]) && !strings.HasPrefix(words[0], "-") && cmd.HasSubCommands() {
		next, _, err := cmd.Find(words[:1])
		if err != nil || next == cmd {
			return "command " + words[0]
		}
		cmd, words = next, words[1:]
	}
	for _, word := range words {
		name, _, _ := strings.Cut(strings.TrimLeft(word, "-"), "=")
		name = strings.TrimRight(name, ".,:;)")
		switch {
		case word == "--":
			return ""
		case word[0] != '-' || name == "" || name == "help":
		case strings.HasPrefix(word, "--") && cmd.Flags().Lookup(name) == nil && cmd.InheritedFlags().Lookup(name) == nil && cmd.PersistentFlags().Lookup(name) == nil:
			return "flag --" + name
		case !strings.HasPrefix(word, "--") && cmd.Flags().ShorthandLookup(name) == nil && cmd.InheritedFlags().ShorthandLookup(name) == nil && cmd.PersistentFlags().ShorthandLookup(name) == nil:
			return "flag -" + name
		}
	}
	return ""
}

// TestCommandsInDocuments has every command line that a document or an example
// shows be one that exists, and every command be in a document.
func TestCommandsInDocuments(t *testing.T) {
	texts := documents(t)
	for name, program := range programs() {
		each(program, func(cmd *cobra.Command) { texts["examples of "+cmd.CommandPath()+name] = cmd.Example })
	}
	checked := 0
	for name, text := range texts {
		for _, line := range code(name, text) {
			for program, cmd := range programs() {
				for _, use := range regexp.MustCompile(`(?:^|[\s(&|])`+program+`(\s[^\n]*)`).FindAllStringSubmatch(line, -1) {
					checked++
					if strings.HasPrefix(use[1], " and ") {
						continue // a list of programs
					}
					assert.Empty(t, wrongUse(cmd, use[1]), "in %s: %s", name, line)
				}
			}
		}
	}
	require.Greater(t, checked, 80, "documents show commands")
	operating := document(t, "docs/operating.md")
	for _, program := range programs() {
		each(program, func(cmd *cobra.Command) {
			_, path, below := strings.Cut(cmd.CommandPath(), " ")
			if below && !cmd.HasSubCommands() && !strings.HasPrefix(path, "completion") {
				require.Contains(t, operating, "`"+path+"`", "docs/operating.md has a table of commands")
			}
		})
	}
}

func TestWrongUse(t *testing.T) {
	cmd := programs()["clipctl"]
	for line, want := range map[string]string{
		" index IMAGE --push":               "",
		" cache ls --json | jq --x":         "",
		" record IMAGE --push -- CMD --its": "",
		" content ensure IMAGE":             "",
		" idnex IMAGE":                      "command idnex",
		" index IMAGE --pull":               "flag --pull",
		" status -z":                        "flag -z",
		" --namespace k8s.io pull IMAGE":    "",
		" cache list":                       "command list",
	} {
		require.Equal(t, want, wrongUse(cmd, line), line)
	}
}

// TestHelp has everything that a command's help should.
func TestHelp(t *testing.T) {
	for _, program := range programs() {
		each(program, func(cmd *cobra.Command) {
			if strings.Contains(cmd.CommandPath(), "completion") {
				return // cobra's own
			}
			require.NotEmpty(t, cmd.Short, cmd.CommandPath())
			if !cmd.HasSubCommands() {
				require.Contains(t, cmd.Example, cmd.CommandPath(), cmd.CommandPath())
			}
			cmd.LocalFlags().VisitAll(func(f *pflag.Flag) { require.NotEmpty(t, f.Usage, "%s --%s", cmd.CommandPath(), f.Name) })
		})
	}
}

// defaults returns the daemon's configuration keys and their defaults.
func defaults(t *testing.T) map[string]string {
	t.Helper()
	var out strings.Builder
	cmd := daemon.New()
	cmd.SetOut(&out)
	cmd.SetArgs([]string{"config", "default"})
	require.NoError(t, cmd.Execute())
	var tree map[string]any
	require.NoError(t, toml.Unmarshal([]byte(out.String()), &tree))
	keys := map[string]string{}
	for key, value := range tree {
		section, ok := value.(map[string]any)
		if !ok {
			keys[key] = fmt.Sprint(value)
			continue
		}
		for sub, value := range section {
			keys[key+"."+sub] = strings.Trim(fmt.Sprint(value), "[]")
		}
	}
	return keys
}

// TestKeysAreDocumented has every key of the configuration, with its default,
// in operating.md's table, and no others anywhere.
func TestKeysAreDocumented(t *testing.T) {
	keys := defaults(t)
	documented := map[string]string{}
	_, table, ok := strings.Cut(document(t, "docs/operating.md"), "| key | default | |\n")
	require.True(t, ok)
	table, _, _ = strings.Cut(table, "\n\n")
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		names, values := regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1), strings.Split(cells[2], ",")
		for i, name := range names {
			documented[name[1]] = cells[2]
			if len(names) > 1 {
				documented[name[1]] = values[i]
			}
		}
	}
	require.Equal(t, slices.Sorted(maps.Keys(keys)), slices.Sorted(maps.Keys(documented)))
	for key, value := range keys {
		for _, part := range strings.Fields(value) {
			require.Contains(t, documented[key], "`"+part+"`", key)
		}
		if value == "" {
			require.NotRegexp(t, "`(true|false|[0-9]+)`", documented[key], key)
		}
	}
	sections := map[string]bool{}
	for key := range keys {
		section, _, _ := strings.Cut(key, ".")
		sections[section] = true
	}
	for name, text := range documents(t) {
		for _, m := range regexp.MustCompile("`([a-z]+)\\.([a-z_]+)( = [^`]*)?`").FindAllStringSubmatch(text, -1) {
			if sections[m[1]] {
				require.Contains(t, keys, m[1]+"."+m[2], name)
			}
		}
	}
}
