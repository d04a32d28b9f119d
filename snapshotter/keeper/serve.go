package keeper

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// idle is how long a keeper waits for its first client.
const idle = 30 * time.Second

// server is a keeper process.
type server struct {
	listener *net.UnixListener
	mu       sync.Mutex // guards the fields below
	sets     map[string][]int
	clients  int
}

// Main is the whole life of a keeper process that was started by Open: it
// serves the socket that it got and ends when it holds nothing and nobody is
// connected.
func Main() error {
	f := os.NewFile(listenerFD, "keeper socket")
	l, err := net.FileListener(f)
	if err != nil {
		return fmt.Errorf("a keeper is started by the daemon alone: %w", err)
	}
	f.Close()
	ul, ok := l.(*net.UnixListener)
	if !ok {
		return fmt.Errorf("the keeper's socket is a %T", l)
	}
	// The kernel looks for memory elsewhere first. Without the right to ask for
	// that, the keeper is as likely a victim as any process of its size.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	// In a container whose control groups are read-only it stays where it is.
	_ = leaveCgroup()
	return serve(ul)
}

func serve(l *net.UnixListener) error {
	s := &server{listener: l, sets: map[string][]int{}}
	if err := l.SetDeadline(time.Now().Add(idle)); err != nil {
		return err
	}
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.clients++
		err = l.SetDeadline(time.Time{})
		s.mu.Unlock()
		if err != nil {
			return err
		}
		go s.client(conn)
	}
}

// client answers one connection until it ends.
func (s *server) client(conn *net.UnixConn) {
	defer s.left()
	defer conn.Close()
	if !sameUser(conn) {
		return
	}
	for {
		m, fds, err := receive(conn)
		if err != nil {
			return
		}
		if err := s.answer(conn, m, fds); err != nil {
			return
		}
	}
}

// left ends the keeper with its last client if it holds nothing.
func (s *server) left() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clients--
	if s.clients == 0 && len(s.sets) == 0 {
		s.listener.Close()
	}
}

func (s *server) answer(conn *net.UnixConn, m message, fds []int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch m.Op {
	case opKeep:
		return send(conn, result(s.keepLocked(m.Name, fds)), nil)
	case opDrop:
		closeAll(fds)
		closeAll(s.sets[m.Name])
		delete(s.sets, m.Name)
		return send(conn, message{}, nil)
	case opList:
		closeAll(fds)
		for name, set := range s.sets {
			if err := send(conn, message{Name: name}, set); err != nil {
				return err
			}
		}
		return send(conn, message{}, nil)
	}
	closeAll(fds)
	return send(conn, result(fmt.Errorf("this keeper does not know the operation %q", m.Op)), nil)
}

// keepLocked takes the descriptors over, also if it fails.
func (s *server) keepLocked(name string, fds []int) error {
	var err error
	switch {
	case name == "" || len(name) > maxName || len(fds) == 0:
		err = errors.New("a name or a descriptor is missing")
	case s.sets[name] != nil:
		err = errors.New("the name is in use")
	case len(s.sets) >= maxSets:
		err = errors.New("the keeper is full")
	}
	if err != nil {
		closeAll(fds)
		return err
	}
	s.sets[name] = fds
	return nil
}

func result(err error) message {
	if err != nil {
		return message{Error: err.Error()}
	}
	return message{}
}

// sameUser says whether the other side is of this process's user.
func sameUser(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return cerr == nil && err == nil && int(cred.Uid) == os.Geteuid()
}
