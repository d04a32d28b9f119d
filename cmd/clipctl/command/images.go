package command

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/beam-cloud/containerd-clip/plugin/watch"
)

// showIndexed shows what a watcher made of containerd's images, in all
// namespaces. Without such images it shows nothing.
func showIndexed(ctx context.Context, g *globals, stdout io.Writer) error {
	ctx, client, err := g.connect(ctx)
	if err != nil {
		return nil // there is no containerd here: nothing to show
	}
	defer client.Close()
	spaces, err := client.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("asking containerd at %s: %w", g.address, err)
	}
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	shown := 0
	for _, ns := range spaces {
		found, err := client.ImageService().List(namespaces.WithNamespace(ctx, ns), fmt.Sprintf("labels.%q", watch.LabelTarget))
		if err != nil {
			return fmt.Errorf("asking containerd at %s: %w", g.address, err)
		}
		slices.SortFunc(found, func(a, b images.Image) int { return cmp.Compare(a.Name, b.Name) })
		for _, image := range found {
			if shown == 0 {
				fmt.Fprintln(w, "NAMESPACE\tIMAGE\tINDEXED\tARCHIVE OR REASON")
			}
			shown++
			indexed, what := indexedAs(image)
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", ns, image.Name, indexed, what)
		}
	}
	if shown > 0 {
		fmt.Fprintln(w)
	}
	return w.Flush()
}

// indexedAs says whether an image is indexed, and where its archives are or
// why there are none.
func indexedAs(image images.Image) (indexed, what string) {
	labels := image.Labels
	if labels[watch.LabelTarget] != image.Target.Digest.String() {
		return "no", "the image has changed since"
	}
	if reason := labels[watch.LabelError]; reason != "" {
		if retry := labels[watch.LabelRetry]; retry != "" {
			return "retry " + retry, reason
		}
		return "failed", reason
	}
	var archives []string
	for k, v := range labels {
		if platform, ok := strings.CutPrefix(k, watch.LabelArchive); ok {
			archives = append(archives, platform+" "+v)
		}
	}
	slices.Sort(archives)
	return "yes", strings.Join(archives, ", ")
}
