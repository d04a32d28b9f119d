package testutil

import (
	"bytes"
	"context"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Stream is a layer's uncompressed stream in memory, with a hook before each read.
type Stream struct {
	*bytes.Reader
	Before func() error // nil: none
}

// ReadAt reads as file systems do, after Before, whose error it returns.
func (s Stream) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	if s.Before != nil {
		if err := s.Before(); err != nil {
			return 0, err
		}
	}
	return s.Reader.ReadAt(p, off)
}

// Open opens a file in the process that serves it. os.Open would hand it to the
// runtime's poller, which asks the file system whether it can be polled, and keeps
// the processor that should answer.
func Open(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// ReadFile is os.ReadFile with Open.
func ReadFile(path string) ([]byte, error) {
	f, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}
