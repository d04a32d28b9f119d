package discover

import (
	"io"
	"os"
	"path/filepath"
	"regexp"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// offered matches what Offer makes.
var offered = regexp.MustCompile(`^(\.load-[0-9]+|load-[0-9a-f]{64}-[0-9]+\.clip)$`)

// Offer puts a copy of an image's archive into dir, which is a finder's, until
// remove is called. It is locked meanwhile: the next finder removes those whose
// owner ended without that.
func Offer(dir string, archive io.Reader, manifest digest.Digest) (remove func(), err error) {
	out, err := os.CreateTemp(dir, ".load-")
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "load-"+manifest.Encoded()+"-"+filepath.Base(out.Name())[len(".load-"):]+".clip")
	remove = func() {
		os.Remove(file)
		os.Remove(out.Name())
		out.Close()
	}
	if err = unix.Flock(int(out.Fd()), unix.LOCK_EX); err == nil {
		_, err = io.Copy(out, archive)
	}
	if err == nil {
		err = os.Rename(out.Name(), file)
	}
	if err != nil {
		remove()
		return nil, err
	}
	return remove, nil
}

// removeOffered removes from dir what was offered by those who ended since.
func removeOffered(dir string) {
	entries, _ := os.ReadDir(dir) // one that is not there holds nothing
	for _, e := range entries {
		if !offered.MatchString(e.Name()) {
			continue
		}
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			os.Remove(f.Name())
		}
		f.Close()
	}
}
