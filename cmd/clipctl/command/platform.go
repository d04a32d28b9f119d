package command

import (
	"fmt"

	"github.com/containerd/platforms"
	"github.com/spf13/cobra"

	"github.com/beam-cloud/containerd-clip/plugin/export"
)

// platformFlags say which platforms of an image a command is for.
type platformFlags struct {
	platform string
	all      bool
}

// add adds the flags to cmd. verb says what cmd does with a platform.
func (p *platformFlags) add(cmd *cobra.Command, verb string) {
	cmd.Flags().StringVar(&p.platform, "platform", "", "platform to "+verb+", as os/arch[/variant] (default: this machine's)")
	cmd.Flags().BoolVar(&p.all, "all-platforms", false, verb+" every platform that is in the local store")
	cmd.MarkFlagsMutuallyExclusive("platform", "all-platforms")
}

func (p platformFlags) selection() (export.Selection, error) {
	switch {
	case p.all:
		return export.AllPlatforms, nil
	case p.platform == "":
		return export.ThisPlatform, nil
	}
	parsed, err := platforms.Parse(p.platform)
	if err != nil {
		return export.Selection{}, fmt.Errorf("platform %q: %w", p.platform, err)
	}
	return export.OnePlatform(parsed), nil
}
