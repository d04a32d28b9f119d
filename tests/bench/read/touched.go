package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/archive/erofs"
	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// touch is what a command needs of an image, in bytes.
type touch struct {
	pages      int64 // of the files' contents, 4 KiB each
	compressed int64 // what of the compressed layers stands for the pages
	least      int64 // what of them has to be fetched for the pages, since decoding starts at seek points
	files      int64 // what of them stands for the whole files
}

// touched finds out what the heavy import needs. It runs it in a root for which the kernel reads nothing ahead, so that
// the page cache has the pages that were read or mapped and no others.
func (w *world) touched(ctx context.Context) (t touch, err error) {
	s, err := w.Open(ctx, testbed.Ours, "")
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, s.Close(ctx, w.Whole.Ref)) }()
	if _, err := s.Pull(ctx, w.Whole.Ref); err != nil {
		return t, err
	}
	before := erofsDevices()
	if err := s.StartContainer(ctx, testbed.Ours, w.Whole.Ref, "sleeper", "sleep", "100000"); err != nil {
		return t, err
	}
	added := slices.DeleteFunc(erofsDevices(), func(d string) bool { return slices.Contains(before, d) })
	if len(added) != 1 {
		return t, fmt.Errorf("%d EROFS file systems were mounted meanwhile instead of one; is something else mounting them?", len(added))
	}
	if err := os.WriteFile(filepath.Join(added[0], "read_ahead_kb"), []byte("0"), 0); err != nil {
		return t, err
	}
	if _, err := s.Run(ctx, w.Whole.Ref, testbed.Heavy.Command...); err != nil {
		return t, err
	}
	roots := roots(s)
	if len(roots) != 1 {
		return t, fmt.Errorf("%d roots are mounted instead of one", len(roots))
	}
	return w.countTouched(ctx, filepath.Join(roots[0], erofs.RootDir))
}

func erofsDevices() []string {
	found, err := filepath.Glob("/sys/class/bdi/erofs-*")
	if err != nil {
		panic(err) // the pattern is not malformed
	}
	return found
}

// roots are the mount points of the roots that the site's daemon has mounted.
func roots(s *testbed.Site) []string {
	return slices.DeleteFunc(harness.MountsUnder(s.Daemon.Root), func(m string) bool { return !strings.Contains(m, "/roots/") })
}

// countTouched adds up the pages of a root's files that are in the page cache.
func (w *world) countTouched(ctx context.Context, root string) (t touch, err error) {
	file := w.Lab.Path("whole.clip")
	if _, err := w.Lab.Run(ctx, "clipctl", "index", "oci:"+w.Layout+":"+images.ShortName(images.BenchGzip), "--storage-ref", w.Whole.Ref, "-o", file); err != nil {
		return t, err
	}
	a, err := archive.OpenFile(file)
	if err != nil {
		return t, err
	}
	defer a.Close()
	seen := map[string]bool{}
	for i := len(a.DiffIDs()) - 1; i >= 0; i-- { // the topmost file of a name is the one that is seen
		x, err := a.Layer(i)
		if err != nil {
			return t, err
		}
		starts := map[inflate.Out]bool{}
		for _, e := range x.Entries {
			if e.Type != layer.TypeReg || e.Size == 0 || seen[e.Name] {
				continue
			}
			seen[e.Name] = true
			pages, err := residentPages(filepath.Join(root, e.Name))
			if errors.Is(err, fs.ErrNotExist) {
				continue // whited out
			}
			if err != nil {
				return t, err
			}
			t.add(x, e, pages, starts)
		}
	}
	return t, nil
}

const page = 4096

// add counts pages of a file, and the seek points that decoding starts at for them. Of the compressed bytes of a span, a
// page has its share by length.
func (t *touch) add(x *layer.Index, e layer.Entry, pages []int64, starts map[inflate.Out]bool) {
	for _, p := range pages {
		from := e.Off + inflate.Out(p*page)
		to := min(from+page, e.Off+inflate.Out(e.Size))
		t.pages += int64(to - from)
		t.compressed += compressedShare(x, from, to)
		for at := from; at < to; {
			start, next := x.DecodeRange(at)
			if !starts[start] {
				starts[start] = true
				t.least += compressedShare(x, start, next)
			}
			at = next
		}
	}
	if len(pages) > 0 {
		t.files += compressedShare(x, e.Off, e.Off+inflate.Out(e.Size))
	}
}

// compressedShare is how many compressed bytes stand for [from, to) of a layer.
func compressedShare(x *layer.Index, from, to inflate.Out) (n int64) {
	for from < to {
		span := x.SpanAt(from)
		start, end := x.SpanRange(span)
		var in inflate.In
		if span > 0 {
			in = x.Spans[span-1].InEnd
		}
		part := min(end, to) - from
		n += int64(x.Spans[span].InEnd-in) * int64(part) / int64(end-start)
		from += part
	}
	return n
}

// residentPages returns the numbers of a file's pages that are in the page cache.
func residentPages(name string) ([]int64, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() == 0 || !st.Mode().IsRegular() {
		return nil, err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer func() { _ = unix.Munmap(m) }()
	vec := make([]byte, (len(m)+page-1)/page)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&vec[0]))); errno != 0 {
		return nil, fmt.Errorf("%s: %w", name, errno)
	}
	var pages []int64
	for i, in := range vec {
		if in&1 == 1 {
			pages = append(pages, int64(i))
		}
	}
	return pages, nil
}
