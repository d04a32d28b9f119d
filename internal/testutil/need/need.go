// Package need is for what a test needs of the machine.
package need

import (
	"os"
	"testing"
)

// Missing fails the test in CI, where everything must be there, and skips it elsewhere.
func Missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// Root is for tests that mount, or make what only root may.
func Root(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		Missing(t, "mounts, device nodes and owners need root")
	}
}
