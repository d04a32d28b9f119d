package watch

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
)

// kept matches what fileName returns, and what is to become such a file. Other
// files in the directory are not ours.
var kept = regexp.MustCompile(`-[0-9a-f]{32}\.clip(\.[0-9]+)?$`)

// abandoned is how long an archive that is not published is left alone: it was
// to be tried again before.
const abandoned = 2 * lastRetry

// sweep removes archives that no image is labelled with, in any namespace, and
// those whose image went away before they were published. It waits for images
// that are still to be looked at: one that was replaced may have an archive.
func (w *Watcher) sweep(ctx context.Context, client *containerd.Client) again {
	files := filesIn(w.opts.Directory)
	for _, file := range filesIn(filepath.Join(w.opts.Directory, unpushed)) {
		if st, err := os.Stat(file); err == nil && time.Since(st.ModTime()) > abandoned {
			files = append(files, file)
		}
	}
	needed, all, err := w.labelled(ctx, client)
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot tell which archives are still needed")
		return again{}
	}
	if !all {
		return again{after: settle}
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
	return again{}
}

// filesIn lists a directory. One that is not there holds nothing.
func filesIn(dir string) (files []string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		files = append(files, filepath.Join(dir, e.Name()))
	}
	return files
}

// labelled returns the archives that images are labelled with, and whether all
// images are labelled that a rule is for.
func (w *Watcher) labelled(ctx context.Context, client *containerd.Client) (found map[string]bool, all bool, err error) {
	spaces, err := client.NamespaceService().List(ctx)
	if err != nil {
		return nil, false, err
	}
	found, all = map[string]bool{}, true
	for _, ns := range spaces {
		images, err := client.ImageService().List(namespaces.WithNamespace(ctx, ns))
		if err != nil {
			return nil, false, err
		}
		for _, image := range images {
			status := readStatus(image.Labels)
			if _, ok := w.match(image); ok && status.target == "" && slices.Contains(w.opts.Namespaces, ns) {
				all = false
			}
			for _, archive := range status.archives {
				found[archive] = true
			}
		}
	}
	return found, all, nil
}
