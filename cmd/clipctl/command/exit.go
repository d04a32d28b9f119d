package command

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// Exit codes of clipctl.
const (
	exitDone  = 0
	exitError = 1 // it could not do what was asked
	exitUsage = 2 // nobody knows what was asked
	exitWrong = 3 // doctor or check found something wrong
)

// Main runs clipctl with these arguments and returns its exit code.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	cmd := New()
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	begun := false
	onRun(cmd, func() { begun = true })
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	fmt.Fprintln(stderr, "clipctl:", err)
	switch {
	case !begun:
		return exitUsage
	case errors.Is(err, errFindings):
		return exitWrong
	}
	return exitError
}

// onRun calls f when a command begins to run: its arguments and flags are right.
func onRun(cmd *cobra.Command, f func()) {
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			f()
			return run(cmd, args)
		}
	}
	for _, sub := range cmd.Commands() {
		onRun(sub, f)
	}
}
