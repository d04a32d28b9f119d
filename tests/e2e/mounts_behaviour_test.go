package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
	"github.com/beam-cloud/containerd-clip/tests/internal/rootdiff"
)

// A behaviour does something to a root and tells what came of it, the same for the same root.
type behaviour func(root string, say func(format string, args ...any)) error

// behaviours by name. Each runs in a process of its own: this one has the proxy that the daemon's requests go through, and
// Go's collector, once it has begun, waits for threads in a page fault or between vfork and exec.
var behaviours = map[string]behaviour{
	"cold":                   inTurns(memoryMaps, sendFile, readBackwards, readDirectly),
	"cold without direct IO": inTurns(memoryMaps, sendFile, readBackwards),
	"exec":                   execPrograms,
	"memory maps":            fileBehaviour(memoryMaps).each,
	"direct IO":              directIO,
	"sendfile":               fileBehaviour(sendFile).each,
	"seekdir":                seekDirectories,
	"statfs":                 statFilesystem,
	"copy-up":                copyUp,
	"renames":                renames,
	"removals":               removals,
	"file capabilities":      readAsOther,
}

// The environment of such a process.
const (
	behaviourEnv = "CLIP_TEST_BEHAVIOUR"
	rootEnv      = "CLIP_TEST_ROOT"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(func() int { return runTests(m) })) }

func runTests(m *testing.M) int {
	if name := os.Getenv(behaviourEnv); name != "" {
		if err := behaviours[name](os.Getenv(rootEnv), func(format string, args ...any) { fmt.Printf(format+"\n", args...) }); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	if err := harness.SweepStale(os.TempDir(), func(args ...any) { fmt.Println(args...) }); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// tell returns what a behaviour tells of a root.
func tell(w *world, root, name string) string {
	w.Helper()
	cmd := exec.CommandContext(w.ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), behaviourEnv+"="+name, rootEnv+"="+root)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	told, err := cmd.Output()
	require.NoError(w, err, "%s: %s", name, &stderr)
	require.NotEmpty(w, told, name)
	return string(told)
}

// requireSameCold does to files of which nothing is here yet what programs do, and to those that a stock containerd made:
// the kernel asks for them in a page fault, in sendfile, in direct I/O. The image is images.SmallName.
func requireSameCold(w *world, stock *harness.Containerd, ref string) {
	w.Helper()
	first := "cold"
	if strings.HasSuffix(w.Name(), "/file") { // see requireSameBehaviour
		first = "cold without direct IO"
	}
	want, got := w.prepare(stock, eager, ref), w.prepare(w.worker, lazy, ref)
	w.registry.Reset()
	require.Equal(w, tell(w, want, first), tell(w, got, first))
	require.Greater(w, w.registry.Requests().Sent(), int64(4<<20), "the noise of sizes was fetched meanwhile")
}

// requireSameBehaviour does to a writable root what programs do, and to one that a stock containerd made. The image is
// images.SmallName.
func requireSameBehaviour(w *world, stock *harness.Containerd, ref string) {
	w.Helper()
	want, got := w.prepare(stock, eager, ref), w.prepare(w.worker, lazy, ref)
	// From the copy-up on the roots change, in this order.
	for _, name := range []string{"exec", "memory maps", "direct IO", "sendfile", "seekdir", "statfs", "copy-up", "renames", "removals"} {
		told := tell(w, got, name)
		if name == "direct IO" && strings.HasSuffix(w.Name(), "/file") {
			require.Equal(w, "opening: invalid argument\n", told, "EROFS on files knows no direct I/O")
			continue
		}
		require.Equal(w, tell(w, want, name), told, name)
	}
	wantTree, err := rootdiff.Read(want)
	require.NoError(w, err)
	gotTree, err := rootdiff.Read(got)
	require.NoError(w, err)
	diffs := rootdiff.Diff(wantTree, gotTree, w.start)
	if strings.HasSuffix(w.Name(), "/fuse") {
		// Overlayfs does not recognise files of a lower FUSE, so the links of renames show inode numbers of their own.
		require.Len(w, diffs, 6, "two names of each of three files")
		diffs = slices.DeleteFunc(diffs, func(d string) bool { return strings.Contains(d, "names of the inode") })
	}
	require.Empty(w, diffs)
	w.Logf("%d names are the same after the changes", len(wantTree))
}

// sizes are the files of images.SmallName with sizes around those of blocks.
func sizes(root string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(root, "sizes", "*"))
	if len(files) < 30 && err == nil {
		err = fmt.Errorf("only %d files", len(files))
	}
	return files, err
}

func sum(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

func execPrograms(root string, say func(string, ...any)) error {
	for _, command := range [][]string{{"/app/run.sh"}, {"/bin/busybox", "echo", "direct"}, {"/data/attributes"}, {"/data/a"}} {
		cmd := exec.Command(command[0], command[1:]...)
		cmd.SysProcAttr = &unix.SysProcAttr{Chroot: root}
		cmd.Dir = "/"
		out, err := cmd.CombinedOutput()
		say("%s: %s%v", command, out, err)
	}
	return nil
}

// A fileBehaviour is what a behaviour does to one open file of sizes.
type fileBehaviour func(f *os.File, name string, size int, say func(string, ...any)) error

func (b fileBehaviour) each(root string, say func(string, ...any)) error {
	files, err := sizes(root)
	if err != nil {
		return err
	}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if err := b(f, path[len(root):], int(info.Size()), say); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// memoryMaps maps a file shared and private, with the rest of its last page.
func memoryMaps(f *os.File, name string, size int, say func(string, ...any)) error {
	if size == 0 {
		return nil
	}
	shared, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(shared)
	private, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(private)
	rest := private[size:min((size+4095)&^4095, cap(private))]
	before := sum(shared)
	for i := 0; i < size; i += 4096 {
		private[i]++
	}
	_, err = unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	say("%s: %s, changed %s, still %v; rest %v; writable: %v", name, before, sum(private), before == sum(shared), bytes.Count(rest, []byte{0}) == len(rest), err)
	return nil
}

func directIO(root string, say func(string, ...any)) error {
	probe, err := unix.Open(filepath.Join(root, "sizes/noise-1M"), unix.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		say("opening: %v", err)
		return nil
	}
	unix.Close(probe)
	return fileBehaviour(readDirectly).each(root, say)
}

// readDirectly opens the file anew, for direct I/O.
func readDirectly(f *os.File, name string, size int, say func(string, ...any)) error {
	const page = 4096
	fd, err := unix.Open(f.Name(), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf, err := unix.Mmap(-1, 0, 4<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	n, err := unix.Pread(fd, buf, 0)
	say("%s: %d bytes, %s, %v", name, n, sum(buf[:max(n, 0)]), err)
	if size > 2*page {
		n, err := unix.Pread(fd, buf[:page], page)
		say("a page of it: %s, %v", sum(buf[:max(n, 0)]), err)
	}
	return nil
}

func sendFile(f *os.File, name string, size int, say func(string, ...any)) error {
	fd, err := unix.MemfdCreate("sent", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	sent := 0
	for sent < size {
		n, err := unix.Sendfile(fd, int(f.Fd()), nil, size-sent)
		if err != nil || n == 0 {
			return fmt.Errorf("sendfile after %d bytes: %d, %w", sent, n, err)
		}
		sent += n
	}
	got := make([]byte, size)
	if _, err := unix.Pread(fd, got, 0); err != nil {
		return err
	}
	say("%s: %s", name, sum(got))
	return nil
}

// readBackwards starts with the last page.
func readBackwards(f *os.File, name string, size int, say func(string, ...any)) error {
	const page = 4096
	got := make([]byte, size)
	for at := (size - 1) / page * page; at >= 0; at -= page {
		if _, err := f.ReadAt(got[at:min(at+page, size)], int64(at)); err != nil {
			return err
		}
	}
	say("%s: %s", name, sum(got))
	return nil
}

// inTurns does the first thing to the first file, the second to the second, and so on.
func inTurns(behaviours ...fileBehaviour) behaviour {
	return func(root string, say func(string, ...any)) error {
		i := 0
		return fileBehaviour(func(f *os.File, name string, size int, say func(string, ...any)) error {
			b := behaviours[i%len(behaviours)]
			i++
			return b(f, name, size, say)
		}).each(root, say)
	}
}

// dirent is an entry of a directory, with the offset behind it.
type dirent struct {
	name string
	off  int64
	kind byte
}

// list reads a directory from where fd stands with buffers of a size.
func list(fd, buffer int) (entries []dirent, err error) {
	buf := make([]byte, buffer)
	for {
		n, err := unix.Getdents(fd, buf)
		if n <= 0 || err != nil {
			return entries, err
		}
		// struct linux_dirent64, see getdents(2)
		for b := buf[:n]; len(b) > 0; {
			size := binary.NativeEndian.Uint16(b[16:])
			name, _, _ := bytes.Cut(b[19:size], []byte{0})
			entries = append(entries, dirent{string(name), int64(binary.NativeEndian.Uint64(b[8:])), b[18]})
			b = b[size:]
		}
	}
}

// seekDirectories comes back to every place in a directory: one that is large, one that several layers changed.
func seekDirectories(root string, say func(string, ...any)) error {
	for _, dir := range []string{"many", "data", "opaque", "names"} {
		fd, err := unix.Open(filepath.Join(root, dir), unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		all, err := list(fd, 1000)
		if err != nil {
			return err
		}
		var names []string
		for i, e := range all {
			names = append(names, fmt.Sprintf("%q %d", e.name, e.kind))
			if i%50 != 0 && i != len(all)-1 {
				continue
			}
			if _, err := unix.Seek(fd, e.off, 0); err != nil {
				return err
			}
			rest, err := list(fd, 32<<10)
			if err != nil {
				return err
			}
			if !slices.Equal(rest, all[i+1:]) {
				return fmt.Errorf("%s: %d entries behind entry %d of %d", dir, len(rest), i, len(all))
			}
		}
		slices.Sort(names)
		say("%s: %s", dir, names)
	}
	return nil
}

func statFilesystem(root string, say func(string, ...any)) error {
	for _, path := range []string{"", "data/a", "many", "sizes/noise-1M"} {
		var st unix.Statfs_t
		if err := unix.Statfs(filepath.Join(root, path), &st); err != nil {
			return err
		}
		say("%s: type %x, block %d, fragment %d, names %d, flags %x", path, st.Type, st.Bsize, st.Frsize, st.Namelen, st.Flags)
	}
	return nil
}

// copyUp changes everything in a root in every way, which has overlayfs copy it.
func copyUp(root string, say func(string, ...any)) error {
	var paths []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && d.Name() == "many" {
			return filepath.SkipDir // 3000 files of one kind
		}
		paths = append(paths, path)
		return nil
	})
	if err != nil {
		return err
	}
	for i, path := range paths {
		var st, after unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		errs := changeOne(path, i, st)
		if err := unix.Lstat(path, &after); err != nil {
			return err
		}
		say("%q: %v; inode kept: %v; mode %o, owner %d:%d, %d links", path[len(root):], errs, st.Ino == after.Ino, after.Mode, after.Uid, after.Gid, after.Nlink)
	}
	return nil
}

// changeOne changes a file in a way that depends on i and returns what each call said.
func changeOne(path string, i int, st unix.Stat_t) (errs []error) {
	then := []unix.Timespec{{Sec: 1e9, Nsec: int64(i)}, {Sec: 1e9 + 1, Nsec: int64(i)}}
	switch i % 5 {
	case 0:
		errs = append(errs, unix.Lchown(path, int(st.Uid)+1, int(st.Gid)+1))
	case 1:
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			errs = append(errs, unix.Chmod(path, st.Mode&0o7777^0o111))
		}
	case 2:
		errs = append(errs, unix.Lsetxattr(path, "user.changed", []byte("yes"), 0), unix.Lsetxattr(path, "trusted.changed", []byte{0, 1}, 0))
	case 3:
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			errs = append(errs, appendTo(path, "more\n"))
		}
	default:
		if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > 0 {
			errs = append(errs, unix.Truncate(path, st.Size/2))
		}
	}
	return append(errs, unix.UtimesNanoAt(unix.AT_FDCWD, path, then, unix.AT_SYMLINK_NOFOLLOW))
}

func appendTo(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return errors.Unwrap(err) // without the root's path
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}

func renames(root string, say func(string, ...any)) error {
	in := func(name string) string { return filepath.Join(root, name) }
	for _, r := range []struct {
		from, to string
		flags    uint
	}{
		{"data/a", "data/renamed", 0},
		{"data/b", "app/b", 0},
		{"data/null", "data/null2", 0},
		{"data/fifo", "fifo", 0},
		{"data/link", "link", 0},
		{"app/name", "app/alias", 0}, // two names of one file
		{"sizes/text-1M", "sizes/text-1", 0},
		{"sizes/noise-512", "sizes/noise-513", unix.RENAME_EXCHANGE},
		{"sizes/noise-1", "sizes/zeros-1", unix.RENAME_NOREPLACE},
		{"sizes/noise-4095", "data/disk", unix.RENAME_EXCHANGE},
		{"opaque/sub", "opaque/sub2", 0}, // a directory of lower layers
		{"opaque", "names/opaque", 0},
		{"names", "app", unix.RENAME_EXCHANGE},
		{"data", "data/inside", 0},
	} {
		say("%s -> %s (%d): %v", r.from, r.to, r.flags, unix.Renameat2(unix.AT_FDCWD, in(r.from), unix.AT_FDCWD, in(r.to), r.flags))
	}
	for _, l := range [][2]string{{"data/setuid", "setuid"}, {"sizes/noise-65536", "app/linked"}, {"dangling", "dangling2"}, {"many", "many2"}} {
		say("link %s: %v", l, unix.Linkat(unix.AT_FDCWD, in(l[0]), unix.AT_FDCWD, in(l[1]), 0))
	}
	return nil
}

func removals(root string, say func(string, ...any)) error {
	in := func(name string) string { return filepath.Join(root, name) }
	for _, name := range []string{"again", "data/old", "data/acl", "absolute", "names/upper", "kind", "opaque"} {
		say("unlink %s: %v", name, unix.Unlink(in(name)))
	}
	for _, name := range []string{"grown", "many", "proc", "swap"} {
		say("rmdir %s: %v", name, unix.Rmdir(in(name)))
	}
	for _, name := range []string{"many", "opaque", "implied"} {
		if err := os.RemoveAll(in(name)); err != nil {
			return err
		}
		say("mkdir %s again: %v", name, unix.Mkdir(in(name), 0o750))
		entries, err := os.ReadDir(in(name))
		say("%d entries, %v", len(entries), err)
	}
	say("mkdir of a file that was: %v", unix.Mkdir(in("again"), 0o700))
	say("file of a directory that was: %v", os.WriteFile(in("proc"), []byte("x"), 0o600))
	if err := os.Chtimes(in("proc"), time.Unix(1, 0), time.Unix(1, 0)); err != nil {
		return err
	}
	say("whiteout: %v", unix.Mknod(in("whiteout"), unix.S_IFCHR|0o600, 0))
	_, err := os.Lstat(in("whiteout"))
	say("seen: %v", errors.Is(err, fs.ErrNotExist))
	return nil
}

// TestFileCapabilities has users that may not read a file run programs that may.
func TestFileCapabilities(t *testing.T) {
	t.Parallel()
	w := newMountsWorld(t)
	ref := w.ref(images.OwnersName)
	require.NoError(t, os.Chmod(w.lab.Dir, 0o711))
	w.eachMode(func(w *world) {
		w.pull(w.worker, lazy, ref)
		root := w.prepare(w.worker, lazy, ref)
		require.NoError(w, os.Chmod(root, 0o755))
		require.Regexp(w, "^/bin/busybox: .*Permission denied\n/bin/reader: inside\n$", tell(w, root, "file capabilities"))
	})
}

// readAsOther has a user that may not read a file read it with programs without and with the capability to.
func readAsOther(root string, say func(string, ...any)) error {
	for _, program := range []string{"/bin/busybox", "/bin/reader"} {
		out, _ := (&exec.Cmd{
			Path: program, Args: []string{"busybox", "cat", "/owners/shared-directory/inside"}, Dir: "/",
			SysProcAttr: &unix.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: 1000, Gid: 1000}},
		}).CombinedOutput() // it says what it could not do
		say("%s: %s", program, bytes.TrimSpace(out))
	}
	return nil
}
