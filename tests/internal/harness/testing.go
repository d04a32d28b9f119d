package harness

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
)

// logTail is how much of each server's log a failing test shows.
const logTail = 3 << 10

// ForTest makes a lab that ends with the test, which may take Limit. The package's TestMain calls Main. What it needs and
// does not find fails the test in CI, and skips it elsewhere.
func ForTest(t testing.TB) *Lab {
	t.Helper()
	return ForTestWithin(t, Limit)
}

// ForTestWithin is ForTest with another limit.
func ForTestWithin(t testing.TB, limit time.Duration) *Lab {
	t.Helper()
	o, err := Installed()
	if err != nil {
		need.Missing(t, err.Error())
	}
	l, err := NewLab(o)
	if err != nil {
		t.Fatal(err)
	}
	l.endWith(t, limit, guardGrace)
	return l
}

// endWith has a lab closed when a test ends.
func (l *Lab) endWith(t testing.TB, limit, grace time.Duration) {
	t.Cleanup(startGuard(t, l, limit, grace)) // it ends last: also closing may hang
	t.Cleanup(func() {
		if t.Failed() {
			l.showLogs(t)
		}
		if err := l.Close(); err != nil {
			t.Errorf("cleaning up: %v", err)
		}
	})
}

func (l *Lab) showLogs(t testing.TB) {
	logs, _ := filepath.Glob(l.Path("*.log"))
	for _, file := range logs {
		text, err := os.ReadFile(file)
		if err != nil {
			text = []byte(err.Error())
		}
		t.Logf("--- end of %s\n%s", filepath.Base(file), text[max(0, len(text)-logTail):])
	}
}
