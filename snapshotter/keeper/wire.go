package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// version is that of the protocol. A keeper answers requests of every version
// whose operation it knows, so that daemons older and newer than it can use
// it: what an operation means never changes.
const version = 1

// The operations, each a packet from the daemon and one or more back, on a
// unix socket of type SEQPACKET. A packet is a message in JSON, with
// descriptors where the operation has some.
const (
	opKeep = "keep" // name, descriptors -> an empty message
	opDrop = "drop" // name -> an empty message
	opList = "list" // -> for each name a message with its descriptors, then one without a name
)

// message is a request or an answer.
type message struct {
	Version int    `json:"version"`
	Op      string `json:"op,omitempty"`
	Name    string `json:"name,omitempty"`
	Error   string `json:"error,omitempty"` // of an answer: why not
}

// maxMessage is the largest packet, in bytes.
const maxMessage = 4 << 10

func send(conn *net.UnixConn, m message, fds []int) error {
	m.Version = version
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err = conn.WriteMsgUnix(raw, rights, nil)
	return err
}

// receive returns the next message and its descriptors, which are the
// caller's. io.EOF says that the other side is gone.
func receive(conn *net.UnixConn) (m message, fds []int, err error) {
	raw, rights := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxFDs))
	n, nr, flags, _, err := conn.ReadMsgUnix(raw, rights)
	if err != nil {
		return m, nil, err
	}
	fds, err = parseRights(rights[:nr])
	switch {
	case err != nil:
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = errors.New("a packet is too large")
	case n == 0:
		err = io.EOF
	default:
		err = json.Unmarshal(raw[:n], &m)
	}
	if err != nil {
		closeAll(fds)
		return m, nil, err
	}
	return m, fds, nil
}

func parseRights(raw []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(raw)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	var fds []int
	for _, m := range messages {
		some, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, fmt.Errorf("control message: %w", err)
		}
		fds = append(fds, some...)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd) // nothing is written to them
	}
}
