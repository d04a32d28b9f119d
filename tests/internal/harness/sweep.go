package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// sweep ends every process of the lab in dir, takes its mounts and loop devices away and removes it.
func sweep(dir string) error {
	// A process that waits for a file system of the lab cannot be killed before.
	if err := abortConnections(dir); err != nil {
		return err
	}
	if err := killAll(dir); err != nil {
		return err
	}
	deleteContainers(dir)
	if err := unmountAll(dir); err != nil {
		return err
	}
	if err := detachLoops(dir); err != nil {
		return err
	}
	if left := Leftovers(dir); len(left) > 0 {
		return fmt.Errorf("left behind in %s: %s", dir, strings.Join(left, "; "))
	}
	return errors.Join(removeCgroups(dir), removeLab(dir))
}

// removeLab removes the file that says whose the lab is last: a removal that is cut short goes on at the next sweep.
func removeLab(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if e.Name() == ownerFile {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// Leftovers names the processes, mounts and loop devices that belong to the lab in dir.
func Leftovers(dir string) []string {
	var left []string
	for _, pid := range processesOf(dir) {
		left = append(left, fmt.Sprintf("process %d (%s)", pid, commandLine(pid)))
	}
	for _, m := range MountsUnder(dir) {
		left = append(left, "mount "+m)
	}
	for dev, file := range loopsOf(dir) {
		left = append(left, "loop device "+dev+" of "+file)
	}
	return left
}

// MountsUnder lists the mount points at and below dir, in the order in which they were made.
func MountsUnder(dir string) []string {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return []string{"unknown: " + err.Error()}
	}
	var points []string
	for _, m := range infos {
		points = append(points, m.Mountpoint)
	}
	return points
}

// unmountAll unmounts newest first. A mount that is busy, or whose server is dead, is detached.
func unmountAll(dir string) error {
	for range 10 {
		points := MountsUnder(dir)
		if len(points) == 0 {
			return nil
		}
		for _, point := range slices.Backward(points) {
			if err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW); err == nil {
				continue
			}
			if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("unmounting %s: %w", point, err)
			}
		}
	}
	return nil
}

// killAll ends the processes of a lab and waits until they are gone.
func killAll(dir string) error {
	deadline := time.Now().Add(time.Minute)
	for {
		pids := processesOf(dir)
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes do not end: %v", pids)
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL) // gone is as good
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// processesOf finds the processes that carry the lab's mark in their environment, and all their descendants.
func processesOf(dir string) []int {
	var marked []int
	var mu sync.Mutex // guards marked
	var all sync.WaitGroup
	for _, pid := range allProcesses() {
		all.Go(func() {
			if slices.Contains(strings.Split(readMemory(pid, "environ"), "\x00"), labEnv+"="+dir) {
				mu.Lock()
				defer mu.Unlock()
				marked = append(marked, pid)
			}
		})
	}
	all.Wait()
	return slices.DeleteFunc(withDescendants(marked...), func(pid int) bool { return pid == os.Getpid() })
}

// withDescendants are those of the processes, and of all that descends from them, that are alive.
func withDescendants(pids ...int) (living []int) {
	children := map[int][]int{}
	for _, pid := range allProcesses() {
		children[parent(pid)] = append(children[parent(pid)], pid)
	}
	found := map[int]bool{}
	for todo := pids; len(todo) > 0; {
		pid := todo[0]
		todo = todo[1:]
		if found[pid] || pid <= 1 { // children of init are anybody's
			continue
		}
		found[pid] = true
		todo = append(todo, children[pid]...)
		if alive(pid) {
			living = append(living, pid)
		}
	}
	slices.Sort(living)
	return living
}

func allProcesses() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// statFields returns /proc/PID/stat from the state on; nothing if there is no such process. The command's name before it,
// which may hold anything, ends at the last parenthesis.
func statFields(pid int) []string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	return strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
}

func status(pid int) (state string, ppid int) {
	fields := statFields(pid)
	if len(fields) < 2 {
		return "", 0
	}
	ppid, _ = strconv.Atoi(fields[1])
	return fields[0], ppid
}

func parent(pid int) int {
	_, ppid := status(pid)
	return ppid
}

// alive is false for a zombie too: its parent may be somebody who never waits.
func alive(pid int) bool {
	state, _ := status(pid)
	return state != "" && state != "Z" && state != "X"
}

// readMemory reads a file in /proc that is in the memory of its process. That waits for as long as a thread of the process
// waits for a page of it, and a dead file system may owe that page.
func readMemory(pid int, name string) string {
	read := make(chan string, 1)
	go func() {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name)) // empty if it has ended
		read <- string(text)
	}()
	select {
	case text := <-read:
		return text
	case <-time.After(memoryWait):
		return ""
	}
}

const memoryWait = 2 * time.Second

func commandLine(pid int) string {
	return strings.TrimSpace(strings.ReplaceAll(readMemory(pid, "cmdline"), "\x00", " "))
}

// deleteContainers has runc forget containers whose processes were killed, so that their cgroups go too.
func deleteContainers(dir string) {
	states, _ := filepath.Glob(filepath.Join(dir, "*", "runc", "*", "*", "state.json"))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, state := range states {
		container := filepath.Dir(state)
		// A failure leaves an empty cgroup and nothing else.
		_ = exec.CommandContext(ctx, "runc", "--root", filepath.Dir(container), "delete", "--force", filepath.Base(container)).Run()
	}
	sockets, _ := filepath.Glob(filepath.Join(dir, "*", "state", "io.containerd.runtime.v2.task", "*", "*", "address"))
	for _, file := range sockets {
		if address, err := os.ReadFile(file); err == nil {
			_ = os.Remove(strings.TrimPrefix(string(address), "unix://")) // mostly gone already
		}
	}
}

// loopsOf maps loop devices to the files below dir that are behind them.
func loopsOf(dir string) map[string]string {
	loops := map[string]string{}
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		text, err := os.ReadFile(f)
		if backing := strings.TrimSpace(string(text)); err == nil && strings.HasPrefix(backing, dir+"/") {
			loops["/dev/"+filepath.Base(filepath.Dir(filepath.Dir(f)))] = backing
		}
	}
	return loops
}

// detachLoops takes loop devices away. One that somebody still has open goes when he closes it: a mount namespace, say,
// that another test made meanwhile, and in which the mount is until it ends.
func detachLoops(dir string) error {
	deadline := time.Now().Add(2 * time.Minute)
	for {
		loops := loopsOf(dir)
		if err := detach(loops); err != nil {
			return err
		}
		if len(loops) == 0 || time.Now().After(deadline) {
			return nil // who asks for what is left is told
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func detach(loops map[string]string) error {
	for dev := range loops {
		f, err := os.Open(dev)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.ENXIO) {
			return fmt.Errorf("detaching %s: %w", dev, err)
		}
	}
	return nil
}
