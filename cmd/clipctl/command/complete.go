package command

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// completeArgs has a shell complete the arguments of cmd and of those below it,
// as their usage names them: images of containerd's store, and files.
func completeArgs(g *globals, cmd *cobra.Command) {
	_, usage, _ := strings.Cut(cmd.Use, " ")
	names := strings.Fields(strings.ReplaceAll(usage, "[flags]", ""))
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(names) == 0 || len(args) >= len(names) && !strings.Contains(usage, "...") {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		if !strings.Contains(names[min(len(args), len(names)-1)], "IMAGE") {
			return nil, cobra.ShellCompDirectiveDefault
		}
		return imageNames(cmd.Context(), g, toComplete), cobra.ShellCompDirectiveNoFileComp
	}
	for _, sub := range cmd.Commands() {
		completeArgs(g, sub)
	}
}

// imageNames returns the images of containerd's store whose names begin so;
// without containerd there are none.
func imageNames(ctx context.Context, g *globals, begin string) (names []string) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	ctx, client, err := g.connect(ctx)
	if err != nil {
		return nil
	}
	defer client.Close()
	images, err := client.ImageService().List(ctx)
	if err != nil {
		return nil
	}
	for _, image := range images {
		if strings.HasPrefix(image.Name, begin) {
			names = append(names, image.Name)
		}
	}
	return names
}
