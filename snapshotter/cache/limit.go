package cache

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

// Limit is how much disk the cache may take: so many bytes, or a share of what
// is free when the store is opened, counting what it holds already. As text it
// is "20GiB" or "80%"; units are powers of 1024. The zero value means 80 %.
type Limit struct {
	Size    int64 // bytes; 0 if it is a share
	Percent int   // 0 means DefaultPercent
}

// DefaultPercent is the share that the zero Limit means.
const DefaultPercent = 80

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *Limit) UnmarshalText(text []byte) error {
	if share, ok := strings.CutSuffix(string(text), "%"); ok {
		n, err := strconv.Atoi(share)
		if err != nil || n < 1 || n > 100 {
			return fmt.Errorf("%q is not a share between 1%% and 100%%", text)
		}
		*l = Limit{Percent: n}
		return nil
	}
	n, err := units.RAMInBytes(string(text))
	if err != nil || n <= 0 {
		return fmt.Errorf("%q is neither a share like 80%% nor a size like 20GiB", text)
	}
	*l = Limit{Size: n}
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (l Limit) MarshalText() ([]byte, error) {
	if l.Size > 0 {
		return []byte(strconv.FormatInt(l.Size, 10)), nil
	}
	return fmt.Appendf(nil, "%d%%", l.share()), nil
}

func (l Limit) share() int {
	if l.Percent == 0 {
		return DefaultPercent
	}
	return l.Percent
}

// bytes returns the limit for a store in dir that holds that many bytes.
func (l Limit) bytes(dir string, held int64) (int64, error) {
	if l.Size > 0 {
		return l.Size, nil
	}
	free, err := freeOnDisk(dir)
	return (held + free) / 100 * int64(l.share()), err
}

// freeOnDisk returns how many bytes the disk below dir has room for.
func freeOnDisk(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// heldOnDisk returns how many bytes of disk the data files below dir take.
func heldOnDisk(dir string) (n int64, err error) {
	layers, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, layer := range layers {
		if info, err := os.Stat(filepath.Join(dir, layer.Name(), dataFile)); err == nil {
			n += blocks(info)
		}
	}
	return n, nil
}
