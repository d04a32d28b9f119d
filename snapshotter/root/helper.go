package root

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// Helper is the command of a process that runs HelperMain. It mounts for a
// process that serves layer files, and looks into probes: one that touched what
// it serves itself
// could be killed between a question and its own answer, and would then wait
// for its successor, which cannot start before it has ended. Nil mounts here.
type Helper []string

// request is what a helper is to do: to mount at Target, or if there is a Dir, to
// try the root that is at Target.
type request struct {
	Mode    Mode
	Image   string
	Target  string
	Devices []string
	Dir     string
}

// result is what came of it. Errors are text; of the first, Errno is kept.
type result struct {
	Error, Nested, Remap string
	Errno                unix.Errno
}

// helperError is an error of another process.
type helperError struct {
	text  string
	errno unix.Errno
}

func (e helperError) Error() string { return e.text }

func (e helperError) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}

func (r result) err() error { return toError(r.Error, r.Errno) }

func toError(text string, errno unix.Errno) error {
	if text == "" {
		return nil
	}
	return helperError{text, errno}
}

// HelperMain is the whole life of a helper: it does the request that in holds
// and writes what came of it to out.
func HelperMain(ctx context.Context, in io.Reader, out io.Writer) error {
	var req request
	if err := json.NewDecoder(in).Decode(&req); err != nil {
		return fmt.Errorf("this command is for the daemon alone: %w", err)
	}
	var (
		can Ability
		err error
	)
	switch {
	case req.Dir != "":
		can, err = try(req.Dir, req.Target)
	case req.Mode == Loop:
		err = mountLoop(req.Image, req.Target, req.Devices)
	default:
		err = mountFile(req.Image, req.Target, req.Devices)
	}
	r := result{Error: text(err), Nested: text(can.Nested), Remap: text(can.Remap)}
	_ = errors.As(err, &r.Errno)
	return json.NewEncoder(out).Encode(r)
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// mount mounts the metadata image at target, with the devices.
func (h Helper) mount(m Mode, image, target string, devices []string) error {
	if h == nil && m == Loop {
		return mountLoop(image, target, devices)
	}
	if h == nil {
		return mountFile(image, target, devices)
	}
	r, err := h.run(request{Mode: m, Image: image, Target: target, Devices: devices})
	return errors.Join(err, r.err())
}

// try is the function try.
func (h Helper) try(dir, lower string) (Ability, error) {
	if h == nil {
		return try(dir, lower)
	}
	r, err := h.run(request{Dir: dir, Target: lower})
	if err = errors.Join(err, r.err()); err != nil {
		return Ability{}, err
	}
	return Ability{Nested: toError(r.Nested, 0), Remap: toError(r.Remap, 0)}, nil
}

// run runs the helper. It dies with this process, or as soon as what it waits
// for is answered.
func (h Helper) run(req request) (r result, err error) {
	in, err := json.Marshal(req)
	if err != nil {
		return r, err
	}
	cmd := exec.Command(h[0], h[1:]...)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), os.Stderr
	if req.Dir != "" {
		// Where containerd makes mapped copies of mounts: if the helper is
		// killed, they are found with the rest.
		cmd.Env = append(os.Environ(), "TMPDIR="+req.Dir)
	}
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	// The signal comes with the end of the thread that started the helper.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	out, err := cmd.Output()
	if err != nil {
		return r, fmt.Errorf("the process that mounts: %w", err)
	}
	return r, json.Unmarshal(out, &r)
}
