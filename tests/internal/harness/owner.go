package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A lab's owner is the process that made it. Its file has the process's number and when it began, in clock ticks since
// the machine's start: numbers come again.

func thisOwner() string { return ownerOf(os.Getpid()) }

// ownerOf is empty if there is no such process.
func ownerOf(pid int) string {
	fields := statFields(pid)
	const began = 19 // of what follows the command's name, see proc_pid_stat(5)
	if len(fields) <= began {
		return ""
	}
	return fmt.Sprintf("%d %s", pid, fields[began])
}

// lives says whether an owner goes on. One that was killed, and waits for a file system before it can end, does not. What
// is no owner may be one that is being written.
func lives(owner string) bool {
	number, _, began := strings.Cut(owner, " ")
	pid, err := strconv.Atoi(number)
	if err != nil {
		return true
	}
	if !alive(pid) || killed(pid) {
		return false
	}
	return !began || ownerOf(pid) == owner // earlier versions noted the number alone
}

// killed says whether a process has SIGKILL pending.
func killed(pid int) bool {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(text)) {
		name, mask, _ := strings.Cut(line, ":")
		if name != "SigPnd" && name != "ShdPnd" {
			continue
		}
		if bits, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64); err == nil && bits&(1<<(unix.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}

// labs maps the labs below parent to their owners.
func labs(parent string) (map[string]string, error) {
	dirs, err := filepath.Glob(filepath.Join(parent, labPattern+"*"))
	found := map[string]string{}
	for _, dir := range dirs {
		if owner, err := os.ReadFile(filepath.Join(dir, ownerFile)); err == nil { // else it is being made, or removed
			found[dir] = string(owner)
		}
	}
	return found, err
}

// SweepStale sweeps the labs below parent whose owner does not run any more, and says so.
func SweepStale(parent string, say func(...any)) error {
	found, err := labs(parent)
	for dir, owner := range found {
		if lives(owner) {
			continue
		}
		left := Leftovers(dir)
		if serr := sweep(dir); serr != nil {
			err = errors.Join(err, fmt.Errorf("lab %s of an earlier run: %w", dir, serr))
			continue
		}
		say(fmt.Sprintf("removed lab %s of an earlier run, whose process has ended, and what it left: %s", dir, summary(left)))
	}
	return err
}

// sweepOwn sweeps the labs of this process.
func sweepOwn(parent string) {
	found, _ := labs(parent)
	for dir, owner := range found {
		if owner == thisOwner() {
			if err := sweep(dir); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
	}
}

// summary counts leftovers by their first word.
func summary(left []string) string {
	counts := map[string]int{}
	for _, l := range left {
		kind, _, _ := strings.Cut(l, " ")
		counts[kind]++
	}
	var all []string
	for kind, n := range counts {
		all = append(all, fmt.Sprintf("%s: %d", kind, n))
	}
	slices.Sort(all)
	return strings.Join(append(all, "its files"), ", ")
}
