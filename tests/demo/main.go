// Demo shows what the project is for, on real parts: an image goes to a private registry, gets an archive, and starts
// on another machine's containerd before it is downloaded; then the same with a full pull.
//
// Everything runs on loopback in a directory of its own, and is gone afterwards, also after Ctrl-C.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

func main() {
	prepare := flag.Bool("prepare", false, "only make the image that the demo runs")
	verbose := flag.Bool("v", false, "say what is started")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, *prepare, *verbose)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, prepare, verbose bool) (err error) {
	top, err := harness.Top()
	if err != nil {
		return err
	}
	say("Making the image: Debian with python3, numpy and pandas, in three layers (kept in .cache/images)")
	image, err := images.Demo(ctx, filepath.Join(top, ".cache", "images"))
	if err != nil || prepare {
		return err
	}
	options, err := harness.Installed()
	if err != nil {
		return err
	}
	if verbose {
		options.Log = func(v ...any) { fmt.Fprintln(os.Stderr, v...) }
	}
	lab, err := harness.NewLab(options)
	if err != nil {
		return err
	}
	defer func() {
		say("Stopping everything and removing %s", lab.Dir)
		if closeErr := lab.Close(); err == nil {
			err = closeErr
		}
	}()
	s := &show{lab: lab, image: image}
	return s.play(ctx)
}

func say(format string, args ...any) { fmt.Printf("==> "+format+"\n", args...) }
