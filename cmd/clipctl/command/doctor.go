package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/snapshotter/cri"
)

type doctorOptions struct {
	json  bool
	root  string
	hosts []string

	kubelet string // the kubelet's configuration, which need not be there
}

func newDoctorCommand(g *globals) *cobra.Command {
	o := doctorOptions{kubelet: "/var/lib/kubelet/config.yaml"}
	cmd := &cobra.Command{
		Use:   "doctor [IMAGE...]",
		Short: "Look for what keeps images from being lazy, and say what to do about it",
		Long: `Check this machine's kernel, the daemon, its disk and archives, what the kubelet
tells it, and containerd's configuration; for each IMAGE also its registry, with
the credentials that this user has and those that the kubelet pulled it with,
and whether the daemon finds an archive of it. Every finding comes with its
remedy.

The kernel is tried in the way the daemon tries it. If the daemon runs, what it
found out counts; else this needs root. Nothing is changed.`,
		Example: `  clipctl doctor
  clipctl doctor registry.example.com/team/app:1
  clipctl doctor --json | jq '.[] | select(.status != "ok")'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return runDoctor(cmd.Context(), g, args, o, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.json, "json", false, "print the findings as one JSON document")
	f.StringVar(&o.root, "root", "/var/lib/containerd-clip-grpc", "the daemon's directory, if it does not run")
	f.StringSliceVar(&o.hosts, "hosts-dir", defaultHostsDirs, "directories with containerd's <host>/hosts.toml files")
	return cmd
}

// Outcomes of a check.
const (
	good    = "ok"
	warning = "warning" // it works, but not as well as it could
	failure = "failure"
	unknown = "unknown" // it could not be checked
)

// finding is the outcome of one check.
type finding struct {
	Status string `json:"status"`
	Check  string `json:"check"`
	Found  string `json:"found"`
	Remedy string `json:"remedy,omitempty"`
}

// doctor collects findings.
type doctor struct {
	globals  *globals
	options  doctorOptions
	keys     *cri.Keychain // what the kubelet pulled with; nil if it cannot be read
	findings []finding
}

func (d *doctor) add(status, check, found, remedy string) {
	d.findings = append(d.findings, finding{status, check, found, remedy})
}

func (d *doctor) good(check, format string, args ...any) {
	d.add(good, check, fmt.Sprintf(format, args...), "")
}

// errFindings is returned when a check found something wrong.
var errFindings = errors.New("something is wrong")

func runDoctor(ctx context.Context, g *globals, images []string, o doctorOptions, stdout io.Writer) error {
	d := &doctor{globals: g, options: o}
	st := d.daemon(ctx)
	d.kernel(ctx, st)
	d.disk(st)
	d.archives(st)
	d.logins()
	d.containerd(ctx, st)
	for _, image := range images {
		d.registry(ctx, st, image)
	}
	if err := d.show(stdout); err != nil {
		return err
	}
	failures := 0
	for _, f := range d.findings {
		if f.Status == failure {
			failures++
		}
	}
	if failures > 0 {
		return fmt.Errorf("%d of %d checks failed: %w", failures, len(d.findings), errFindings)
	}
	return nil
}

func (d *doctor) show(w io.Writer) error {
	if d.options.json {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(d.findings)
	}
	for _, f := range d.findings {
		status := f.Status
		if status != good {
			status = strings.ToUpper(status)
		}
		if _, err := fmt.Fprintf(w, "%-8s %-12s %s\n", status, f.Check, f.Found); err != nil {
			return err
		}
		if f.Remedy != "" {
			fmt.Fprintf(w, "%21s -> %s\n", "", f.Remedy)
		}
	}
	return nil
}
