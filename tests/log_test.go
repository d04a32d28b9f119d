package tests

import (
	"regexp"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// logKeys are the fields that log lines have. One thing has one name wherever it is logged; what has none yet is added.
var logKeys = []string{
	"id", "key", "mode", "namespace", "namespaces", "topic", // of containerd
	"image", "digest", "diffID", "chainID", "platform", "layer", "layers", "reason", // of images
	"span", "off", "len", "bytes", "ranges", "recorded", // of what is read
	"path", "root", "file", "archive", "indexed", "source", "storage-ref", // where
	"host", "address", "pid", "opcode", "requests", "oldest", "timeout", "took", "retry", // of what is under way
}

var (
	logField     = regexp.MustCompile(`\.WithField\("([^"]*)"`)
	formattedLog = regexp.MustCompile(`(?s)(?:log\.G\([^()]*\)|log\.L|logger|fields)(?:\.\s*With\w+\([^\n]*?\))*\.\s*(?:Trace|Debug|Info|Warn|Error)f\(`)
	errorInLog   = regexp.MustCompile(`\.WithField\("(?:err|error)"`)
)

// TestLogLines has what varies in fields, and their names from one list, so that logs can be searched.
func TestLogLines(t *testing.T) {
	require.Regexp(t, formattedLog, `log.G(ctx).WithError(err).WithField("a", b).`+"\n\t\t"+`Infof("x %v", err)`)
	require.Regexp(t, formattedLog, `logger.Warnf("x")`)
	lines := 0
	sources(t, func(path, text string) {
		for _, field := range logField.FindAllStringSubmatch(text, -1) {
			lines++
			assert.True(t, slices.Contains(logKeys, field[1]), "%s logs a field %q, which is not among logKeys", path, field[1])
		}
		assert.Empty(t, formattedLog.FindString(text), "%s: what varies belongs into fields", path)
		assert.Empty(t, errorInLog.FindString(text), "%s: errors are WithError", path)
	})
	assert.Greater(t, lines, 50)
}
