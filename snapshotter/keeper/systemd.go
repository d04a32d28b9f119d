package keeper

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// systemd is the file descriptor store of the service that this process is.
// See sd_pid_notify_with_fds(3) and FileDescriptorStoreMax in systemd.service(5).
type systemd struct {
	fd int // a datagram socket
	to unix.SockaddrUnix
}

// barrierTimeout is how long systemd may take to look at what it was sent.
const barrierTimeout = 10 * time.Second

// openSystemd returns what systemd kept of an earlier process of the service.
// The store is nil where there is none that outlives the service's stop: that
// is so since version 254, with FileDescriptorStorePreserve, and since then
// systemd says in $FDSTORE how large it is.
func openSystemd() (map[string][]int, place) {
	socket, size := os.Getenv("NOTIFY_SOCKET"), os.Getenv("FDSTORE")
	if socket == "" || size == "" || size == "0" {
		return nil, nil
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil
	}
	found := map[string][]int{}
	for _, f := range activation.Files(true) {
		// A copy, because a file closes its own when it is collected.
		if fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0); err == nil {
			found[f.Name()] = append(found[f.Name()], fd)
		}
		f.Close()
	}
	return found, &systemd{fd: fd, to: unix.SockaddrUnix{Name: socket}}
}

// keep stores descriptors. Without FDPOLL=0 systemd would drop those that
// cannot be polled, or look as if they had ended.
func (s *systemd) keep(name string, fds []int) error {
	return s.notify("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, fds...)
}

func (s *systemd) drop(name string) error {
	return s.notify("FDSTOREREMOVE=1\nFDNAME=" + name)
}

// notify sends a message and waits until systemd has acted upon it: from then
// on this process may die.
func (s *systemd) notify(state string, fds ...int) error {
	if err := s.send(state, fds...); err != nil {
		return err
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	err := s.send("BARRIER=1", pipe[1])
	unix.Close(pipe[1])
	defer unix.Close(pipe[0])
	if err != nil {
		return err
	}
	ready := []unix.PollFd{{Fd: int32(pipe[0])}} // it ends when systemd has closed its copy
	for deadline := time.Now().Add(barrierTimeout); ; {
		n, err := unix.Poll(ready, max(0, int(time.Until(deadline).Milliseconds())))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("systemd did not act upon %q within %s", state, barrierTimeout)
		default:
			return nil
		}
	}
}

func (s *systemd) send(state string, fds ...int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	for {
		err := unix.Sendmsg(s.fd, []byte(state), rights, &s.to, 0)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (s *systemd) close() error { return unix.Close(s.fd) }
