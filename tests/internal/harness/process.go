package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a server that the lab started. Its output goes to a file in the lab.
type Process struct {
	Name string

	cmd     *exec.Cmd
	logFile string
	done    chan struct{} // closed when it has ended
}

// start runs a server until Stop, Kill or Lab.Close. ready is asked until it says nil; a server that ends before or
// takes longer than a minute is an error that carries its log.
func (l *Lab) start(ctx context.Context, name string, ready func(context.Context) error, program string, args ...string) (*Process, error) {
	p, err := l.launch(name, 0, program, args...)
	if err != nil {
		return nil, err
	}
	return p, p.await(ctx, ready)
}

// launch starts a server in new namespaces, CLONE_NEW flags, and does not wait for it.
func (l *Lab) launch(name string, namespaces uintptr, program string, args ...string) (*Process, error) {
	p := &Process{Name: name, logFile: l.Path(name + ".log"), done: make(chan struct{})}
	out, err := os.OpenFile(p.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p.cmd = exec.Command(l.program(program), args...)
	p.cmd.Env = l.environ()
	p.cmd.Dir = l.Dir
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Cloneflags: namespaces} // a terminal's Ctrl-C is ours to handle, not theirs
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait() // how it ended is in its log
		close(p.done)
	}()
	l.opts.Log(fmt.Sprintf("started %s (pid %d): %s %s", name, p.Pid(), program, strings.Join(args, " ")))
	l.onClose(func(context.Context) error {
		err := p.Stop()
		_ = unix.Kill(-p.Pid(), unix.SIGKILL) // children that it left to init
		return err
	})
	return p, nil
}

// StartServer runs a server that the harness does not know, until Stop, Kill or Lab.Close. It is ready when it listens
// on a socket. name is unique in the lab.
func (l *Lab) StartServer(ctx context.Context, name, socket, program string, args ...string) (*Process, error) {
	return l.start(ctx, name, dialable(socket), program, args...)
}

// Look finds a program that the lab can run, among product and parts and then in PATH.
func (l *Lab) Look(program string) (path string, err error) { return exec.LookPath(l.program(program)) }

// program finds a program among product and parts, so that an older one elsewhere in PATH is never taken by mistake.
func (l *Lab) program(name string) string {
	for _, dir := range []string{l.opts.Product, l.opts.Parts} {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil && dir != "" {
			return path
		}
	}
	return name
}

func (p *Process) await(ctx context.Context, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended while starting:\n%s", p.Name, p.logEnd())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w\n%s", p.Name, err, p.logEnd())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Pid is the process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Memory is how many bytes the process had resident at most; 0 if it has ended.
func (p *Process) Memory() int64 { return p.memory("VmHWM") }

// Resident is how many bytes the process has resident; 0 if it has ended.
func (p *Process) Resident() int64 { return p.memory("VmRSS") }

func (p *Process) memory(what string) int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		var kilobytes int64
		if _, err := fmt.Sscanf(line, what+": %d kB", &kilobytes); err == nil {
			return kilobytes << 10
		}
	}
	return 0
}

// Running says whether the process has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Stop ends the process as a service manager would: SIGTERM, and after a minute an error and SIGKILL.
func (p *Process) Stop() error {
	_ = p.cmd.Process.Signal(unix.SIGTERM) // it may have ended by itself
	select {
	case <-p.done:
		return nil
	case <-time.After(time.Minute):
	}
	p.Kill()
	return fmt.Errorf("%s did not end in a minute", p.Name)
}

// Kill ends the process with SIGKILL and waits for its end: not for ever, since a process that waits for its own file
// system has none.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // it may have ended by itself
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		fmt.Fprintf(os.Stderr, "%s does not end, it was killed a minute ago:\n%s", p.Name, KernelStacks(p.Pid()))
	}
}

// Log returns what the process printed so far.
func (p *Process) Log() string {
	text, err := os.ReadFile(p.logFile)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// logEnd is what the process printed last: earlier processes of its name write to the same file.
func (p *Process) logEnd() string {
	text := p.Log()
	return text[max(0, len(text)-logTail):]
}

// Result is what a command printed, and how long it took.
type Result struct {
	Stdout, Stderr string
	Code           int
	First          time.Duration // until the first byte on stdout; 0 when there was none
	Took           time.Duration
	Memory         int64 // bytes resident at most
}

// Output is everything that the command printed.
func (r Result) Output() string { return r.Stdout + r.Stderr }

// Run runs a program of the product or the parts to its end. A non-zero exit code is an error that says what was
// printed; Result is filled in all the same.
func (l *Lab) Run(ctx context.Context, program string, args ...string) (Result, error) {
	return l.run(ctx, nil, program, args...)
}

func (l *Lab) run(ctx context.Context, env []string, program string, args ...string) (Result, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, l.program(program), args...)
	cmd.Env = l.environ(env...)
	cmd.Dir = l.Dir
	watch := &stopwatch{w: &stdout, began: time.Now()}
	cmd.Stdout, cmd.Stderr = watch, &stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 5 * time.Second // a child that keeps the pipe open does not hold the test

	err := cmd.Run()
	r := Result{Stdout: stdout.String(), Stderr: stderr.String(), First: watch.first, Took: time.Since(watch.began)}
	if usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		r.Memory = usage.Maxrss << 10
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		r.Code = exit.ExitCode()
	}
	if err != nil {
		// The end of stdout is enough: ctr draws its progress there.
		err = fmt.Errorf("%s %s: %w\n%s%s", program, strings.Join(args, " "), err, r.Stdout[max(0, len(r.Stdout)-500):], r.Stderr)
	}
	return r, err
}

// stopwatch notes when the first byte comes.
type stopwatch struct {
	w     io.Writer
	began time.Time
	first time.Duration
}

func (s *stopwatch) Write(b []byte) (int, error) {
	if s.first == 0 {
		s.first = time.Since(s.began)
	}
	return s.w.Write(b)
}
