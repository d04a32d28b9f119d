package command

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/snapshotter/contents"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

// archiveFlags are the flags of commands that read the files of an archive.
type archiveFlags struct {
	cacheDir string
	hosts    []string
}

const aboutArchives = `
FILE is a .clip archive of any kind: one with layer indexes, one of an image
that upstream CLIP wrote, or one of CLIP's first version, with its data inside
or in an S3 bucket. Credentials for a bucket come from AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY or the AWS SDK's files, those for a registry from
docker's configuration.`

func newInspectCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "inspect FILE",
		Short:   "Show what an archive says of itself, as JSON",
		Long:    "Show what an archive says of itself, as JSON. No registry or bucket is asked.\n" + aboutArchives,
		Example: `  clipctl inspect app.clip | jq .layers`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := contents.Open(args[0], contents.Options{})
			if err != nil {
				return err
			}
			defer a.Close()
			out, err := a.Describe()
			if err != nil {
				return err
			}
			enc := json.NewEncoder(cmd.OutOrStdout())
			enc.SetIndent("", "  ")
			return enc.Encode(out)
		},
	}
}

func newListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "ls FILE [PATH]",
		Short:   "List the files of an archive, or those at PATH and below",
		Long:    "List the files of an archive, or those at PATH and below. No registry or bucket is asked.\n" + aboutArchives,
		Example: `  clipctl ls app.clip /usr/bin`,
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := contents.Open(args[0], contents.Options{})
			if err != nil {
				return err
			}
			defer a.Close()
			return a.List(pathArg(args), func(f contents.File) error {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), line(f))
				return err
			})
		},
	}
}

func pathArg(args []string) string {
	if len(args) > 1 {
		return args[1]
	}
	return "/"
}

// line is a file as "ls -l" and "tar -tv" show it.
func line(f contents.File) string {
	what, target := fmt.Sprint(f.Size), ""
	switch f.Mode & unix.S_IFMT {
	case unix.S_IFBLK, unix.S_IFCHR:
		what = fmt.Sprintf("%d,%d", unix.Major(f.Rdev), unix.Minor(f.Rdev))
	case unix.S_IFLNK:
		target = " -> " + printable(f.Target)
	}
	return fmt.Sprintf("%s %d:%d %9s %s %s%s", modeString(f.Mode), f.UID, f.GID, what,
		f.Time.UTC().Format(time.DateTime), printable(f.Path), target)
}

// printable quotes a name that would disturb a terminal or a line.
func printable(name string) string {
	odd := func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }
	if strings.ContainsFunc(name, odd) {
		return strconv.Quote(name)
	}
	return name
}

func modeString(mode uint32) string {
	m := fs.FileMode(mode & 0o777)
	for bit, to := range map[uint32]fs.FileMode{unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky} {
		if mode&bit != 0 {
			m |= to
		}
	}
	m |= map[uint32]fs.FileMode{
		unix.S_IFDIR: fs.ModeDir, unix.S_IFLNK: fs.ModeSymlink, unix.S_IFIFO: fs.ModeNamedPipe,
		unix.S_IFBLK: fs.ModeDevice, unix.S_IFCHR: fs.ModeDevice | fs.ModeCharDevice,
	}[mode&unix.S_IFMT]
	return m.String()
}

func newCatCommand() *cobra.Command {
	var f archiveFlags
	cmd := &cobra.Command{
		Use:   "cat FILE PATH",
		Short: "Print a file of an archive",
		Long: `Print a file of an archive. With layer indexes only the parts of the layer that
hold the file are fetched, and verified. Without, CLIP's own code fetches the layer.
` + aboutArchives,
		Example: `  clipctl cat app.clip /etc/os-release`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := f.open(args[0])
			if err != nil {
				return err
			}
			defer a.Close()
			return a.Copy(cmd.Context(), cmd.OutOrStdout(), args[1])
		},
	}
	f.add(cmd)
	return cmd
}

func newMountCommand() *cobra.Command {
	var f archiveFlags
	cmd := &cobra.Command{
		Use:   "mount FILE DIR",
		Short: "Mount an archive read-only until interrupted",
		Long: `Mount an archive read-only on the directory DIR until this command is
interrupted or ended. An archive with layer indexes is served as containers see
the image; all others by upstream CLIP's own file system, within its limits.
Containers on lazy images do not need this: the snapshotter mounts for them.
` + aboutArchives,
		Example: `  clipctl mount app.clip /mnt`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := f.open(args[0])
			if err != nil {
				return err
			}
			defer a.Close()
			return runMount(cmd.Context(), a, args[1], cmd.OutOrStdout())
		},
	}
	f.add(cmd)
	return cmd
}

func runMount(ctx context.Context, a *contents.Archive, dir string, stdout io.Writer) error {
	if st, err := os.Stat(dir); err != nil {
		return fmt.Errorf("mount point: %w", err)
	} else if !st.IsDir() {
		return fmt.Errorf("mount point %s is not a directory", dir)
	}
	unmount, err := a.Mount(context.WithoutCancel(ctx), dir)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "mounted on %s\n", dir)
	<-ctx.Done()
	return unmount()
}

func (f *archiveFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.cacheDir, "cache-dir", "", "where what is fetched is kept for the next time (default: nowhere)")
	cmd.Flags().StringSliceVar(&f.hosts, "hosts-dir", defaultHostsDirs, "directories with <host>/hosts.toml, as containerd's config_path")
}

func (f *archiveFlags) open(path string) (*contents.Archive, error) {
	if err := clip.SetLogLevel("error"); err != nil {
		return nil, err
	}
	return contents.Open(path, contents.Options{CacheDir: f.cacheDir, Fetch: remote.New(remote.Options{ConfigPath: f.hosts})})
}
