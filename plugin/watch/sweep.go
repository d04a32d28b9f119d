package watch

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
)

// kept matches what fileName returns. Other files in the directory are not ours.
var kept = regexp.MustCompile(`-[0-9a-f]{32}\.clip$`)

// abandoned is how long an archive that is not published is left alone: it was
// to be tried again before.
const abandoned = 2 * lastRetry

// sweep removes archives that no image is labelled with, in any namespace, and
// those whose image went away before they were published.
func (w *Watcher) sweep(ctx context.Context, client *containerd.Client) {
	files := filesIn(w.opts.Directory)
	for _, file := range filesIn(filepath.Join(w.opts.Directory, unpushed)) {
		if st, err := os.Stat(file); err == nil && time.Since(st.ModTime()) > abandoned {
			files = append(files, file)
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

// filesIn lists a directory. One that is not there holds nothing.
func filesIn(dir string) (files []string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		files = append(files, filepath.Join(dir, e.Name()))
	}
	return files
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
