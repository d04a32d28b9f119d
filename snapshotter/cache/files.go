package cache

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
)

// Files of a layer's directory.
const (
	spansFile    = "spans"
	pointsFile   = "points"
	windowsFile  = "windows"
	entriesFile  = "entries"
	sourcesFile  = "sources"
	dataFile     = "data"
	haveFile     = "have"
	completeFile = "complete"
)

// writeFile replaces a file of dir, durably and in one step.
func writeFile(dir *os.Root, name string, b []byte) (err error) {
	tmp := "." + name + "." + rand.Text()
	defer func() {
		if err != nil {
			err = errors.Join(err, removeIfThere(dir, tmp))
		}
	}()
	if err := newFile(dir, tmp, b); err != nil {
		return err
	}
	if err := dir.Rename(tmp, name); err != nil {
		return err
	}
	return syncDir(dir)
}

// Behind the spans in their file are checksumMagic and the CRC-32C of the spans,
// little-endian, and so in the file points. Where they are not, an earlier version wrote
// the file spans; nothing may stand behind spans otherwise.
const checksumMagic = "\xffclipcrc"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// appendChecksum appends the checksum of b.
func appendChecksum(b []byte) []byte {
	sum := crc32.Checksum(b, castagnoli)
	return binary.LittleEndian.AppendUint32(append(b, checksumMagic...), sum)
}

// cutChecksum returns what stands before the checksum, if that is right or there
// is none. The error is errdefs.ErrDataLoss.
func cutChecksum(b []byte) ([]byte, error) {
	at := len(b) - 4 - len(checksumMagic)
	if at < 0 || string(b[at:at+len(checksumMagic)]) != checksumMagic {
		return b, nil
	}
	if binary.LittleEndian.Uint32(b[at+len(checksumMagic):]) != crc32.Checksum(b[:at], castagnoli) {
		return nil, fmt.Errorf("its checksum is wrong: %w", errdefs.ErrDataLoss)
	}
	return b[:at], nil
}

// newFile writes a new file of dir. It is durable once dir is.
func newFile(dir *os.Root, name string, b []byte) error {
	f, err := dir.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// removeFile removes a file of dir durably, if it is there.
func removeFile(dir *os.Root, name string) error {
	if err := dir.Remove(name); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return syncDir(dir)
}

func removeIfThere(dir *os.Root, name string) error {
	if err := dir.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// syncDir makes what was renamed, made and removed in dir durable.
func syncDir(dir *os.Root) error {
	f, err := dir.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// syncAll makes files of dir durable, as far as they are there.
func syncAll(dir *os.Root, names ...string) error {
	var errs []error
	for _, name := range names {
		f, err := dir.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = errors.Join(f.Sync(), f.Close())
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// control calls fn with f's descriptor, which is not closed meanwhile.
func control(f *os.File, fn func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := conn.Control(func(fd uintptr) { err = fn(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// occupied returns how many bytes of disk a file of dir takes; 0 if it is not there.
func occupied(dir *os.Root, name string) int64 {
	info, err := dir.Stat(name)
	if err != nil {
		return 0
	}
	return blocks(info)
}

func blocks(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}

// Sources are bounded in number and length.
const (
	maxSources    = 16
	maxSourceSize = 4 << 10
)

// decodeSources returns the repositories that raw lists. Damage that leaves a list
// costs the entries that it hits.
func decodeSources(raw []byte) ([]string, error) {
	var all []string
	if len(raw) > maxSources*2*maxSourceSize || json.Unmarshal(raw, &all) != nil {
		return nil, fmt.Errorf("its list of repositories on disk is damaged: %w", errdefs.ErrDataLoss)
	}
	var good []string
	for _, source := range all {
		if validSource(source) && !slices.Contains(good, source) && len(good) < maxSources {
			good = append(good, source)
		}
	}
	return good, nil
}

func validSource(source string) bool {
	_, err := reference.Parse(source)
	return err == nil && len(source) <= maxSourceSize
}
