package report

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// Main is the main function of a bench: it parses the command line, to which it
// adds -rounds and -report, and runs until it is interrupted. rounds is the
// default.
func Main(name string, rounds int, run func(ctx context.Context, rounds int, file string) error) {
	n := flag.Int("rounds", rounds, "`rounds` in which everybody takes a turn")
	file := flag.String("report", "", "`file` in which the tables replace those of an earlier run; plots go beside it")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, *n, *file)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		stop()
		os.Exit(1)
	}
}
