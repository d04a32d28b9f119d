package watch

import (
	"context"
	"os"
	"path/filepath"
	"regexp"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
)

// kept matches what fileName returns. Other files in the directory are not ours.
var kept = regexp.MustCompile(`-[0-9a-f]{32}\.clip$`)

// sweep removes archives that no image is labelled with, in any namespace.
func (w *Watcher) sweep(ctx context.Context, client *containerd.Client) {
	var files []string
	for _, dir := range []string{w.opts.Directory, filepath.Join(w.opts.Directory, unpushed)} {
		entries, _ := os.ReadDir(dir) // what is not there holds nothing
		for _, e := range entries {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	needed, err := labelled(ctx, client)
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot tell which archives are still needed")
		return
	}
	for _, file := range files {
		if needed[file] || !kept.MatchString(file) {
			continue
		}
		if err := os.Remove(file); err != nil {
			log.G(ctx).WithError(err).Warn("cannot remove the archive of an image that is gone")
			continue
		}
		log.G(ctx).WithField("archive", file).Info("removed the archive of an image that is gone")
	}
}

// labelled returns the archives that images are labelled with.
func labelled(ctx context.Context, client *containerd.Client) (map[string]bool, error) {
	spaces, err := client.NamespaceService().List(ctx)
	if err != nil {
		return nil, err
	}
	found := map[string]bool{}
	for _, ns := range spaces {
		images, err := client.ImageService().List(namespaces.WithNamespace(ctx, ns))
		if err != nil {
			return nil, err
		}
		for _, image := range images {
			for _, archive := range readStatus(image.Labels).archives {
				found[archive] = true
			}
		}
	}
	return found, nil
}
