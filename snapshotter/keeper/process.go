package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// listenerFD is the descriptor of its socket in a keeper process.
const listenerFD = 3

// socketName is the keeper's socket in the daemon's directory.
const socketName = "keeper.sock"

// process is a keeper process.
type process struct {
	dir     string
	command []string
	conn    *net.UnixConn // for requests
	life    *net.UnixConn // says nothing; it ends with the keeper
	pid     int           // of the keeper, if this process started it
	closed  atomic.Bool
}

// open finds the running keeper and what it holds, or starts one.
func (p *process) open(ctx context.Context) (map[string][]int, error) {
	if err := p.connect(); err == nil {
		found, err := p.list()
		if err == nil {
			return found, nil
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			p.hangUp()
			return nil, err // it holds what nobody else has
		}
		// It was about to end, with nothing to hold.
		log.G(ctx).WithError(err).Debug("the keeper that was running does not answer")
		p.hangUp()
	}
	if err := p.start(ctx); err != nil {
		return nil, fmt.Errorf("starting the keeper of the connections to the kernel: %w", err)
	}
	if err := p.connect(); err != nil {
		return nil, fmt.Errorf("connecting to the keeper: %w", err)
	}
	return p.list()
}

// socket returns the address of the keeper's socket, which is reached through
// a descriptor of its directory because paths of sockets are short.
func (p *process) socket() (_ *net.UnixAddr, done func(), err error) {
	dir, err := unix.Open(p.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", p.dir, err)
	}
	addr := &net.UnixAddr{Net: "unixpacket", Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir, socketName)}
	return addr, func() { _ = unix.Close(dir) }, nil
}

func (p *process) connect() (err error) {
	addr, done, err := p.socket()
	if err != nil {
		return err
	}
	defer done()
	if p.conn, err = net.DialUnix(addr.Net, nil, addr); err != nil {
		return err
	}
	if p.life, err = net.DialUnix(addr.Net, nil, addr); err != nil {
		p.conn.Close()
	}
	return err
}

// start starts a keeper. Its socket exists before it runs, so that there is
// nothing to wait for.
func (p *process) start(ctx context.Context) error {
	addr, done, err := p.socket()
	if err != nil {
		return err
	}
	defer done()
	if err := os.Remove(filepath.Join(p.dir, socketName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.ListenUnix(addr.Net, addr)
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(filepath.Join(p.dir, socketName), 0o600); err != nil {
		return err
	}
	f, err := l.File()
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := exec.Command(p.command[0], p.command[1:]...)
	cmd.ExtraFiles = []*os.File{f} // listenerFD
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // what is sent to the daemon's group is not for it
	if err := cmd.Start(); err != nil {
		return err
	}
	p.pid = cmd.Process.Pid
	log.G(ctx).WithField("pid", p.pid).Info("started the keeper of the connections to the kernel")
	go func() { _ = cmd.Wait() }() // watch says that it ended, whoever started it
	return nil
}

// patience is how long a keeper may take to answer.
const patience = 10 * time.Second

// ask sends a request and returns its one answer.
func (p *process) ask(m message, fds []int) error {
	if err := p.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if err := send(p.conn, m, fds); err != nil {
		return err
	}
	answer, extra, err := receive(p.conn)
	closeAll(extra)
	if err != nil {
		return err
	}
	if answer.Error != "" {
		return errors.New(answer.Error)
	}
	return nil
}

func (p *process) keep(name string, fds []int) error {
	return p.ask(message{Op: opKeep, Name: name}, fds)
}

func (p *process) drop(name string) error { return p.ask(message{Op: opDrop, Name: name}, nil) }

func (p *process) list() (map[string][]int, error) {
	found := map[string][]int{}
	if err := p.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	if err := send(p.conn, message{Op: opList}, nil); err != nil {
		return nil, err
	}
	for {
		m, fds, err := receive(p.conn)
		if err == nil && m.Error != "" {
			err = errors.New(m.Error)
		}
		if err != nil {
			for _, fds := range found {
				closeAll(fds)
			}
			return nil, fmt.Errorf("asking the keeper what it holds: %w", err)
		}
		if m.Name == "" {
			return found, nil
		}
		found[m.Name] = fds
	}
}

// watch calls ended when the keeper has died.
func (p *process) watch(ctx context.Context, ended func()) {
	life := p.life
	go func() {
		_, err := life.Read(make([]byte, 1))
		if p.closed.Load() {
			return
		}
		log.G(ctx).WithError(err).Error("the keeper of the connections to the kernel has died; starting another")
		ended()
	}()
}

// again starts another keeper after one died, and gives it all that is kept.
// This process still has the descriptors.
func (k *Keeper) again(ctx context.Context, p *process) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if p.closed.Load() {
		return
	}
	p.hangUp()
	found, err := p.open(ctx)
	for _, fds := range found {
		closeAll(fds) // this process has them
	}
	for name, fds := range k.kept {
		if err == nil {
			err = p.keep(name, fds)
		}
	}
	if err != nil {
		log.G(ctx).WithError(err).Error("there is no keeper: if the daemon ends before it is started again, containers can no longer read what is not in memory")
		return
	}
	log.G(ctx).Info("the new keeper has everything")
	p.watch(ctx, func() { k.again(ctx, p) })
}

func (p *process) hangUp() {
	p.conn.Close()
	p.life.Close()
}

func (p *process) close() error {
	p.closed.Store(true)
	err := errors.Join(p.conn.Close(), p.life.Close())
	if errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
